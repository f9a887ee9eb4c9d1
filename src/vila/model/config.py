"""`VilaConfig`: the configuration of a VILA model as a transformers `PretrainedConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from vila.model.settings import ModelSettings, ModelSizes, PartConfig


class VilaConfig(ModelSizes, PretrainedConfig):
    """Vision tower, projector and LLM, and everything that prompts and pixels depend on.

    vision_config, text_config: configs of the two parts, as dicts, `PartConfig`s or config objects.
    projector_type: `linear`, `mlpNx_gelu`, `mlp_downsample` or `identity`.
    select_layer:   hidden state of the tower, in transformers' numbering (0 = embeddings).
    select_feature: `patch` drops the class token, `cls_patch` keeps all tokens.
    image_token_id: placeholder id, past the vocabulary; its embedding is never looked up.
    vision_spec:    a VisionSpec as a dict.
    template:       name of the conversation template used in training; empty if unknown.
    s2_scales:      image sizes of S2 features in pixels, ascending; empty for single-scale features.
    s2_max_split:   maximum tile size in pixels for the larger scales.
    vision_source:  hub id of the tower, for layouts that name it; empty if it has none.
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


def _as_config(value: Any, default_type: str) -> PretrainedConfig:
    if isinstance(value, PretrainedConfig):
        return value
    if isinstance(value, PartConfig):
        return value.build()
    values = dict(value or {})
    return AutoConfig.for_model(values.pop("model_type", default_type), **values)


def build_vila_config(settings: ModelSettings, image_token_id: int) -> VilaConfig:
    """Build the config of a model from plain settings. Raises LayoutError for values that transformers rejects."""
    return VilaConfig(**{**vars(settings), "image_token_id": image_token_id})


# transformers resolves `model_type` whenever it reads a config.json, also when it loads a tokenizer.
AutoConfig.register(VilaConfig.model_type, VilaConfig, exist_ok=True)
