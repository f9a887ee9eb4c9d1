"""Vision towers as published: their folders, their configs under several names, and the preprocessing that goes along.

CLIP and SigLIP directories hold the whole model or the vision half; InternViT comes with code of its own, and its
weights are read into transformers' InternVLVisionModel, which computes the same block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from vila.core.errors import LayoutError
from vila.core.reading import read_json
from vila.core.vision_spec import ImageMode
from vila.model.layouts.names import Prefixes, take_third
from vila.model.weights import Piece

Triple = tuple[float, float, float]

STATISTICS: dict[str, tuple[Triple, Triple]] = {
    "clip_vision_model": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "internvl_vision": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation, RGB, that each kind of tower was trained with."""

_CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
_KNOWN: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 384,
    },
}
"""Configs of the towers that published checkpoints name, so that weights inside a checkpoint need no other file."""

_PREFIXES = {
    "clip_vision_model": (("vision_model.", ""),),
    "siglip_vision_model": (("vision_model.", ""),),
}
OTHER_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
"""Weights of a whole CLIP or SigLIP directory that are not its tower's."""


@dataclass(frozen=True)
class TowerFacts:
    """A tower's config and the preprocessing it was trained with; `image_size` is in pixels, a side."""

    config: PretrainedConfig
    image_size: int
    mean: Triple
    std: Triple
    center_crop: bool

    @property
    def prefixes(self) -> Prefixes:
        """Names of its weights in its own directory, and ours without `vision_tower.`."""
        return _PREFIXES.get(self.config.model_type, (("", ""),))


def known_tower(name: str) -> TowerFacts | None:
    """The facts on a published tower by its hub id."""
    if name not in _KNOWN:
        return None
    facts = dict(_KNOWN[name])
    return tower_facts(AutoConfig.for_model(facts.pop("model_type"), **facts), {})


def read_tower(folder: Path) -> TowerFacts:
    """The facts on the tower in a directory. Raises LayoutError when its config is missing or of an unknown kind."""
    if not (folder / "config.json").is_file():
        raise LayoutError(f"{folder}: no config.json; a vision tower is a directory as transformers writes it")
    facts = read_json(folder / "config.json")
    facts = facts.get("vision_config") or facts
    if facts.get("model_type") == "intern_vit_6b":
        config = _from_intern_vit(facts)
    else:
        kind = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(
            facts.get("model_type", ""), facts.get("model_type", "")
        )
        if kind not in STATISTICS:
            raise LayoutError(f"{folder}: vision tower type {kind!r} is not known; known are {', '.join(STATISTICS)}")
        config = AutoConfig.for_model(kind, **{k: v for k, v in facts.items() if k != "model_type"})
    preprocessor = folder / "preprocessor_config.json"
    return tower_facts(config, read_json(preprocessor) if preprocessor.is_file() else {})


def tower_facts(config: PretrainedConfig, preprocessor: Mapping[str, Any], image_size: int | None = None) -> TowerFacts:
    """A tower's facts from its config and what its preprocessor_config.json says, as far as it says it.

    image_size: side of the pictures where it is not the config's (a tower may interpolate its positions).
    """
    if config.model_type not in STATISTICS:
        raise LayoutError(f"vision tower type {config.model_type!r} is not known; known are {', '.join(STATISTICS)}")
    mean, std = STATISTICS[config.model_type]
    # InternViT and SigLIP are given squashed pictures, whatever their processors say.
    crops = config.model_type in ("clip_vision_model", "dinov2") and preprocessor.get("do_center_crop", True)
    own = config.image_size
    return TowerFacts(
        config,
        int(image_size or (own[0] if isinstance(own, (list, tuple)) else own)),
        tuple(preprocessor.get("image_mean") or mean),
        tuple(preprocessor.get("image_std") or std),
        bool(crops),
    )


def image_mode_of(aspect: str | None) -> ImageMode:
    """`image_aspect_ratio` of a published config. What is neither `pad` nor `resize` means the tower's own processor.

    Raises LayoutError for LLaVA-NeXT's tiles, which would be read wrongly without a word.
    """
    if aspect is not None and aspect.startswith("anyres"):
        raise LayoutError(
            f"image_aspect_ratio {aspect!r}: LLaVA-NeXT cuts pictures into tiles, and its checkpoints are not supported"
        )
    return "pad" if aspect == "pad" else "resize" if aspect == "resize" else "square"


def _from_intern_vit(facts: Mapping[str, Any]) -> PretrainedConfig:
    if facts.get("norm_type", "rms_norm") != "rms_norm":
        raise LayoutError(f"InternViT norm_type {facts['norm_type']!r}: only rms_norm is known")
    if facts.get("layer_norm_eps", 1e-6) != 1e-6:
        # transformers' norms of queries and keys have no other.
        raise LayoutError(f"InternViT layer_norm_eps {facts['layer_norm_eps']}: only 1e-6 is supported")
    return AutoConfig.for_model(
        "internvl_vision",
        hidden_size=facts.get("hidden_size", 3200),
        intermediate_size=facts.get("intermediate_size", 12800),
        num_hidden_layers=facts.get("num_hidden_layers", 48),
        num_attention_heads=facts.get("num_attention_heads", 25),
        image_size=facts.get("image_size", 224),
        patch_size=facts.get("patch_size", 14),
        norm_type="rms_norm",
        use_qk_norm=facts.get("qk_normalization", True),
        attention_bias=facts.get("qkv_bias", False),
        layer_norm_eps=1e-6,
        hidden_act=facts.get("hidden_act", "gelu"),
        layer_scale_init_value=facts.get("initializer_factor", 0.1),
        use_mean_pooling=True,
    )


def to_intern_vit(config: Any) -> dict[str, Any]:
    """config.json of InternViT for a config that `read_tower` made of one."""
    size, patch = config.image_size, config.patch_size
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_channels": config.num_channels,
        "image_size": size[0] if isinstance(size, (list, tuple)) else size,
        "patch_size": patch[0] if isinstance(patch, (list, tuple)) else patch,
        "norm_type": config.norm_type,
        "qk_normalization": config.use_qk_norm,
        "qkv_bias": config.attention_bias,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": config.hidden_act,
        "initializer_factor": config.layer_scale_init_value,
    }


_INTERN_NAMES = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
)
_INTERN_BLOCK = (
    ("ls1", "lambda_1"),
    ("ls2", "lambda_2"),
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("attn.proj.", "attention.projection_layer."),
    ("attn.q_norm.", "attention.q_norm."),
    ("attn.k_norm.", "attention.k_norm."),
    ("mlp.", "mlp."),
)
_BLOCK = re.compile(r"encoder\.layers?\.(\d+)\.(.*)")
_QKV = re.compile(r"attn\.qkv\.(weight|bias)")


def intern_vit_pieces(pieces: Mapping[str, Piece]) -> tuple[dict[str, Piece], list[str]]:
    """InternViT's weights by the names of transformers' InternVLVisionModel, and those that nothing claims."""
    ours: dict[str, Piece] = {}
    unclaimed = []
    for name, piece in pieces.items():
        block = _BLOCK.fullmatch(name)
        if block and (qkv := _QKV.fullmatch(block[2])):
            for number, part in enumerate("qkv"):
                ours[f"encoder.layer.{block[1]}.attention.{part}_proj.{qkv[1]}"] = take_third(piece, number)
            continue
        found = _translate(block[2] if block else name, _INTERN_BLOCK if block else _INTERN_NAMES)
        if found is None:
            unclaimed.append(name)
        else:
            ours[f"encoder.layer.{block[1]}.{found}" if block else found] = piece
    return ours, unclaimed


def to_intern_vit_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: query, key and value are joined again."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block = _BLOCK.fullmatch(name)
        rest = block[2] if block else name
        if block and rest.startswith(("attention.k_proj.", "attention.v_proj.")):
            continue
        if block and rest.startswith("attention.q_proj."):
            three = [tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            out[f"encoder.layers.{block[1]}.attn.qkv.{rest.rpartition('.')[2]}"] = torch.cat(three)
            continue
        table = [(ours, theirs) for theirs, ours in (_INTERN_BLOCK if block else _INTERN_NAMES)]
        found = _translate(rest, table)
        if found is None:
            raise LayoutError(f"InternViT has no place for the weight {name}")
        out[f"encoder.layers.{block[1]}.{found}" if block else found] = tensor
    return out


def _translate(name: str, table: Any) -> str | None:
    for source, target in table:
        if name == source or (source.endswith(".") and name.startswith(source)):
            return target + name[len(source) :]
    return None
