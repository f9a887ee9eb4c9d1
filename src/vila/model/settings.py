"""Settings of a model as plain values, read from config files without the config objects of transformers.

Reading a checkpoint's configs and describing it needs neither transformers nor torch, which take seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vila.core.reading import Fields

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CAUSAL_LM = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_TOWER = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
}
_ENCODER = {**_TOWER, "intermediate_size": 3072, "attention_dropout": 0.0}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_CAUSAL_LM, "pretraining_tp": 1, "attention_bias": False, "mlp_bias": False, "head_dim": None},
    "mistral": {
        **_CAUSAL_LM,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        **_CAUSAL_LM,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "clip_vision_model": {
        **_ENCODER,
        "projection_dim": 512,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "initializer_factor": 1.0,
    },
    "siglip_vision_model": {
        **_ENCODER,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "vision_use_head": True,
    },
    "dinov2": {
        **_TOWER,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "patch_size": 14,
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": False,
        "use_mask_token": True,
    },
}
"""Keys and defaults of transformers' config classes, by `model_type`, for the types that need no transformers to read.

Every other type is read with its config class, which imports torch.
"""
_NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window", "pad_token_id", "bos_token_id", "eos_token_id")
_ROPE_KEYS = ("rope_scaling", "rope_parameters")
_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class PartConfig:
    """Config of an LLM or vision tower with the attributes of transformers' config class.

    Changed attributes are changed in the config that `build` returns, too.
    """

    def __init__(self, model_type: str, values: Mapping[str, Any], build: Callable[[], PretrainedConfig]) -> None:
        """build: reads the same values with transformers."""
        self.model_type = model_type
        vars(self).update(values)
        self._values = dict(values)
        self._build = build

    def build(self) -> PretrainedConfig:
        """Return transformers' config. Raises LayoutError for values that transformers rejects."""
        config = self._build()
        for key, value in self._values.items():
            if getattr(self, key) != value:
                setattr(config, key, getattr(self, key))
        return config


def plain_config(fields: Fields, kind: str, build: Callable[[], PretrainedConfig]) -> PartConfig | None:
    """Return the config of type `kind`; None if its values need transformers. The values have been checked."""
    if kind not in DEFAULTS:
        return None
    defaults = DEFAULTS[kind]
    given = {key: fields[key] for key in fields if key in defaults}
    rope = _rope_parameters(fields)
    if rope is None or not all(_has_type_of(defaults[key], key, value) for key, value in given.items()):
        return None
    values = {**defaults, **given}
    if "num_key_value_heads" in values:
        values["rope_parameters"] = rope
        values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
    if "head_dim" in values:
        values["head_dim"] = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
    return PartConfig(kind, values, build)


def _has_type_of(default: Any, key: str, value: Any) -> bool:
    if key in _NULLABLE:
        return value is None or type(value) is int
    if key in ("image_size", "patch_size"):
        return type(value) in (int, list)
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def _rope_parameters(fields: Fields) -> dict[str, Any] | None:
    """Return type and numbers of the rotary position settings; None for settings that need transformers."""
    sections = [fields.section(key) for key in _ROPE_KEYS if fields.section(key)]
    if len(sections) > 1 or fields.get("partial_rotary_factor") is not None:
        return None
    rope = dict(sections[0]) if sections else {}
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    numbers = {key: value for key, value in rope.items() if key not in ("type", "rope_theta")}
    if kind not in _ROPE_NUMBERS or set(numbers) != set(_ROPE_NUMBERS[kind]) or None in numbers.values():
        return None
    if kind == "llama3" and numbers["high_freq_factor"] - numbers["low_freq_factor"] < 1e-3:
        return None
    return {"rope_type": kind, **numbers}


class ModelSizes:
    """Sizes that follow from the settings of a model."""

    vision_config: Any
    text_config: Any
    s2_scales: list[int]

    @property
    def vision_width(self) -> int:
        """Number of input channels of the projector."""
        return int(self.vision_config.hidden_size) * max(1, len(self.s2_scales))

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of prompt and answer together, with RoPE scaling applied."""
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        factor = float(rope.get("factor", 1.0)) if rope.get("rope_type") in ("linear", "dynamic") else 1.0
        return int(self.text_config.max_position_embeddings * factor)


@dataclass
class ModelSettings(ModelSizes):
    """Settings of a `VilaConfig`, which documents them.

    vision_config, text_config: a PartConfig, or transformers' config for types that need it.
    image_token_id:             None is the first id outside the vocabularies of tokenizer and LLM.
    """

    vision_config: Any
    text_config: Any
    projector_type: str
    select_layer: int
    select_feature: str
    vision_spec: dict[str, Any]
    template: str
    image_token_id: int | None = None
    s2_scales: list[int] = field(default_factory=list)
    s2_max_split: int = 0
    vision_source: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether the configs of both parts were read without transformers."""
        return isinstance(self.vision_config, PartConfig) and isinstance(self.text_config, PartConfig)
