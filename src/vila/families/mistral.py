"""Mistral 7B and its fine-tunes: LLaMA's block, in the first version with a sliding window of attention."""

from __future__ import annotations

from vila.families.card import FamilyCard
from vila.families.llama import SCALE_GROUPS

CARD = FamilyCard(
    model_type="mistral",
    decoder_block="MistralDecoderLayer",
    stop_tokens=("</s>", "<|im_end|>"),
    scale_groups=SCALE_GROUPS,
)
