"""What the rest of the house needs to know of an LLM family; one file per family fills a card."""

from __future__ import annotations

from dataclasses import dataclass

from vila.core.registry import Registry


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Linears that share an input, and what an AWQ scale on that input is folded into (arXiv 2306.00978).

    linears:  names inside a decoder block.
    fold:     name of the norm or Linear that absorbs the inverse scale.
    inspect:  the module whose output the search compares; empty for the whole first Linear alone.
    """

    linears: tuple[str, ...]
    fold: str
    inspect: str


@dataclass(frozen=True, slots=True)
class FamilyCard:
    """Facts on one LLM family.

    model_type:    `model_type` of its transformers config.
    decoder_block: class name of a decoder block, the unit of sharding and of quantization.
    stop_tokens:   strings that end an answer when the tokenizer holds them as special tokens.
    scale_groups:  what AWQ scales together, in search order.
    qkv_bias:      whether the query, key and value projections carry a bias.
    """

    model_type: str
    decoder_block: str
    stop_tokens: tuple[str, ...]
    scale_groups: tuple[ScaleGroup, ...]
    qkv_bias: bool = False


_FAMILIES: Registry[FamilyCard] = Registry(
    "LLM family",
    {
        "llama": "vila.families.llama:CARD",
        "mistral": "vila.families.mistral:CARD",
        "qwen2": "vila.families.qwen2:CARD",
    },
)


def find_family(model_type: str) -> FamilyCard:
    """The card of a transformers `model_type`. Raises UnknownNameError naming the cards that exist."""
    return _FAMILIES[model_type]
