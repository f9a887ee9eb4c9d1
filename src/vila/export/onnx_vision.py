"""Export `onnx`: vision tower and projector as one ONNX graph, from pixels to embeddings for the LLM."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vila.core.files import write_json
from vila.export.base import ExportOptions, ExportTarget, Readme
from vila.export.source import ExportSource
from vila.model.modeling import build_on_meta
from vila.model.weights import published_names

OPSET = 17
"""Version of the ONNX operators of the graph; supported since onnxruntime 1.12 and TensorRT 8.6."""
GRAPH, PREPROCESSING = "vision.onnx", "vision.json"
_PARTS = ("vision_tower.", "projector.")


def _problems(source: ExportSource, options: ExportOptions) -> list[str]:
    return []


def _write(source: ExportSource, part: Path, options: ExportOptions) -> None:
    side = source.processor.spec.image_size
    export_graph(vision_module(source), side, part / GRAPH)
    facts = {"opset": OPSET, "input": "pixels", "output": "vectors", **source.processor.spec.to_dict()}
    write_json(part / PREPROCESSING, facts)


def _readme(source: ExportSource, options: ExportOptions) -> Readme:
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
        f"{list(spec.std)}; {PREPROCESSING} has these values. Images are made square by `{spec.image_mode}`.",
        f"`vectors` has {spec.tokens_per_image} embeddings for each image, which replace its placeholder tokens.",
    ]
    return Readme(
        [("Run it", run), ("Build a TensorRT engine", engine)],
        [f"ONNX operator set {OPSET}", "onnxruntime 1.32: tested", "TensorRT 8.6 and later: not tested"],
        notes=notes,
    )


def vision_module(source: ExportSource) -> nn.Module:
    """Return tower and projector in float32 and eval mode; the weights of the LLM are not read."""
    model = build_on_meta(source.config)
    here = published_names(model)
    for name in source.tensors:
        if name.startswith(_PARTS):
            path, _, leaf = here.get(name, name).rpartition(".")
            weight = nn.Parameter(source.read(name, torch.float32), requires_grad=False)
            setattr(model.get_submodule(path), leaf, weight)
    _interpolate_positions(model.vision_tower, source.processor.spec.image_size)

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.projector = model.vision_tower, model.projector

        def forward(self, pixels_N3SS: Tensor) -> Tensor:
            vectors: Tensor = model.project(model.vision_features(pixels_N3SS))
            return vectors

    return Vision().eval()


def _interpolate_positions(tower: Any, side: int) -> None:
    """Interpolate the position embeddings of DINOv2 once, before export: runtimes interpolate differently."""
    if tower.config.model_type != "dinov2" or tower.config.image_size == side:
        return
    embeddings = tower.embeddings
    patches = (side // tower.config.patch_size) ** 2
    tokens = embeddings.position_embeddings.new_zeros(1, patches + 1, tower.config.hidden_size)
    interpolated = embeddings.interpolate_pos_encoding(tokens, side, side)
    embeddings.position_embeddings = torch.nn.Parameter(interpolated, requires_grad=False)


def export_graph(module: nn.Module, side: int, path: Path) -> None:
    """Trace `module` for batches of images of `side` pixels, and check the graph."""
    import onnx

    with warnings.catch_warnings(), torch.no_grad():
        # All shapes but the batch are constants, which the tracer warns about.
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


TARGET = ExportTarget(
    "onnx",
    "Vision tower and projector as one ONNX graph, for onnxruntime, TensorRT and others",
    precisions={"f32": "float32 throughout"},
    verification="run in onnxruntime with several batch sizes; outputs within 1e-4 of the model",
    problems=_problems,
    write=_write,
    readme=_readme,
    has_llm=False,
)
