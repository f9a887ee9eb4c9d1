"""Decoder blocks that can be computed without their own code, because everything in them is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2")
_PARTS = {
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
}


def unknown_in(text_config: Any, layers: Any) -> Iterator[str]:
    """What is not known in the blocks of a decoder."""
    if text_config.model_type not in FAMILIES:
        yield f"model_type={text_config.model_type!r}: only {', '.join(FAMILIES)} are known"
        return
    if text_config.hidden_act not in ("silu", "swish"):
        yield f"hidden_act={text_config.hidden_act!r}: only 'silu'"
    holders = {name for name, module in layers[0].named_modules() if hasattr(module, "weight")}
    if holders != _PARTS:
        yield f"a decoder block with {', '.join(sorted(holders ^ _PARTS))} changed"


def windows_of(text_config: Any) -> list[int | None]:
    """How many tokens a token of each layer sees, itself among them; None for all."""
    window = getattr(text_config, "sliding_window", None)
    kinds = getattr(text_config, "layer_types", None) or ["sliding_attention"] * text_config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
