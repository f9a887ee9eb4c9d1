"""GGUF files for llama.cpp: the language model, and beside it the vision part as `mmproj`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from torch import Tensor

from vila.core.errors import LayoutError
from vila.export.base import ExportOptions, Guide
from vila.kernels.int4 import Int4Weight, dequantize, pack_nibbles, unpack_nibbles
from vila.kernels.packings import half_scales
from vila.model.int4_weights import read_packed

if TYPE_CHECKING:
    from vila.export.source import Source


MODEL, MMPROJ = "model-{precision}.gguf", "mmproj-f16.gguf"
PRECISIONS = {
    "f16": "float16 matrices, float32 vectors; also what llama.cpp's own quantizer reads",
    "q8_0": "8 bits and a half for 32 weights",
    "q4_0": "4 bits and a half for 32 weights, symmetric; embeddings and head in q8_0",
    "q4_1": "4 bits and two halves for 32 weights; embeddings and head in q8_0",
}
RUN_WITH = "llama-cpp-python 0.3.36"


@dataclass(frozen=True)
class GgufTarget:
    """`gguf` with both files, or `gguf-text` with the language model alone."""

    name: str
    summary: str
    has_vision: bool
    verified: str
    takes: frozenset[str] = frozenset({"load_awq"})
    holds_llm: bool = True

    @property
    def precisions(self) -> dict[str, str]:
        """Types of the language model's matrices; the vision part is always float16."""
        return PRECISIONS

    def refusals(self, source: Source, options: ExportOptions) -> list[str]:
        """What llama.cpp has no graph, name or tokenizer for."""
        from vila.export.gguf_llm import llm_refusals, tokenizer_refusals
        from vila.export.gguf_mmproj import mmproj_refusals

        reasons = [
            *llm_refusals(source.config.text_config),
            *int4_refusals(source, options.precision),
            *tokenizer_refusals(source.processor.tokenizer),
        ]
        if self.has_vision and (unseen := mmproj_refusals(source.config)):
            reasons += [f"{reason} (the language model alone: --format gguf-text)" for reason in unseen]
        return reasons

    def write(self, source: Source, part: Path, options: ExportOptions) -> None:
        """Write model-PRECISION.gguf and, with a vision part, mmproj-f16.gguf."""

        from vila.export.gguf_llm import describe_llm, describe_tokenizer, llm_tensors, vocabulary_of
        from vila.export.gguf_mmproj import describe_mmproj, mmproj_tensors

        config = source.config
        vocabulary = vocabulary_of(source.processor, config.text_config.vocab_size)

        def describe(writer: GGUFWriter) -> None:
            writer.add_name(source.folder.resolve().name)
            describe_llm(writer, config.text_config, options.precision)
            describe_tokenizer(writer, vocabulary)

        path = part / MODEL.format(precision=options.precision)
        write_gguf(path, source.family.gguf, describe, llm_tensors(source, options.precision))
        if self.has_vision:
            write_gguf(part / MMPROJ, "clip", lambda writer: describe_mmproj(writer, config), mmproj_tensors(source))

    def guide(self, source: Source, options: ExportOptions) -> Guide:
        """How to run it in llama.cpp."""
        model = f"{{out}}/{MODEL.format(precision=options.precision)}"
        eyes = f" --mmproj {{out}}/{MMPROJ}" if self.has_vision else ""
        ask = (
            f'llama-mtmd-cli -m {model}{eyes} --jinja --image photo.jpg -p "What is in the picture?" --temp 0'
            if self.has_vision
            else f'llama-cli -m {model} --jinja -p "What is a visual language model?" --temp 0'
        )
        commands = [("Ask", ask), ("Serve the OpenAI protocol", f"llama-server -m {model}{eyes} --jinja")]
        if options.precision == "f16":
            smaller = f"llama-quantize {model} {{out}}/model-q4_k_m.gguf Q4_K_M"
            commands.append(("Round it further with llama.cpp's own quantizer", smaller))
        return Guide(commands, [f"{RUN_WITH}: loaded and run"], self._defects(source), self._notes(source))

    def _defects(self, source: Source) -> list[str]:
        defects = []
        if source.processor.span_tokenizer.dummy_prefix:
            defects.append(
                "llama.cpp puts a space before text that follows a special token; a later turn, after `</s>`, is cut "
                "into other tokens than in training."
            )
        if not self.has_vision:
            return defects
        if source.config.vision_config.model_type == "clip_vision_model":
            defects.append(
                "Since May 2025 llama.cpp appends CLIP's class token to the patches but counts positions as if it came "
                "first: each patch has its neighbour's position, the first one is lost and the class token reaches "
                "the LLM (github.com/ggml-org/llama.cpp, issue 25814). In llama-cpp-python 0.3.36 the vectors of a "
                "random model had a mean cosine of 0.59 with the right ones. No file can give the first patch back; a "
                "SigLIP tower, which has no class token, is not touched (0.9999)."
            )
        defects.append(
            "It runs one block of the tower too few unless told otherwise (issue 25817): `clip.vision.feature_layer` "
            "in the mmproj file tells it (without it 0.3.36 gave a cosine of 0.89, with it 0.9999)."
        )
        if source.config.projector_type != "mlp2x_gelu":
            defects.append(
                "It puts a GELU after the first projector matrix even where there is no second: the projector is "
                "written as [W; -W] and [I, -I], for gelu(x) - gelu(-x) = x."
            )
        return defects

    def _notes(self, source: Source) -> list[str]:
        from vila.export.gguf_llm import context_length
        from vila.export.gguf_mmproj import preprocessing_notes

        config = source.config.text_config
        notes = preprocessing_notes(source.config) if self.has_vision else []
        if context_length(config) < config.max_position_embeddings:
            notes.append(f"The context ends at {context_length(config)}, the sliding window, which llama.cpp lacks.")
        return notes


TARGET = GgufTarget(
    "gguf",
    "GGUF files for llama.cpp: the language model, and the tower and projector as mmproj",
    has_vision=True,
    verified=(
        "read back by an independent reader, bit by bit; loaded by llama-cpp-python, F16 with the engine's own greedy "
        "tokens; a CLIP and a SigLIP model run a picture there"
    ),
)
TEXT_TARGET = GgufTarget(
    "gguf-text",
    "The language model alone as a GGUF file for llama.cpp",
    has_vision=False,
    verified="read back by an independent reader, bit by bit; loaded by llama-cpp-python, F16 with our greedy tokens",
)


# --- gguf_file
# Writing GGUF files tensor by tensor and run by run; the `gguf` package writes the header and rounds to blocks.


Kind = GGMLQuantizationType
Describe = Callable[[GGUFWriter], None]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor on its way into a file.

    runs: its rows from the first to the last, in float32, or as uint8 where they are bytes of the kind already.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    runs: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the file."""
        values, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // values * size

    def tofile(self, stream: BinaryIO) -> None:
        """Write all values; the one thing besides `nbytes` that the package asks of an array.

        Raises LayoutError when a value does not fit the kind.
        """
        written = 0
        for run in self.runs():
            data = run.numpy() if run.dtype == torch.uint8 else encode(run, self.kind, self.name)
            stream.write(data.data)
            written += data.nbytes
        if written != self.nbytes:
            raise RuntimeError(f"{self.name}: {written} bytes were made of it, {self.nbytes} were declared")


def encode(run: Tensor, kind: Kind, name: str) -> np.ndarray[Any, Any]:
    """Rows in float32 as the bytes of a kind. Raises LayoutError when a value is not finite in it."""
    if kind == Kind.F32:
        return np.ascontiguousarray(run.float().numpy())
    half = run.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise LayoutError(f"{name}: has values that do not fit float16, which this file stores; repair the model")
    if kind == Kind.F16:
        return np.ascontiguousarray(half.numpy())
    blocks: np.ndarray[Any, Any] = quantize(np.ascontiguousarray(run.float().numpy()), kind)
    return np.ascontiguousarray(blocks)


def fitting(kind: Kind, shape: Sequence[int]) -> Kind:
    """`kind` for a matrix whose rows are whole blocks of it, F16 for another matrix, F32 for vectors."""
    if len(shape) < 2:
        return Kind.F32
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else Kind.F16


def write_gguf(path: Path, architecture: str, describe: Describe, tensors: Sequence[GgufTensor]) -> None:
    """Write one file. `describe` adds the metadata; no more than a run of rows is ever in memory."""
    writer = GGUFWriter(path, architecture)
    try:
        describe(writer)
        writer.add_quantization_version(2)
        for tensor in tensors:
            # With an explicit kind the package takes the shape as that of the values.
            half = np.dtype(np.float16)
            writer.add_tensor_info(tensor.name, tensor.shape, half, tensor.nbytes, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor)  # type: ignore[arg-type]  # it only asks for nbytes and tofile
    finally:
        writer.close()


# --- gguf_int4
# A model that is in INT4 already, as GGUF: its own codes in Q4_1, or its values in F16; nothing is rounded again.


# O outputs  I inputs

BLOCK = 32
_KEEPS = ("f16", "q4_1")


def int4_refusals(source: Source, precision: str) -> list[str]:
    """Why the INT4 weights of a model cannot be kept in a precision; empty for a model without any."""
    held = source.checkpoint.int4
    if not held:
        return []
    if precision not in _KEEPS:
        return [f"the model is in INT4 and would be rounded again; {' and '.join(_KEEPS)} keep its values"]
    sizes = sorted({weight.group_size for weight in held.values() if weight.group_size % BLOCK})
    if precision == "q4_1" and sizes:
        return [f"groups of {sizes[0]} are no whole blocks of {BLOCK}; f16 keeps the values"]
    return []


def int4_runs(source: Source, name: str, kind: Kind) -> Iterator[Tensor]:
    """A Linear in INT4, whole: float32 values [O, I], or for Q4_1 the bytes of its blocks, uint8 [O, I / 32 * 20]."""
    for _, weight in read_packed({name: source.checkpoint.int4[name]}):
        yield q4_1_blocks(weight) if kind == Kind.Q4_1 else dequantize(weight)


def q4_1_blocks(weight: Int4Weight) -> Tensor:
    """Blocks of 32 with the weight's own codes: half scale, half -zero * scale, sixteen bytes; uint8 [O, I / 32 * 20].

    Byte j holds the inputs j (low) and j + 16. Rounding -zero * scale to a half moves values by 0.4 % of a step at
    most. Raises LayoutError for a scale that does not fit float16.
    """
    scales = half_scales(weight.scales)
    least = (-weight.zeros.float() * scales.float()).to(torch.float16)
    heads = torch.stack([scales, least], dim=-1).repeat_interleave(weight.group_size // BLOCK, dim=1)
    halves = unpack_nibbles(weight.codes).unflatten(-1, (-1, 2, BLOCK // 2))
    codes = pack_nibbles(halves.transpose(-1, -2).flatten(-2))
    return torch.cat([heads.contiguous().view(torch.uint8), codes], dim=-1).flatten(1)
