"""The `mmproj` file of llama.cpp: a CLIP or SigLIP tower and a two-layer projector.

Workarounds: llama.cpp runs `block_count - 1` blocks unless the file names the feature layer, and applies a GELU after
the first projector matrix even if there is no second one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from gguf import GGUFWriter
from torch import Tensor

from vila.export.gguf_tensors import GgufTensor, TensorType, choose_type
from vila.export.source import ExportSource
from vila.model.config import VilaConfig
from vila.model.vision_sizes import block_index

TOWERS = {"clip_vision_model": "patch", "siglip_vision_model": "cls_patch"}
"""Supported towers and their `select_feature`: llama.cpp passes all tokens but a class token to the projector."""
_GELU = {"quick_gelu": False, "gelu_pytorch_tanh": True, "gelu": True}
_TWO_LAYERS, _ONE_LAYER = ("mlp2x_gelu",), ("linear", "mlp1x_gelu", "identity")
_OUTSIDE = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
_INSIDE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def mmproj_problems(config: VilaConfig) -> list[str]:
    """Return why llama.cpp does not support tower and projector of a model."""
    tower = config.vision_config
    if tower.model_type not in TOWERS:
        return [f"vision tower {tower.model_type} is not supported; supported: {', '.join(TOWERS)}"]
    reasons = []
    if config.select_feature != TOWERS[tower.model_type]:
        reasons.append(
            f"select_feature {config.select_feature!r} of a {tower.model_type} is not supported; supported: "
            f"{TOWERS[tower.model_type]!r}"
        )
    if tower.hidden_act not in _GELU:
        reasons.append(f"hidden_act {tower.hidden_act!r} of the tower is not supported; supported: {', '.join(_GELU)}")
    if config.s2_scales:
        reasons.append("S2 features (s2_scales) are not supported")
    if config.projector_type not in (*_TWO_LAYERS, *_ONE_LAYER):
        known = ", ".join((*_TWO_LAYERS, *_ONE_LAYER))
        reasons.append(f"projector {config.projector_type!r} is not supported; supported: {known}")
    return reasons


def num_used_blocks(config: VilaConfig) -> int:
    """Return the number of tower blocks up to the feature layer of the projector."""
    return block_index(config.select_layer, int(config.vision_config.num_hidden_layers))


def add_mmproj_metadata(writer: GGUFWriter, config: VilaConfig) -> None:
    """Add the metadata of tower and projector."""
    tower, spec = config.vision_config, config.vision_spec
    writer.add_type("mmproj")
    writer.add_file_type(1)
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(spec["image_size"])
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_projection_dim(getattr(tower, "projection_dim", tower.hidden_size))
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_block_count(num_used_blocks(config))
    writer.add_array("clip.vision.feature_layer", [num_used_blocks(config)])
    writer.add_vision_image_mean([float(value) for value in spec["mean"]])
    writer.add_vision_image_std([float(value) for value in spec["std"]])
    writer.add_vision_use_gelu(_GELU[tower.hidden_act])


def mmproj_tensors(source: ExportSource) -> list[GgufTensor]:
    """Return the used blocks and the projector; matrices and the patch convolution are F16, all else float32."""
    blocks = num_used_blocks(source.config)
    tensors = []
    for name in source.tensors:
        if name.startswith("vision_tower.") and (renamed := _gguf_name(name.removeprefix("vision_tower."), blocks)):
            # Position embeddings are added in float32, not multiplied.
            shape, is_table = source.shape(name), renamed == "v.position_embd.weight"
            type_ = TensorType.F32 if is_table else choose_type(TensorType.F16, shape)
            tensors.append(GgufTensor(renamed, shape, type_, partial(source.rows, name, torch.float32, 1 << 22)))
    return [*tensors, *_projector(source)]


def _projector(source: ExportSource) -> list[GgufTensor]:
    """Return the projector as `mm.0` and `mm.2`, with a GELU between them."""
    if source.config.projector_type in _TWO_LAYERS:
        names = [name for name in source.tensors if name.startswith("projector.")]
        held = {f"mm.{name.removeprefix('projector.')}": source.read(name, torch.float32) for name in names}
    else:
        held = _exact_linear(*_only_linear(source))
    return [
        GgufTensor(name, tuple(value.shape), choose_type(TensorType.F16, value.shape), partial(iter, (value,)))
        for name, value in held.items()
    ]


def _exact_linear(weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Return a Linear as two Linears with a GELU between them: gelu(x) - gelu(-x) = x, also for GELU approximations."""
    one = torch.eye(len(weight))
    return {
        "mm.0.weight": torch.cat([weight, -weight]),
        "mm.0.bias": torch.cat([bias, -bias]),
        "mm.2.weight": torch.cat([one, -one], dim=1),
        "mm.2.bias": torch.zeros(len(weight)),
    }


def _only_linear(source: ExportSource) -> tuple[Tensor, Tensor]:
    names = sorted(name for name in source.tensors if name.startswith("projector."))
    if not names:
        width = source.config.vision_width
        return torch.eye(width), torch.zeros(width)
    bias, weight = (source.read(name, torch.float32) for name in names)
    return weight, bias


def _gguf_name(name: str, blocks: int) -> str:
    """Return llama.cpp's name of a tower weight, "" for an unused weight."""
    if not name.startswith("encoder.layers."):
        return _OUTSIDE.get(name, "")
    index, rest = name.removeprefix("encoder.layers.").split(".", 1)
    inside, leaf = rest.rsplit(".", 1)
    return f"v.blk.{index}.{_INSIDE[inside]}.{leaf}" if int(index) < blocks else ""


def preprocessing_notes(config: VilaConfig) -> list[str]:
    """Return notes on differences between llama.cpp's image preprocessing and the model's."""
    modes: dict[Any, str] = {
        "pad": "pads images to a square with the mean colour of CLIP",
        "resize": "pads images to a square; the model was trained on images resized to a square",
        "square": "pads images to a square; the model was trained on center crops",
    }
    return [f"llama.cpp {modes[config.vision_spec['image_mode']]}. Its resizing differs from Pillow's."]
