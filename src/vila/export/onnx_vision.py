"""The tower and projector as one ONNX graph, for runtimes of their own: pixels in, vectors of the LLM's space out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.export.base import ExportOptions, Guide

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vila.export.source import Source

OPSET = 17
"""Version of ONNX's operators that the graph uses; onnxruntime knows it since 1.12, TensorRT since 8.6."""
GRAPH, FACTS = "vision.onnx", "vision.json"
_PARTS = ("vision_tower.", "projector.")


@dataclass(frozen=True)
class OnnxVisionTarget:
    """`vision.onnx`: `pixels` float32 [N, 3, S, S] to `vectors` float32 [N, P, D], N free."""

    name: str = "onnx"
    summary: str = "The vision tower and projector as one ONNX graph, for onnxruntime, TensorRT and others"
    precisions: Mapping[str, str] = field(default_factory=lambda: {"f32": "float32 throughout"})
    takes: frozenset[str] = frozenset()
    holds_llm: bool = False
    verified: str = "run by onnxruntime with batches of several sizes, within 1e-4 of the model's own vectors"

    def refusals(self, source: Source, options: ExportOptions) -> list[str]:
        """Nothing: every tower and projector is made of operators that ONNX has."""
        return []

    def write(self, source: Source, part: Path, options: ExportOptions) -> None:
        """Write vision.onnx, and vision.json with what pixels must be; a graph over 2 GB has its weights beside it."""
        from vila.core.files import write_json

        side = source.processor.spec.image_size
        export_graph(vision_module(source), side, part / GRAPH)
        facts = {"opset": OPSET, "input": "pixels", "output": "vectors", **source.processor.spec.to_dict()}
        write_json(part / FACTS, facts)

    def guide(self, source: Source, options: ExportOptions) -> Guide:
        """How to run the graph."""
        spec = source.processor.spec
        size = f"3x{spec.image_size}x{spec.image_size}"
        run = (
            f"python -c \"import numpy, onnxruntime; run = onnxruntime.InferenceSession('{{out}}/{GRAPH}').run; "
            f"print(run(None, {{'pixels': numpy.zeros((2, 3, {spec.image_size}, {spec.image_size}), 'float32')}})[0]"
            '.shape)"'
        )
        engine = (
            f"trtexec --onnx={{out}}/{GRAPH} --saveEngine=vision.engine --fp16 "
            f"--minShapes=pixels:1x{size} --optShapes=pixels:1x{size} --maxShapes=pixels:8x{size}"
        )
        notes = [
            f"`pixels` are RGB, float32, (value / 255 - mean) / std with the mean {list(spec.mean)} and std "
            f"{list(spec.std)}; {FACTS} has them, and `{spec.image_mode}` is how a picture becomes square.",
            f"`vectors` are {spec.tokens_per_image} for a picture, to be put in the place of its tokens.",
        ]
        return Guide(
            [("Run it", run), ("Build a TensorRT engine of it", engine)],
            [f"ONNX operators version {OPSET}", "onnxruntime 1.32: run", "TensorRT 8.6 and later: not run"],
            notes=notes,
        )


def vision_module(source: Source) -> nn.Module:
    """Tower and projector in float32 and eval mode, from pixels to vectors; the LLM's weights are never read."""
    import torch
    from accelerate import init_empty_weights
    from torch import nn
    from transformers.initialization import no_init_weights

    from vila.model.modeling import VilaForConditionalGeneration
    from vila.model.weights import published_names

    with init_empty_weights(include_buffers=False), no_init_weights():
        model = VilaForConditionalGeneration(source.config)
    here = published_names(model)
    for name in source.pieces:
        if name.startswith(_PARTS):
            path, _, leaf = here.get(name, name).rpartition(".")
            weight = nn.Parameter(source.read(name, torch.float32), requires_grad=False)
            setattr(model.get_submodule(path), leaf, weight)
    _settle_positions(model.vision_tower, source.processor.spec.image_size)

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.projector = model.vision_tower, model.projector

        def forward(self, pixels_N3SS: Tensor) -> Tensor:
            vectors: Tensor = model.project(model.vision_features(pixels_N3SS))
            return vectors

    return Vision().eval()


def _settle_positions(tower: Any, side: int) -> None:
    """Interpolate the positions of a tower of any size once, so that the graph need not: runtimes differ in that."""
    import torch

    if tower.config.model_type != "dinov2" or tower.config.image_size == side:
        return
    embeddings = tower.embeddings
    patches = (side // tower.config.patch_size) ** 2
    tokens = embeddings.position_embeddings.new_zeros(1, patches + 1, tower.config.hidden_size)
    settled = embeddings.interpolate_pos_encoding(tokens, side, side)
    embeddings.position_embeddings = torch.nn.Parameter(settled, requires_grad=False)


def export_graph(module: nn.Module, side: int, path: Path) -> None:
    """Trace `module` for pictures of `side` pixels and any number of them, and check the graph."""
    import onnx
    import torch

    with warnings.catch_warnings(), torch.no_grad():
        # Shapes are constants here but for the batch, which is what the tracer warns of.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.zeros(2, 3, side, side),),
            path,
            input_names=["pixels"],
            output_names=["vectors"],
            dynamic_axes={"pixels": {0: "batch"}, "vectors": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )
    onnx.checker.check_model(path)


TARGET = OnnxVisionTarget()
