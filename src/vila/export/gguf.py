"""Exports `gguf` and `gguf-text`: GGUF files for llama.cpp, the LLM and optionally tower and projector as `mmproj`."""

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
from vila.export.base import ExportOptions, Readme
from vila.kernels.int4 import Int4Weight, dequantize, pack_nibbles, unpack_nibbles
from vila.kernels.packings import half_scales
from vila.model.int4_weights import read_packed

if TYPE_CHECKING:
    from vila.export.source import ExportSource


MODEL, MMPROJ = "model-{precision}.gguf", "mmproj-f16.gguf"
PRECISIONS = {
    "f16": "float16 matrices, float32 vectors; also the input of llama-quantize",
    "q8_0": "8 bits, a float16 scale for 32 weights",
    "q4_0": "4 bits, a float16 scale for 32 weights; embeddings and LM head in q8_0",
    "q4_1": "4 bits, a float16 scale and minimum for 32 weights; embeddings and LM head in q8_0",
}
RUN_WITH = "llama-cpp-python 0.3.36"


@dataclass(frozen=True)
class GgufTarget:
    """`gguf` with both files, or `gguf-text` with the LLM alone."""

    name: str
    summary: str
    has_vision: bool
    verification: str
    options: frozenset[str] = frozenset({"load_awq"})
    has_llm: bool = True

    @property
    def precisions(self) -> dict[str, str]:
        """Types of the LLM's matrices; tower and projector are always float16."""
        return PRECISIONS

    def problems(self, source: ExportSource, options: ExportOptions) -> list[str]:
        """Return the reasons why llama.cpp does not support LLM, tokenizer, tower or projector."""
        from vila.export.gguf_llm import llm_problems, tokenizer_problems
        from vila.export.gguf_mmproj import mmproj_problems

        reasons = [
            *llm_problems(source.config.text_config),
            *kept_int4_problems(source, options.precision),
            *tokenizer_problems(source.processor.tokenizer),
        ]
        if self.has_vision:
            reasons += [
                f"{reason} (for the LLM alone: --format gguf-text)" for reason in mmproj_problems(source.config)
            ]
        return reasons

    def write(self, source: ExportSource, part: Path, options: ExportOptions) -> None:
        """Write model-PRECISION.gguf and, for `gguf`, mmproj-f16.gguf."""
        from vila.export.gguf_llm import add_llm_metadata, add_tokenizer_metadata, build_vocabulary, llm_tensors
        from vila.export.gguf_mmproj import add_mmproj_metadata, mmproj_tensors

        config = source.config
        vocabulary = build_vocabulary(source.processor, config.text_config.vocab_size)

        def describe(writer: GGUFWriter) -> None:
            writer.add_name(source.folder.resolve().name)
            add_llm_metadata(writer, config.text_config, options.precision)
            add_tokenizer_metadata(writer, vocabulary)

        path = part / MODEL.format(precision=options.precision)
        write_gguf(path, source.family.gguf, describe, llm_tensors(source, options.precision))
        if self.has_vision:
            write_gguf(
                part / MMPROJ, "clip", lambda writer: add_mmproj_metadata(writer, config), mmproj_tensors(source)
            )

    def readme(self, source: ExportSource, options: ExportOptions) -> Readme:
        """Return the commands for llama.cpp."""
        model = f"{{out}}/{MODEL.format(precision=options.precision)}"
        mmproj = f" --mmproj {{out}}/{MMPROJ}" if self.has_vision else ""
        ask = (
            f'llama-mtmd-cli -m {model}{mmproj} --jinja --image photo.jpg -p "What is in the image?" --temp 0'
            if self.has_vision
            else f'llama-cli -m {model} --jinja -p "What is a visual language model?" --temp 0'
        )
        commands = [("Run a prompt", ask), ("Serve the OpenAI API", f"llama-server -m {model}{mmproj} --jinja")]
        if options.precision == "f16":
            smaller = f"llama-quantize {model} {{out}}/model-q4_k_m.gguf Q4_K_M"
            commands.append(("Quantize it further with llama.cpp", smaller))
        return Readme(commands, [f"{RUN_WITH}: tested"], self._defects(source), self._notes(source))

    def _defects(self, source: ExportSource) -> list[str]:
        defects = []
        if source.processor.span_tokenizer.dummy_prefix:
            defects.append(
                "llama.cpp puts a space before text after a special token, so the turns after the first `</s>` are "
                "tokenized differently from training."
            )
        if not self.has_vision:
            return defects
        if source.config.vision_config.model_type == "clip_vision_model":
            defects.append(
                "CLIP towers are computed wrongly: since May 2025 llama.cpp appends the class token to the patches but "
                "numbers positions as if it came first, so each patch gets its neighbour's position, the first patch "
                "is lost and the class token reaches the LLM (github.com/ggml-org/llama.cpp, issue 25814). In "
                "llama-cpp-python 0.3.36 the image embeddings of a random model had a mean cosine of 0.59 with the "
                "correct ones. The files cannot work around this. SigLIP towers have no class token and are correct "
                "(0.9999)."
            )
        defects.append(
            "llama.cpp runs one block of the tower too few by default (issue 25817); `clip.vision.feature_layer` in "
            "the mmproj file corrects it (0.3.36: cosine 0.89 without, 0.9999 with it)."
        )
        if source.config.projector_type != "mlp2x_gelu":
            defects.append(
                "llama.cpp applies a GELU after the first projector matrix even if there is no second one, so the "
                "projector is written as [W; -W] and [I, -I]: gelu(x) - gelu(-x) = x."
            )
        return defects

    def _notes(self, source: ExportSource) -> list[str]:
        from vila.export.gguf_llm import context_length
        from vila.export.gguf_mmproj import preprocessing_notes

        config = source.config.text_config
        notes = preprocessing_notes(source.config) if self.has_vision else []
        if context_length(config) < config.max_position_embeddings:
            notes.append(
                f"Context length {context_length(config)}: llama.cpp lacks sliding window attention for this model."
            )
        return notes


TARGET = GgufTarget(
    "gguf",
    "GGUF files for llama.cpp: the LLM, and vision tower and projector as mmproj",
    has_vision=True,
    verification=(
        "bit-exact in an independent reader; run in llama-cpp-python: f16 gives the same greedy tokens as this engine, "
        "and CLIP and SigLIP models run with an image"
    ),
)
TEXT_TARGET = GgufTarget(
    "gguf-text",
    "The LLM alone as a GGUF file for llama.cpp",
    has_vision=False,
    verification="bit-exact in an independent reader; run in llama-cpp-python: f16 gives the same greedy tokens",
)


TensorType = GGMLQuantizationType
Describe = Callable[[GGUFWriter], None]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to be written.

    chunks: returns its rows in chunks, float32, or uint8 for data that is encoded as `type` already.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    chunks: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        values, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // values * size

    def tofile(self, stream: BinaryIO) -> None:
        """Write all values; GGUFWriter uses only `nbytes` and `tofile` of an array.

        Raises LayoutError for a value that is not finite in float16.
        """
        written = 0
        for chunk in self.chunks():
            data = chunk.numpy() if chunk.dtype == torch.uint8 else encode(chunk, self.type, self.name)
            stream.write(data.data)
            written += data.nbytes
        if written != self.nbytes:
            raise RuntimeError(f"{self.name}: wrote {written} bytes, declared {self.nbytes}")


def encode(rows: Tensor, type_: TensorType, name: str) -> np.ndarray[Any, Any]:
    """Encode float32 rows as a tensor type. Raises LayoutError for a value that is not finite in float16."""
    if type_ == TensorType.F32:
        return np.ascontiguousarray(rows.float().numpy())
    half = rows.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise LayoutError("has values that are not finite in float16", field=name, hint="repair the model")
    if type_ == TensorType.F16:
        return np.ascontiguousarray(half.numpy())
    blocks: np.ndarray[Any, Any] = quantize(np.ascontiguousarray(rows.float().numpy()), type_)
    return np.ascontiguousarray(blocks)


def choose_type(wanted: TensorType, shape: Sequence[int]) -> TensorType:
    """Return `wanted` for matrices whose rows are whole blocks of it, F16 for other matrices, F32 for vectors."""
    if len(shape) < 2:
        return TensorType.F32
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else TensorType.F16


def write_gguf(path: Path, architecture: str, describe: Describe, tensors: Sequence[GgufTensor]) -> None:
    """Write a file, holding one chunk of rows in memory. describe: adds the metadata."""
    writer = GGUFWriter(path, architecture)
    try:
        describe(writer)
        writer.add_quantization_version(2)
        for tensor in tensors:
            # With an explicit raw_dtype, GGUFWriter takes the shape as that of the values.
            half = np.dtype(np.float16)
            writer.add_tensor_info(tensor.name, tensor.shape, half, tensor.nbytes, raw_dtype=tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor)  # type: ignore[arg-type]  # duck typing: nbytes and tofile
    finally:
        writer.close()


# INT4 models: their codes are copied to Q4_1, or their values written as F16, without another quantization.

# O outputs  I inputs

BLOCK = 32
_KEEPS = ("f16", "q4_1")


def kept_int4_problems(source: ExportSource, precision: str) -> list[str]:
    """Return why the INT4 weights of a model cannot be stored in a precision without quantizing them again."""
    held = source.checkpoint.int4
    if not held:
        return []
    if precision not in _KEEPS:
        return [f"the INT4 model would be quantized again; use {' or '.join(_KEEPS)}"]
    sizes = sorted({weight.group_size for weight in held.values() if weight.group_size % BLOCK})
    if precision == "q4_1" and sizes:
        return [f"group size {sizes[0]} is not a multiple of {BLOCK}; use f16"]
    return []


def int4_chunks(source: ExportSource, name: str, type_: TensorType) -> Iterator[Tensor]:
    """Yield an INT4 Linear in one chunk: float32 [O, I], or encoded as Q4_1, uint8 [O, I / 32 * 20]."""
    for _, weight in read_packed({name: source.checkpoint.int4[name]}):
        yield q4_1_blocks(weight) if type_ == TensorType.Q4_1 else dequantize(weight)


def q4_1_blocks(weight: Int4Weight) -> Tensor:
    """Encode INT4 codes as Q4_1 blocks of 32 weights, uint8 [O, I / 32 * 20].

    A block is a float16 scale, a float16 minimum -zero * scale, and 16 bytes; byte j has inputs j (low) and j + 16.
    Rounding the minimum to float16 changes values by at most 0.4 % of a quantization step.
    Raises LayoutError for a scale that is not finite in float16.
    """
    scales = half_scales(weight.scales)
    minimum = (-weight.zeros.float() * scales.float()).to(torch.float16)
    heads = torch.stack([scales, minimum], dim=-1).repeat_interleave(weight.group_size // BLOCK, dim=1)
    halves = unpack_nibbles(weight.codes).unflatten(-1, (-1, 2, BLOCK // 2))
    codes = pack_nibbles(halves.transpose(-1, -2).flatten(-2))
    return torch.cat([heads.contiguous().view(torch.uint8), codes], dim=-1).flatten(1)
