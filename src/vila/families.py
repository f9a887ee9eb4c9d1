"""Facts about the LLM families whose decoders are quantized, sharded and exported: one `Family` per `model_type`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vila.core.errors import UnknownNameError


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Linear layers that share an input, and the layer that absorbs their AWQ scale (arXiv 2306.00978).

    linears:  names inside a decoder block.
    fold:     name of the norm or Linear that absorbs the inverse scale.
    inspect:  name of the module whose output the search compares; empty for the first Linear alone.
    """

    linears: tuple[str, ...]
    fold: str
    inspect: str


@dataclass(frozen=True, slots=True)
class Family:
    """Facts about one LLM family.

    model_type:    `model_type` of its transformers config.
    decoder_block: class name of a decoder block, the unit of FSDP sharding and of quantization.
    stop_tokens:   strings that end an answer if the tokenizer holds them as special tokens.
    scale_groups:  Linear layers that AWQ scales together, in search order.
    qkv_bias:      True if the query, key and value projections have a bias.
    """

    model_type: str
    decoder_block: str
    stop_tokens: tuple[str, ...]
    scale_groups: tuple[ScaleGroup, ...]
    qkv_bias: bool = False


_LLAMA_SCALE_GROUPS = (
    ScaleGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "self_attn"),
    ScaleGroup(("self_attn.o_proj",), "self_attn.v_proj", ""),
    ScaleGroup(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp"),
    ScaleGroup(("mlp.down_proj",), "mlp.up_proj", ""),
)

# LLaMA, Vicuna, SmolLM2 and everything else with transformers' `llama` architecture.
_LLAMA = Family(
    model_type="llama",
    decoder_block="LlamaDecoderLayer",
    stop_tokens=("</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>"),
    scale_groups=_LLAMA_SCALE_GROUPS,
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(
        _LLAMA, model_type="mistral", decoder_block="MistralDecoderLayer", stop_tokens=("</s>", "<|im_end|>")
    ),
    # Qwen2 and Qwen2.5
    "qwen2": replace(
        _LLAMA,
        model_type="qwen2",
        decoder_block="Qwen2DecoderLayer",
        stop_tokens=("<|im_end|>", "<|endoftext|>"),
        qkv_bias=True,
    ),
}


def find_family(model_type: str) -> Family:
    """Return the family of a transformers `model_type`.

    Raises UnknownNameError, which lists the families that exist.
    """
    if model_type not in FAMILIES:
        raise UnknownNameError("LLM family", model_type, FAMILIES)
    return FAMILIES[model_type]
