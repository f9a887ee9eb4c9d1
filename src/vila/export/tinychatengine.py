"""TinyChatEngine's directory: raw little-endian arrays without headers, laid out to be copied over its `llm`."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vila.export.base import ExportOptions, Guide
from vila.export.gguf_llm import BYTE, CONTROL, UNKNOWN, vocabulary_of
from vila.export.source import LLM, RUN_BYTES
from vila.kernels.int4 import SYMMETRIC_ZERO, Int4Weight, check_group_size, pack_nibbles
from vila.kernels.packings import find_format

if TYPE_CHECKING:
    from vila.export.source import Source
    from vila.model.config import VilaConfig


NAME = "VILA_7B"
"""The name by which the engine knows the one model whose sizes it has compiled in."""
_LLM = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
_TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_BLOCKS, _EPSILON = 23, 1e-5


@dataclass(frozen=True)
class TinyChatEngineTarget:
    """The LLM in float32 or in one of the INT4 orders, the tower and projector in float32, the vocabulary."""

    name: str = "tinychatengine"
    summary: str = "Raw arrays for TinyChatEngine on x86, Arm and CUDA"
    precisions: Mapping[str, str] = field(
        default_factory=lambda: {
            "qm_x86": "INT4 with a scale for 32 weights, in the order of x86",
            "qm_arm": "INT4 with a scale for 32 weights, in the order of Arm",
            "qm_cuda": "INT4 with a scale for 128 weights, in the order of CUDA",
            "fp32": "float32 throughout",
        }
    )
    takes: frozenset[str] = frozenset({"load_awq"})
    holds_llm: bool = True
    verified: str = "read back by an independent reader, bit by bit; the engine itself was not run"

    def refusals(self, source: Source, options: ExportOptions) -> list[str]:
        """What the engine has not compiled in."""
        from vila.export.base import int4_source_refusals

        reasons = [*llm_refusals(source.config.text_config), *int4_source_refusals(source)]
        reasons += vision_refusals(source.config)
        if not source.processor.span_tokenizer.dummy_prefix:
            reasons.append("its tokenizer is no SentencePiece of LLaMA, the only one that the engine has")
        return reasons

    def write(self, source: Source, part: Path, options: ExportOptions) -> None:
        """Write models/ and, in INT4, INT4/models/."""
        from vila.export import tinychatengine as files

        root = part if options.precision == "fp32" else part / "INT4"
        files.write_llm(source, root / "models" / NAME, options.precision)
        files.write_vision(source, part / "models" / "CLIP_ViT_Large", _BLOCKS)
        files.write_vocabulary(source, part / "models" / "llama_vocab.bin")

    def guide(self, source: Source, options: ExportOptions) -> Guide:
        """How to run it in the engine."""
        kind = "FP32" if options.precision == "fp32" else "INT4"
        commands = [
            ("Put it in place", "cp -r {out}/. TinyChatEngine/llm/"),
            ("Build and ask", f"cd TinyChatEngine/llm\nmake chat -j\n./chat {NAME} {kind} 4 photo.png"),
        ]
        defects = [
            "The engine writes its own prompt, which opens with `This is a chat between a user and an assistant.`, "
            "and takes 0.2 as its temperature: not what the model was trained and evaluated with.",
            "It normalises all three colours of a picture with the mean and deviation of red.",
        ]
        notes = [
            "Its INT4 is a symmetric rounding of its own; of AWQ it takes what a search folds into the weights: "
            "`--load-awq`.",
            "Sizes are compiled in: 32 blocks of 4096, and CLIP-L/336 with the two-layer projector.",
        ]
        if options.precision == "qm_cuda":
            notes.append("No VILA for CUDA was ever published for it; these files follow its own converter.")
        return Guide(commands, ["TinyChatEngine of 2024: not run"], defects, notes)


def llm_refusals(config: Any) -> list[str]:
    """Why the engine could not run this LLM."""
    if config.model_type != "llama":
        return [f"an LLM of type {config.model_type!r} is not compiled in; VILA-7B's llama is"]
    reasons = _differing("the LLM's", config, _LLM)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        reasons.append(f"rope_type {rope['rope_type']!r} has no place in its files; 'default' has")
    if config.rms_norm_eps != _EPSILON:
        reasons.append(f"rms_norm_eps {config.rms_norm_eps:g} is compiled in as {_EPSILON:g}")
    return reasons


def vision_refusals(config: VilaConfig) -> list[str]:
    """Why the engine could not run this tower and projector."""
    tower = config.vision_config
    reasons = []
    if tower.model_type != "clip_vision_model":
        reasons.append(f"a {tower.model_type} tower is not compiled in; CLIP-L/336 is")
    else:
        reasons += _differing("the tower's", tower, _TOWER)
        layer = config.select_layer % (tower.num_hidden_layers + 1)
        if layer != _BLOCKS or config.select_feature != "patch":
            reasons.append(f"it runs {_BLOCKS} blocks and drops the class token: select_layer -2 of 24, 'patch'")
    if config.s2_scales:
        reasons.append("S2 features are not compiled in; a model without s2_scales can be written")
    if config.projector_type != "mlp2x_gelu":
        reasons.append(
            f"the projector {config.projector_type!r} is not compiled in: it always runs two Linears with a GELU "
            "between them; 'mlp2x_gelu' can be written"
        )
    elif config.text_config.hidden_size != _LLM["hidden_size"]:
        reasons.append(
            f"a projector to {config.text_config.hidden_size} channels is not compiled in, 13B's 5120 included: its "
            f"width is {_LLM['hidden_size']}"
        )
    return reasons


def _differing(whose: str, config: Any, wanted: Mapping[str, int]) -> list[str]:
    found = {key: getattr(config, key) for key in wanted}
    return [
        f"{whose} {key} {found[key]} is compiled in as {wanted[key]}" for key in wanted if found[key] != wanted[key]
    ]


TARGET = TinyChatEngineTarget()


# --- tinychatengine_files
# The arrays of a TinyChatEngine directory: which file holds what, and how a Linear is rounded for it.


# O outputs  I inputs  G inputs of a group

_GROUPS = {"qm_x86": 32, "qm_arm": 32, "qm_cuda": 128}
_WORDS = 32000
_HEADER_NUMBERS = 9
_TINYCHATENGINE_FILES_TOWER = "vision_tower."
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
        _write_floats(source, _TINYCHATENGINE_FILES_TOWER + name, folder / place)
    kernel = source.read(f"{_TINYCHATENGINE_FILES_TOWER}embeddings.patch_embedding.weight", torch.float32)
    # The engine convolves pixels that lie [height, width, colour].
    _write(kernel.permute(0, 2, 3, 1), folder / "embeddings" / "patch_embedding" / "weight.bin")
    alpha = torch.tensor([1 / math.sqrt(config.hidden_size // config.num_attention_heads)])
    for index in range(blocks):
        layer = folder / "encoder" / f"layer{index}"
        begin = f"{_TINYCHATENGINE_FILES_TOWER}encoder.layers.{index}."
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
    check_group_size(rows_OI.shape[1], group_size)
    groups = rows_OI.float().unflatten(-1, (-1, group_size))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = extreme / -8
    inverse = torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)
    codes = (groups * inverse + 8.5).clamp_(0, 15).to(torch.uint8)
    zeros = torch.full_like(scales.squeeze(-1), SYMMETRIC_ZERO, dtype=torch.uint8)
    return Int4Weight(pack_nibbles(codes.flatten(-2)), scales.squeeze(-1), zeros, group_size)


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
