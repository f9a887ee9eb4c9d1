"""Export `tinychatengine`: raw little-endian arrays in the directory layout of TinyChatEngine's `llm`."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila.export.base import ExportOptions, ExportTarget, Readme, full_precision_problems
from vila.export.gguf_llm import BYTE, CONTROL, UNKNOWN, build_vocabulary
from vila.export.source import CHUNK_BYTES, LLM, ExportSource
from vila.families import head_width, rope_parameters
from vila.kernels.group_size import check_group_size
from vila.kernels.int4 import SYMMETRIC_ZERO, Int4Weight, pack_nibbles
from vila.kernels.packings import Packed, pack_tinychatengine_blocks, pack_tinychatengine_cuda
from vila.model.config import VilaConfig

NAME = "VILA_7B"
"""Name of the only supported model: TinyChatEngine has its sizes compiled in."""
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


def _problems(source: ExportSource, options: ExportOptions) -> list[str]:
    reasons = [*llm_problems(source.config.text_config), *full_precision_problems(source)]
    reasons += vision_problems(source.config)
    if not source.processor.span_tokenizer.dummy_prefix:
        reasons.append("the tokenizer is not supported; supported: SentencePiece of LLaMA")
    return reasons


def _write(source: ExportSource, part: Path, options: ExportOptions) -> None:
    root = part if options.precision == "fp32" else part / "INT4"
    write_llm(source, root / "models" / NAME, options.precision)
    write_vision(source, part / "models" / "CLIP_ViT_Large", _BLOCKS)
    write_vocabulary(source, part / "models" / "llama_vocab.bin")


def _readme(source: ExportSource, options: ExportOptions) -> Readme:
    kind = "FP32" if options.precision == "fp32" else "INT4"
    commands = [
        ("Copy it into TinyChatEngine", "cp -r {out}/. TinyChatEngine/llm/"),
        ("Build and run", f"cd TinyChatEngine/llm\nmake chat -j\n./chat {NAME} {kind} 4 photo.png"),
    ]
    defects = [
        "TinyChatEngine uses its own prompt, which begins with `This is a chat between a user and an assistant.`, "
        "and temperature 0.2; the model was trained and evaluated with other settings.",
        "It normalises all three colour channels with the mean and standard deviation of red.",
    ]
    notes = [
        "INT4 is TinyChatEngine's own symmetric quantization; `--load-awq` folds AWQ scales into the weights.",
        "TinyChatEngine has the sizes compiled in: 32 blocks of width 4096, CLIP-L/336, a two-layer projector.",
    ]
    if options.precision == "qm_cuda":
        notes.append("No VILA for CUDA was published for TinyChatEngine; these files follow its converter.")
    return Readme(commands, ["TinyChatEngine of 2024: not tested"], defects, notes)


def llm_problems(config: Any) -> list[str]:
    """Return why TinyChatEngine does not support this LLM."""
    if config.model_type != "llama":
        return [f"LLM type {config.model_type!r} is not supported; supported: llama, with the sizes of VILA-7B"]
    reasons = _different_sizes("LLM", config, _LLM)
    rope = rope_parameters(config)
    if rope.get("rope_type", "default") != "default":
        reasons.append(f"rope_type {rope['rope_type']!r} is not supported; supported: 'default'")
    if config.rms_norm_eps != _EPSILON:
        reasons.append(f"rms_norm_eps {config.rms_norm_eps:g} is not supported; supported: {_EPSILON:g}")
    return reasons


def vision_problems(config: VilaConfig) -> list[str]:
    """Return why TinyChatEngine does not support this tower and projector."""
    tower = config.vision_config
    reasons = []
    if tower.model_type != "clip_vision_model":
        reasons.append(f"vision tower {tower.model_type} is not supported; supported: CLIP-L/336")
    else:
        reasons += _different_sizes("tower", tower, _TOWER)
        layer = config.select_layer % (tower.num_hidden_layers + 1)
        if layer != _BLOCKS or config.select_feature != "patch":
            reasons.append(f"supported select_layer and select_feature: {_BLOCKS} blocks (-2 of 24) and 'patch'")
    if config.s2_scales:
        reasons.append("S2 features (s2_scales) are not supported")
    if config.projector_type != "mlp2x_gelu":
        reasons.append(f"projector {config.projector_type!r} is not supported; supported: 'mlp2x_gelu'")
    elif config.text_config.hidden_size != _LLM["hidden_size"]:
        reasons.append(
            f"projector width {config.text_config.hidden_size} is not supported (13B has 5120); supported: "
            f"{_LLM['hidden_size']}"
        )
    return reasons


def _different_sizes(name: str, config: Any, supported: Mapping[str, int]) -> list[str]:
    return [
        f"{name} {key} {found} is not supported; supported: {value}"
        for key, value in supported.items()
        if (found := getattr(config, key)) != value
    ]


TARGET = ExportTarget(
    "tinychatengine",
    "Raw arrays for TinyChatEngine on x86, Arm and CUDA",
    precisions={
        "qm_x86": "INT4 with group size 32, packed for x86",
        "qm_arm": "INT4 with group size 32, packed for Arm",
        "qm_cuda": "INT4 with group size 128, packed for CUDA",
        "fp32": "float32",
    },
    verification="bit-exact in an independent reader; not tested in TinyChatEngine",
    problems=_problems,
    write=_write,
    readme=_readme,
    options=frozenset({"load_awq"}),
)


# O outputs  I inputs  G inputs of a group

_PACKINGS: Mapping[str, tuple[int, Callable[[Int4Weight], Packed]]] = {
    "qm_x86": (32, partial(pack_tinychatengine_blocks, run=64)),
    "qm_arm": (32, partial(pack_tinychatengine_blocks, run=32)),
    "qm_cuda": (128, pack_tinychatengine_cuda),
}
"""Group size and packer."""
_WORDS = 32000
_HEADER_NUMBERS = 9
_TOWER_PREFIX = "vision_tower."
_OUTSIDE = {
    "embeddings.class_embedding": "embeddings/class_embedding/weight.bin",
    "embeddings.position_embedding.weight": "embeddings/position_embedding/weight.bin",
    "pre_layrnorm.weight": "pre_layernorm/weight.bin",
    "pre_layrnorm.bias": "pre_layernorm/bias.bin",
}


def write_llm(source: ExportSource, folder: Path, precision: str) -> None:
    """Write the arrays of the LLM: Linears and LM head in float32 or INT4, everything else in float32.

    For CUDA, rotary tables and attention scales are float16 in files with the suffix `_half`.
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
    width = head_width(config)
    tables = rotary_tables(config.max_position_embeddings, width, rope_parameters(config).get("rope_theta", 10000.0))
    suffix, dtype = ("_half.bin", torch.float16) if precision == "qm_cuda" else (".bin", torch.float32)
    constants = {f"rotary_emb/{name}": table.to(dtype) for name, table in tables.items()}
    constants["qk_bmm/alpha"] = torch.tensor([1 / math.sqrt(width)], dtype=dtype)
    for index in range(config.num_hidden_layers):
        layer = decoder / f"layer{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            _write_floats(source, f"{LLM}model.layers.{index}.{norm}.weight", layer / norm / "weight.bin")
        for name, values in constants.items():
            _write_array(values, layer / "self_attn" / f"{name}{suffix}")
    for name in source.block_linears():
        _, _, index_, inside = name.removeprefix(LLM).split(".", 3)
        target = decoder / f"layer{index_}" / inside.removeprefix("mlp.").replace(".", "/")
        if precision == "fp32":
            _write_floats(source, f"{name}.weight", target / "weight.bin")
        else:
            _write_int4(source, f"{name}.weight", target, precision)


def write_vision(source: ExportSource, folder: Path, blocks: int) -> None:
    """Write the first `blocks` blocks of a CLIP tower, the projector, and the normalisation of pixels."""
    config = source.config.vision_config
    for name, target in _OUTSIDE.items():
        _write_floats(source, _TOWER_PREFIX + name, folder / target)
    kernel = source.read(f"{_TOWER_PREFIX}embeddings.patch_embedding.weight", torch.float32)
    # TinyChatEngine's pixels are [height, width, channel].
    _write_array(kernel.permute(0, 2, 3, 1), folder / "embeddings" / "patch_embedding" / "weight.bin")
    alpha = torch.tensor([1 / math.sqrt(config.hidden_size // config.num_attention_heads)])
    for index in range(blocks):
        layer = folder / "encoder" / f"layer{index}"
        begin = f"{_TOWER_PREFIX}encoder.layers.{index}."
        for name in [name for name in source.tensors if name.startswith(begin)]:
            inside, leaf = name.removeprefix(begin).rsplit(".", 1)
            module = inside.replace("mlp.", "mlp_").replace(".", "/")
            _write_floats(source, name, layer / module / f"{leaf}.bin")
        _write_array(alpha, layer / "self_attn" / "qk_bmm" / "alpha.bin")
    for index in (0, 2):
        for leaf in ("weight", "bias"):
            _write_floats(source, f"projector.{index}.{leaf}", folder / f"mm_projector_{index}" / f"{leaf}.bin")
    spec = source.processor.spec
    for key, values in (("image_mean", spec.mean), ("image_std", spec.std)):
        _write_array(torch.tensor(values), folder / "image_processor" / f"{key}.bin")


def write_vocabulary(source: ExportSource, path: Path) -> None:
    """Write a header of nine numbers, which the engine skips, then length, bytes and score of each of 32000 tokens.

    The bytes are the printed form: a space for SentencePiece's marker, one byte for a byte token, none for a special
    token.
    """
    vocabulary = build_vocabulary(source.processor, source.config.text_config.vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(bytes(4 * _HEADER_NUMBERS))
        words = zip(vocabulary.tokens, vocabulary.types, vocabulary.scores, strict=True)
        for token, type_, score in islice(words, _WORDS):
            word = _printed(token, type_)
            stream.write(struct.pack("<I", len(word)) + word + struct.pack("<f", score))


def quantize_for_engine(rows_OI: Tensor, group_size: int) -> Int4Weight:
    """Quantize as TinyChatEngine: scale = value of largest magnitude / -8, code = floor(w / scale + 8.5), 0..15.

    Scales are float32 and may be negative. Raises LayoutError if the group size does not divide the inputs.
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
    """Return `cos_cached` and `sin_cached` [positions, width]; both halves of a head are equal."""
    frequencies = 1 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies).repeat(1, 2)
    return {"cos_cached": angles.cos(), "sin_cached": angles.sin()}


def _write_floats(source: ExportSource, name: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        for run in source.rows(name, torch.float32):
            stream.write(run.contiguous().numpy().data)


def _write_int4(source: ExportSource, name: str, folder: Path, precision: str) -> None:
    folder.mkdir(parents=True)
    group_size, pack = _PACKINGS[precision]
    for number, run in enumerate(source.rows(name, torch.float32, CHUNK_BYTES // 4)):
        for part, tensor in pack(quantize_for_engine(run, group_size)).items():
            # Formats without packed zero points have a single zero for the whole Linear.
            if number == 0 or part != "zero_point_int4" or tensor.numel() > 1:
                with (folder / f"{part}.bin").open("ab") as stream:
                    stream.write(tensor.contiguous().numpy().data)


def _write_array(values: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(values.contiguous().numpy().tobytes())


def _printed(token: str, type_: int) -> bytes:
    if type_ == UNKNOWN:
        return " \u2047 ".encode()
    if type_ == CONTROL:
        return b""
    return bytes([int(token[3:-1], 16)]) if type_ == BYTE else token.replace("\u2581", " ").encode()
