"""Table of LLM families: everything that depends on the `model_type` of the LLM, one `Family` per `model_type`.

To add a family, add an entry to `FAMILIES` and a tiny model to `tests/tiny.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

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
    """Properties of one LLM family. An empty name means that the format cannot hold the family.

    model_type:          `model_type` of the transformers config.
    causal_lm:           transformers class of the whole LLM.
    decoder_block:       transformers class of a decoder block, the unit of FSDP sharding and of quantization.
    stop_tokens:         special tokens that end an answer, if the tokenizer has them.
    scale_groups:        Linear layers that AWQ scales together, in search order.
    has_fast_decoder:    whether the fast CPU decoder and the ONNX graph compute its blocks.
    gguf:                `general.architecture` in GGUF files.
    tensorrt_llm_legacy: `architecture` in a checkpoint for TensorRT-LLM's trtllm-build.
    llava_class:         class name in the `architectures` of a LLaVA-1.5 config.
    llava_model_types:   `model_type` values in a LLaVA-1.5 config; the first is written, all are read.
    """

    model_type: str
    causal_lm: str
    decoder_block: str
    stop_tokens: tuple[str, ...]
    scale_groups: tuple[ScaleGroup, ...]
    has_fast_decoder: bool
    gguf: str
    tensorrt_llm_legacy: str
    llava_class: str
    llava_model_types: tuple[str, ...]

    @property
    def block_layers(self) -> frozenset[str]:
        """Names of all layers with weights inside a decoder block."""
        return frozenset(name for group in self.scale_groups for name in (*group.linears, group.fold))


_LLAMA = Family(  # also Vicuna, SmolLM2 and other models with the `llama` architecture
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    decoder_block="LlamaDecoderLayer",
    stop_tokens=("</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>"),
    scale_groups=(
        ScaleGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "self_attn"),
        ScaleGroup(("self_attn.o_proj",), "self_attn.v_proj", ""),
        ScaleGroup(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp"),
        ScaleGroup(("mlp.down_proj",), "mlp.up_proj", ""),
    ),
    has_fast_decoder=True,
    gguf="llama",
    tensorrt_llm_legacy="LlamaForCausalLM",
    llava_class="LlavaLlamaForCausalLM",
    llava_model_types=("llava_llama", "llava"),
)
_MISTRAL = replace(
    _LLAMA,
    model_type="mistral",
    causal_lm="MistralForCausalLM",
    decoder_block="MistralDecoderLayer",
    stop_tokens=("</s>", "<|im_end|>"),
    gguf="llama",  # llama.cpp has no architecture for Mistral
    tensorrt_llm_legacy="MistralForCausalLM",
    llava_class="LlavaMistralForCausalLM",
    llava_model_types=("llava_mistral",),
)
_QWEN2 = replace(  # Qwen2 and Qwen2.5
    _LLAMA,
    model_type="qwen2",
    causal_lm="Qwen2ForCausalLM",
    decoder_block="Qwen2DecoderLayer",
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    gguf="qwen2",
    tensorrt_llm_legacy="",
    llava_class="LlavaQwenForCausalLM",
    llava_model_types=("llava_qwen", "llava_qwen2"),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in (_LLAMA, _MISTRAL, _QWEN2)}

FAMILY_BY_LLAVA_TYPE: dict[str, Family] = {name: one for one in FAMILIES.values() for name in one.llava_model_types}
"""`model_type` of a LLaVA-1.5 config -> family of its LLM."""


def find_family(model_type: str) -> Family:
    """Return the family of a transformers `model_type`. Raises UnknownNameError, which lists the known families."""
    if model_type not in FAMILIES:
        raise UnknownNameError("LLM family", model_type, FAMILIES)
    return FAMILIES[model_type]


def unsupported_blocks(text_config: Any, layers: Any) -> Iterator[str]:
    """Yield features of the decoder blocks `layers` that the fast decoder and the ONNX graph do not support.

    text_config: transformers config of the LLM.
    """
    supported = [family.model_type for family in FAMILIES.values() if family.has_fast_decoder]
    if text_config.model_type not in supported:
        yield f"model_type={text_config.model_type!r}: supported are {', '.join(supported)}"
        return
    if text_config.hidden_act not in ("silu", "swish"):
        yield f"hidden_act={text_config.hidden_act!r}: supported is 'silu'"
    names = {name for name, module in layers[0].named_modules() if hasattr(module, "weight")}
    if changed := names ^ find_family(text_config.model_type).block_layers:
        yield f"decoder blocks with added or missing layers: {', '.join(sorted(changed))}"


def head_width(text_config: Any) -> int:
    """Return the width of an attention head."""
    return int(getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads)


def num_kv_heads(text_config: Any) -> int:
    """Return the number of key-value heads."""
    return int(getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads)


def rope_parameters(text_config: Any) -> Mapping[str, Any]:
    """Return the rotary position settings; empty if there are none."""
    return getattr(text_config, "rope_parameters", None) or {}


def attention_windows(text_config: Any) -> list[int | None]:
    """Return the sliding-window size of each decoder layer in tokens, the current one included; None for full."""
    window = getattr(text_config, "sliding_window", None)
    layer_types = getattr(text_config, "layer_types", None)
    layer_types = layer_types or ["sliding_attention"] * text_config.num_hidden_layers
    return [window if layer_type == "sliding_attention" else None for layer_type in layer_types]
