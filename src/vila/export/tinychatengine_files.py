"""The arrays of a TinyChatEngine directory: which file holds what, and how a Linear is rounded for it."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vila.export.gguf_tokenizer import BYTE, CONTROL, UNKNOWN, vocabulary_of
from vila.export.source import LLM, RUN_BYTES
from vila.kernels.int4_formats import find_format
from vila.kernels.int4_layout import SYMMETRIC_ZERO, Int4Weight, check_group, pack

if TYPE_CHECKING:
    from vila.export.source import Source

# O outputs  I inputs  G inputs of a group

_GROUPS = {"qm_x86": 32, "qm_arm": 32, "qm_cuda": 128}
_WORDS = 32000
_HEADER_NUMBERS = 9
_TOWER = "vision_tower."
_OUTSIDE = {
    "embeddings.class_embedding": "embeddings/class_embedding/weight.bin",
    "embeddings.position_embedding.weight": "embeddings/position_embedding/weight.bin",
    "pre_layrnorm.weight": "pre_layernorm/weight.bin",
    "pre_layrnorm.bias": "pre_layernorm/bias.bin",
}


def write_llm(source: Source, folder: Path, precision: str) -> None:
    """The LLM's arrays: Linears and the head in float32 or INT4, everything else in float32.

    In CUDA's order the rotation's tables and the attention's scale are float16 in files of their own names.
    """
    config = source.config.text_config
    head = f"{LLM}model.embed_tokens.weight" if source.is_tied else f"{LLM}lm_head.weight"
    if precision == "fp32":
        _write_floats(source, head, folder / "lm_head.bin")
    else:
        _write_int4(source, head, folder / "lm_head", precision)
    decoder = folder / "decoder"
    _write_floats(source, f"{LLM}model.embed_tokens.weight", decoder / "embed_tokens" / "weight.bin")
    _write_floats(source, f"{LLM}model.norm.weight", decoder / "norm" / "weight.bin")
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    tables = rotary_tables(config.max_position_embeddings, width, theta)
    for index in range(config.num_hidden_layers):
        layer = decoder / f"layer{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            _write_floats(source, f"{LLM}model.layers.{index}.{norm}.weight", layer / norm / "weight.bin")
        _write_constants(layer / "self_attn", tables, 1 / math.sqrt(width), half=precision == "qm_cuda")
    for name in source.block_linears():
        _, _, index_, inside = name.removeprefix(LLM).split(".", 3)
        place = decoder / f"layer{index_}" / inside.removeprefix("mlp.").replace(".", "/")
        if precision == "fp32":
            _write_floats(source, f"{name}.weight", place / "weight.bin")
        else:
            _write_int4(source, f"{name}.weight", place, precision)


def write_vision(source: Source, folder: Path, blocks: int) -> None:
    """The first `blocks` blocks of a CLIP tower, the projector, and what pixels are normalised with."""
    config = source.config.vision_config
    for name, place in _OUTSIDE.items():
        _write_floats(source, _TOWER + name, folder / place)
    kernel = source.read(f"{_TOWER}embeddings.patch_embedding.weight", torch.float32)
    # The engine convolves pixels that lie [height, width, colour].
    _write(kernel.permute(0, 2, 3, 1), folder / "embeddings" / "patch_embedding" / "weight.bin")
    alpha = torch.tensor([1 / math.sqrt(config.hidden_size // config.num_attention_heads)])
    for index in range(blocks):
        layer = folder / "encoder" / f"layer{index}"
        begin = f"{_TOWER}encoder.layers.{index}."
        for name in [name for name in source.pieces if name.startswith(begin)]:
            inside, leaf = name.removeprefix(begin).rsplit(".", 1)
            place = inside.replace("mlp.", "mlp_").replace(".", "/")
            _write_floats(source, name, layer / place / f"{leaf}.bin")
        _write(alpha, layer / "self_attn" / "qk_bmm" / "alpha.bin")
    for index in (0, 2):
        for leaf in ("weight", "bias"):
            _write_floats(source, f"projector.{index}.{leaf}", folder / f"mm_projector_{index}" / f"{leaf}.bin")
    spec = source.processor.spec
    for key, values in (("image_mean", spec.mean), ("image_std", spec.std)):
        _write(torch.tensor(values), folder / "image_processor" / f"{key}.bin")


def write_vocabulary(source: Source, path: Path) -> None:
    """Nine numbers that the engine skips, then length, bytes and score of each of its 32000 words.

    Words are bytes as they are printed: a space for SentencePiece's mark, one byte for a byte token, nothing for a
    special one.
    """
    vocabulary = vocabulary_of(source.processor, source.config.text_config.vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(bytes(4 * _HEADER_NUMBERS))
        for token, kind, score in list(zip(vocabulary.tokens, vocabulary.kinds, vocabulary.scores, strict=True))[
            :_WORDS
        ]:
            word = _printed(token, kind)
            stream.write(struct.pack("<I", len(word)) + word + struct.pack("<f", score))


def round_engine(rows_OI: Tensor, group_size: int) -> Int4Weight:
    """The engine's own rounding: scale = the value of greatest magnitude / -8, code = floor(w / scale + 8.5), 0..15.

    Scales are float32 and may be negative. Raises LayoutError when groups do not fill the inputs.
    """
    check_group(rows_OI.shape[1], group_size)
    groups = rows_OI.float().unflatten(-1, (-1, group_size))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = extreme / -8
    inverse = torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)
    codes = (groups * inverse + 8.5).clamp_(0, 15).to(torch.uint8)
    zeros = torch.full_like(scales.squeeze(-1), SYMMETRIC_ZERO, dtype=torch.uint8)
    return Int4Weight(pack(codes.flatten(-2)), scales.squeeze(-1), zeros, group_size)


def rotary_tables(positions: int, width: int, theta: float) -> Mapping[str, Tensor]:
    """`cos_cached` and `sin_cached` [positions, width]; both halves of a head are alike, as transformers kept them."""
    frequencies = 1 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies).repeat(1, 2)
    return {"cos_cached": angles.cos(), "sin_cached": angles.sin()}


def _write_constants(folder: Path, tables: Mapping[str, Tensor], alpha: float, *, half: bool) -> None:
    ending, kind = ("_half.bin", torch.float16) if half else (".bin", torch.float32)
    for name, table in tables.items():
        _write(table.to(kind), folder / "rotary_emb" / f"{name}{ending}")
    _write(torch.tensor([alpha], dtype=kind), folder / "qk_bmm" / f"alpha{ending}")


def _write_floats(source: Source, name: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        for run in source.rows(name, torch.float32):
            stream.write(run.contiguous().numpy().data)


def _write_int4(source: Source, name: str, folder: Path, precision: str) -> None:
    folder.mkdir(parents=True)
    packer = find_format(precision)
    with ExitStack() as stack:
        streams = {part: stack.enter_context((folder / f"{part}.bin").open("wb")) for part in packer.tensors}
        for number, run in enumerate(source.rows(name, torch.float32, RUN_BYTES // 4)):
            for part, tensor in packer.pack(round_engine(run, _GROUPS[precision])).items():
                # One zero for all of a Linear, in the orders that have no words of them.
                if number == 0 or part != "zero_point_int4" or tensor.numel() > 1:
                    streams[part].write(tensor.contiguous().numpy().data)


def _write(values: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(values.contiguous().numpy().tobytes())


def _printed(token: str, kind: int) -> bytes:
    if kind == UNKNOWN:
        return " \u2047 ".encode()
    if kind == CONTROL:
        return b""
    return bytes([int(token[3:-1], 16)]) if kind == BYTE else token.replace("\u2581", " ").encode()
