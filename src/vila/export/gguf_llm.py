"""The language model in llama.cpp's words: names, metadata, and the order of rows that its rotation expects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vila.export.gguf_file import GgufTensor, Kind, fitting
from vila.export.gguf_int4 import int4_runs
from vila.export.source import LLM, RUN_BYTES

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from vila.export.source import Source

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""llama.cpp's name for each `model_type`; it knows no Mistral of its own."""
KINDS = {"f16": Kind.F16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0, "q4_1": Kind.Q4_1}
_FILE_TYPES = {"f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7}
_ROPES = ("default", "linear", "llama3")
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llm_refusals(config: Any) -> list[str]:
    """Why llama.cpp could not compute this LLM; `config` is its transformers config."""
    reasons = []
    if config.model_type not in ARCHITECTURES:
        reasons.append(f"an LLM of type {config.model_type!r} has no names here; known are {', '.join(ARCHITECTURES)}")
    rope = _rope(config).get("rope_type", "default")
    if rope not in _ROPES:
        reasons.append(f"rope_type {rope!r} cannot be written; {', '.join(_ROPES)} can")
    if getattr(config, "use_sliding_window", False):
        reasons.append("its layers of sliding window attention cannot be written; use_sliding_window=false can")
    if config.hidden_act != "silu":
        reasons.append(f"hidden_act {config.hidden_act!r} cannot be said in the file; llama.cpp computes 'silu'")
    return reasons


def context_length(config: Any) -> int:
    """Positions that llama.cpp may use: within Mistral's first sliding window, of which it knows nothing."""
    window = getattr(config, "sliding_window", None)
    longest = int(config.max_position_embeddings)
    return min(longest, window) if config.model_type == "mistral" and window else longest


def describe_llm(writer: GGUFWriter, config: Any, precision: str) -> None:
    """Add the LLM's metadata."""
    writer.add_type("model")
    writer.add_file_type(_FILE_TYPES[precision])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_kv_heads(config))
    writer.add_key_length(_head_width(config))
    writer.add_value_length(_head_width(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_width(config))
    rope = _rope(config)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def llm_tensors(source: Source, precision: str) -> list[GgufTensor]:
    """The LLM's tensors, in the order of its blocks.

    Vectors are float32. In 4 bits the embeddings and the head keep 8: they are what rounding hurts most, and llama.cpp
    itself keeps more for them. A matrix whose rows are no whole blocks of 32 stays F16.
    """
    config = source.config.text_config
    packed = {f"{name}.weight": weight for name, weight in source.checkpoint.int4.items()}
    tensors = []
    for name in sorted([*source.pieces, *packed], key=_order):
        if not name.startswith(LLM) or (name == f"{LLM}lm_head.weight" and source.is_tied):
            continue
        place, leaf = name.removeprefix(LLM).rsplit(".", 1)
        kind = Kind.Q8_0 if place in _OUTSIDE and KINDS[precision] in (Kind.Q4_0, Kind.Q4_1) else KINDS[precision]
        shape = packed[name].shape if name in packed else source.shape(name)
        kind = fitting(kind, shape)
        rows = partial(int4_runs, source, f"{LLM}{place}", kind) if name in packed else partial(_rows, source, name)
        runs = partial(_in_order, rows, _alternating(place, config))
        tensors.append(GgufTensor(f"{_renamed(place)}.{leaf}", shape, kind, runs))
    if _rope(config).get("rope_type") == "llama3":
        factors = llama3_factors(_rope(config), _head_width(config))
        tensors.append(GgufTensor("rope_freqs.weight", tuple(factors.shape), Kind.F32, lambda: iter([factors])))
    return tensors


def halves_alternating(rows: Tensor, width: int) -> Tensor:
    """Rows of q or k [heads * width, ...] in llama.cpp's order, in which the two rotary halves of a head alternate.

    A head of four rows [a0 a1 b0 b1] becomes [a0 b0 a1 b1].
    """
    return rows.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)


def llama3_factors(rope: Any, width: int) -> Tensor:
    """What each rotary frequency of Llama 3.1 is divided by, float32 [width / 2]: 1, a ramp, `factor`.

    As transformers' `llama3` scaling: short waves stay, those longer than the original context are stretched.
    """
    theta, factor = rope.get("rope_theta", 10000.0), rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    positions = rope["original_max_position_embeddings"]
    waves = 2 * math.pi * theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    ramp = ((positions / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - ramp) / factor + ramp)).float()


def _rows(source: Source, name: str) -> Iterator[Tensor]:
    # Rounding to blocks takes several float32 copies of a run.
    return source.rows(name, torch.float32, RUN_BYTES // 4)


def _in_order(rows_of: Callable[[], Iterator[Tensor]], width: int) -> Iterator[Tensor]:
    """The rows as they are, or with `width` those of each head in llama.cpp's order."""
    if not width:
        yield from rows_of()
        return
    rest: Tensor | None = None
    for run in rows_of():
        rows = run if rest is None else torch.cat([rest, run])
        whole = len(rows) // width * width
        if whole:
            yield halves_alternating(rows[:whole], width)
        rest = rows[whole:].clone()


def _alternating(place: str, config: Any) -> int:
    """Rows of a head whose order changes, 0 where none does: llama.cpp rotates neighbours in `llama` alone."""
    rotated = place.endswith(("self_attn.q_proj", "self_attn.k_proj"))
    return _head_width(config) if rotated and ARCHITECTURES[config.model_type] == "llama" else 0


def _renamed(place: str) -> str:
    if place in _OUTSIDE:
        return _OUTSIDE[place]
    _, _, index, inside = place.split(".", 3)
    return f"blk.{index}.{_INSIDE[inside]}"


def _order(name: str) -> tuple[int, str]:
    parts = name.removeprefix(LLM).split(".")
    return (int(parts[2]) if parts[1] == "layers" else -1, name)


def _rope(config: Any) -> Any:
    return getattr(config, "rope_parameters", None) or {}


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
