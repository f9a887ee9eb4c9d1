"""Directories of vision towers (CLIP, SigLIP, DINOv2, InternViT): config, weights and image preprocessing.

CLIP and SigLIP directories contain the whole model or the vision half. InternViT is published with its own code; its
weights are loaded into transformers' InternVLVisionModel, whose blocks are equivalent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.core.errors import LayoutError
from vila.core.files import write_json
from vila.core.reading import Fields
from vila.core.vision_spec import ImageMode, VisionSpec, channel_statistics
from vila.model.layouts.base import FULL_PRECISION, Prefixes, WeightStorage, map_names, split_qkv
from vila.model.layouts.config_file import read_config, tower_config
from vila.model.vision_sizes import check_tower, side_of
from vila.model.weights import TensorRef, find_weight_files, list_tensors, published_state_dict

if TYPE_CHECKING:
    from torch import Tensor

Triple = tuple[float, float, float]

STATISTICS: dict[str, tuple[Triple, Triple]] = {
    "clip_vision_model": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "internvl_vision": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation (RGB) that each tower type was trained with."""

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
"""Configs of towers that published checkpoints name, for checkpoints that contain only the tower's weights."""

# transformers 5 saves CLIP and SigLIP towers without the prefix in published files.
_PREFIXES: Prefixes = (("vision_model.", ""), ("", ""))
_INTERN_VIT = "intern_vit_6b"
_INTERN_VIT_6B = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}
NON_VISION_PREFIXES = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
"""Weights of a whole CLIP or SigLIP model that are not the tower's."""


@dataclass(frozen=True)
class TowerSpec:
    """Config and image preprocessing of a tower.

    config:     a PartConfig, or transformers' config.
    image_size: in pixels.
    source:     JSON object that the config was read from, for error messages.
    """

    config: Any
    image_size: int
    mean: Triple
    std: Triple
    center_crop: bool
    source: Fields


def known_tower(name: str) -> TowerSpec | None:
    """Return the spec of a published tower by its hub id, None for others."""
    if name not in _KNOWN:
        return None
    values = dict(_KNOWN[name])
    source = Fields(_KNOWN[name], name, error=LayoutError)
    return tower_spec(tower_config(source, values["model_type"]), None, source)


def read_tower(folder: Path) -> TowerSpec:
    """Read the spec of the tower in a directory. Raises LayoutError for a missing config or an unknown tower type."""
    fields = read_config(folder)
    if not fields:
        raise LayoutError("no config.json", file=folder, expected="a vision tower directory as transformers writes it")
    fields = fields.section("vision_config") or fields
    kind = fields.text("model_type", "")
    if kind == _INTERN_VIT:
        config = _from_intern_vit(fields)
    else:
        config = tower_config(fields, {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(kind, kind))
    preprocessor = folder / "preprocessor_config.json"
    return tower_spec(config, Fields.of_file(preprocessor, LayoutError) if preprocessor.is_file() else None, fields)


def tower_spec(config: Any, preprocessor: Fields | None, source: Fields, image_size: int | None = None) -> TowerSpec:
    """Build a tower's spec from its config and, if there is one, its preprocessor_config.json.

    image_size: if it differs from the config's (a tower may interpolate its position embeddings).
    """
    with source.naming():
        check_tower(config, "cls_patch")
    mean, std = STATISTICS[config.model_type]
    given = Fields({}, source.file, error=LayoutError) if preprocessor is None else preprocessor
    # InternViT and SigLIP were trained on images resized without cropping, whatever their processor config says.
    crops = given.flag("do_center_crop", True) and config.model_type in ("clip_vision_model", "dinov2")
    return TowerSpec(
        config,
        image_size or side_of(config.image_size),
        channel_statistics(given, "image_mean", mean),
        channel_statistics(given, "image_std", std),
        crops,
        source,
    )


def read_image_mode(fields: Fields) -> ImageMode:
    """Read `image_aspect_ratio` of a published config; other values than `pad` and `resize` mean `square`.

    Raises LayoutError for LLaVA-NeXT's tiles, which would otherwise be silently wrong.
    """
    aspect = fields.text("image_aspect_ratio", "")
    if aspect.startswith("anyres"):
        raise fields.refusal(
            "image_aspect_ratio", "LLaVA-NeXT checkpoints, which split images into tiles, are not supported"
        )
    return "pad" if aspect == "pad" else "resize" if aspect == "resize" else "square"


def _from_intern_vit(fields: Fields) -> Any:
    fields.text("norm_type", "rms_norm", choices=("rms_norm",))
    if fields.number("layer_norm_eps", 1e-6, maximum=1.0) != 1e-6:
        # The query and key norms in transformers have no other value.
        raise fields.refusal("layer_norm_eps", expected="1e-6")
    ours = {
        **_INTERN_VIT_6B,
        **{key: fields[key] for key in _INTERN_VIT_6B if fields.get(key) is not None},
        "norm_type": "rms_norm",
        "use_qk_norm": fields.flag("qk_normalization", True),
        "attention_bias": fields.flag("qkv_bias", False),
        "layer_norm_eps": 1e-6,
        "layer_scale_init_value": fields.number("initializer_factor", 0.1),
        "use_mean_pooling": True,
    }
    return tower_config(Fields(ours, fields.file, fields.name, LayoutError), "internvl_vision")


def tower_tensors(folder: Path, tower: TowerSpec) -> tuple[dict[str, TensorRef], list[str]]:
    """Return the tower's weights by our names, and the unexpected names."""
    refs = list_tensors(find_weight_files(folder))
    if tower.config.model_type == "internvl_vision":
        ours, unexpected = from_intern_vit_tensors(refs)
    else:
        ours, unexpected = map_names(refs, _PREFIXES, ignore=NON_VISION_PREFIXES)
    return {f"vision_tower.{name}": ref for name, ref in ours.items()}, unexpected


def to_intern_vit_config(config: Any) -> dict[str, Any]:
    """Return InternViT's config.json; the inverse of `read_tower`."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
    return {
        "architectures": ["InternVisionModel"],
        "model_type": _INTERN_VIT,
        **{key: getattr(config, key) for key in sizes},
        "image_size": side_of(config.image_size),
        "patch_size": side_of(config.patch_size),
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


def from_intern_vit_tensors(refs: Mapping[str, TensorRef]) -> tuple[dict[str, TensorRef], list[str]]:
    """Return InternViT's weights by the names of transformers' InternVLVisionModel, and the unexpected names."""
    ours: dict[str, TensorRef] = {}
    unexpected = []
    for name, ref in refs.items():
        block = _BLOCK.fullmatch(name)
        if block and (qkv := _QKV.fullmatch(block[2])):
            for number, part in enumerate("qkv"):
                ours[f"encoder.layer.{block[1]}.attention.{part}_proj.{qkv[1]}"] = split_qkv(ref, number)
            continue
        found = _translate(block[2] if block else name, _INTERN_BLOCK if block else _INTERN_NAMES)
        if found is None:
            unexpected.append(name)
        else:
            ours[f"encoder.layer.{block[1]}.{found}" if block else found] = ref
    return ours, unexpected


def to_intern_vit_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_intern_vit_tensors`: query, key and value are fused again."""
    import torch

    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block = _BLOCK.fullmatch(name)
        rest = block[2] if block else name
        if block and rest.startswith(("attention.k_proj.", "attention.v_proj.")):
            continue
        if block and rest.startswith("attention.q_proj."):
            query_key_value = [tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            out[f"encoder.layers.{block[1]}.attn.qkv.{rest.rpartition('.')[2]}"] = torch.cat(query_key_value)
            continue
        table = [(ours, theirs) for theirs, ours in (_INTERN_BLOCK if block else _INTERN_NAMES)]
        found = _translate(rest, table)
        if found is None:
            raise LayoutError("not a weight of the InternViT layout", field=name)
        out[f"encoder.layers.{block[1]}.{found}" if block else found] = tensor
    return out


def _translate(name: str, table: Any) -> str | None:
    for source, target in table:
        if name == source or (source.endswith(".") and name.startswith(source)):
            return target + name[len(source) :]
    return None


ARCHITECTURES = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}


def write_tower(model: Any, spec: VisionSpec, folder: Path, storage: WeightStorage = FULL_PRECISION) -> None:
    """Write config.json, preprocessor_config.json and weights of the model's tower into a new directory.

    Weights are always safetensors; `storage` determines their dtype.
    """
    from vila.model.save_weights import write_weights

    config = model.config.vision_config
    weights = published_state_dict(model.vision_tower)
    if config.model_type == "internvl_vision":
        config_json, weights = to_intern_vit_config(config), to_intern_vit_tensors(weights)
    elif config.model_type in ARCHITECTURES:
        config_json = {**config.to_dict(), "architectures": [ARCHITECTURES[config.model_type]]}
        config_json.pop("dtype", None)
        weights = {f"vision_model.{name}": tensor for name, tensor in weights.items()}
    else:
        hint = "use the native layout"
        raise LayoutError(
            "the tower cannot be saved separately", field="model_type", value=config.model_type, hint=hint
        )
    stored = storage.cast(weights)
    dtype = str(next(iter(stored.values())).dtype).removeprefix("torch.")
    folder.mkdir()
    write_json(folder / "config.json", {**config_json, "torch_dtype": dtype}, indent=2)
    write_json(folder / "preprocessor_config.json", preprocessor_config(config.model_type, spec), indent=2)
    write_weights(stored, folder)


def preprocessor_config(kind: str, spec: VisionSpec) -> dict[str, Any]:
    """Return the content of preprocessor_config.json for a tower type."""
    size = spec.image_size
    square = {"height": size, "width": size}
    shared = image_processor_settings(spec)
    if kind == "siglip_vision_model":
        return {**shared, "image_processor_type": "SiglipImageProcessor", "size": square}
    return {
        **shared,
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "crop_size": square,
        "size": {"shortest_edge": size},
    }


def image_processor_settings(spec: VisionSpec) -> dict[str, Any]:
    """Return the settings that all image processors share."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
