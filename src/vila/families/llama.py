"""LLaMA, Vicuna, SmolLM2 and everything else of transformers' `llama` architecture."""

from __future__ import annotations

from vila.families.card import FamilyCard, ScaleGroup

SCALE_GROUPS = (
    ScaleGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "self_attn"),
    ScaleGroup(("self_attn.o_proj",), "self_attn.v_proj", ""),
    ScaleGroup(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp"),
    ScaleGroup(("mlp.down_proj",), "mlp.up_proj", ""),
)

CARD = FamilyCard(
    model_type="llama",
    decoder_block="LlamaDecoderLayer",
    stop_tokens=("</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>"),
    scale_groups=SCALE_GROUPS,
)
