"""Qwen2 and Qwen2.5: LLaMA's block with biases on query, key and value."""

from __future__ import annotations

from vila.families.card import FamilyCard
from vila.families.llama import SCALE_GROUPS

CARD = FamilyCard(
    model_type="qwen2",
    decoder_block="Qwen2DecoderLayer",
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    scale_groups=SCALE_GROUPS,
    qkv_bias=True,
)
