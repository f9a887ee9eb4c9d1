"""The configuration of a VILA model, in transformers' form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig


class VilaConfig(PretrainedConfig):
    """Tower, projector and LLM, and all that prompts and pixels depend on.

    vision_config, text_config: configs of the two parts, as dicts or config objects.
    projector_type: `linear`, `mlpNx_gelu`, `mlp_downsample` or `identity`.
    select_layer:   which hidden state of the tower, as transformers counts them (0 = embeddings).
    select_feature: `patch` drops the class token, `cls_patch` keeps all tokens.
    image_token_id: placeholder id, the first one past the tokenizer; its embedding is never looked up.
    vision_spec:    a VisionSpec as a dict.
    template:       name of the conversation template the model was trained with; empty when nobody knows.
    s2_scales:      sides that each picture is seen at, ascending; empty for the tower's own alone.
    s2_max_split:   side of the tiles that larger scales are cut into.
    vision_source:  hub id that the tower came from, for layouts that name it; empty when it has none.
    """

    model_type = "vila"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        projector_type: str = "mlp2x_gelu",
        select_layer: int = -2,
        select_feature: str = "patch",
        image_token_id: int = 32000,
        vision_spec: dict[str, Any] | None = None,
        template: str = "",
        s2_scales: Sequence[int] = (),
        s2_max_split: int = 0,
        vision_source: str = "",
        **kwargs: Any,
    ) -> None:
        self.vision_config = _as_config(vision_config, "clip_vision_model")
        self.text_config = _as_config(text_config, "llama")
        self.projector_type = projector_type
        self.select_layer = select_layer
        self.select_feature = select_feature
        self.image_token_id = image_token_id
        self.vision_spec = vision_spec or {}
        self.template = template
        self.s2_scales = list(s2_scales)
        self.s2_max_split = s2_max_split
        self.vision_source = vision_source
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    @property
    def vision_width(self) -> int:
        """Channels of the features that the projector reads."""
        return int(self.vision_config.hidden_size) * max(1, len(self.s2_scales))

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together: the LLM's positions, stretched if its RoPE is."""
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        factor = float(rope.get("factor", 1.0)) if rope.get("rope_type") in ("linear", "dynamic") else 1.0
        return int(self.text_config.max_position_embeddings * factor)


def _as_config(value: Any, default_type: str) -> PretrainedConfig:
    if isinstance(value, PretrainedConfig):
        return value
    facts = dict(value or {})
    return AutoConfig.for_model(facts.pop("model_type", default_type), **facts)


# transformers looks up `model_type` whenever it reads a config.json, the tokenizer's loader included.
AutoConfig.register(VilaConfig.model_type, VilaConfig, exist_ok=True)
