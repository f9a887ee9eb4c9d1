"""The tower and projector as llama.cpp's second file, `mmproj`: a CLIP or SigLIP encoder and a two-layer perceptron.

llama.cpp runs `block_count - 1` blocks unless the file names the layer that it wants, and puts a GELU after the first
projector matrix whether or not there is a second one. The file is written so that neither matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vila.export.gguf import GgufTensor, Kind, fitting

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from vila.export.source import Source
    from vila.model.config import VilaConfig

TOWERS = {"clip_vision_model": "patch", "siglip_vision_model": "cls_patch"}
"""Towers that the graph of llama.cpp computes, and what it gives to the projector: everything but a class token."""
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


def mmproj_refusals(config: VilaConfig) -> list[str]:
    """Why llama.cpp could not compute this model's tower and projector."""
    tower = config.vision_config
    if tower.model_type not in TOWERS:
        return [f"a {tower.model_type} tower has no graph there; {' and '.join(TOWERS)} have one"]
    reasons = []
    if config.select_feature != TOWERS[tower.model_type]:
        reasons.append(
            f"select_feature {config.select_feature!r} with a {tower.model_type}: llama.cpp gives the projector "
            f"the patches alone; {TOWERS[tower.model_type]!r} can be written"
        )
    if tower.hidden_act not in _GELU:
        reasons.append(f"the tower's hidden_act {tower.hidden_act!r} cannot be said; {', '.join(_GELU)} can")
    if config.s2_scales:
        reasons.append("S2 features cannot be computed there; a model without s2_scales can")
    if config.projector_type not in (*_TWO_LAYERS, *_ONE_LAYER):
        known = ", ".join((*_TWO_LAYERS, *_ONE_LAYER))
        reasons.append(f"projector {config.projector_type!r} has no graph there; {known} can be written")
    return reasons


def blocks_used(config: VilaConfig) -> int:
    """Blocks of the tower that run: the output of the last of them is what the projector reads."""
    depth = int(config.vision_config.num_hidden_layers)
    return config.select_layer if config.select_layer >= 0 else depth + 1 + config.select_layer


def describe_mmproj(writer: GGUFWriter, config: VilaConfig) -> None:
    """Add the metadata of the tower."""
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
    writer.add_vision_block_count(blocks_used(config))
    writer.add_array("clip.vision.feature_layer", [blocks_used(config)])
    writer.add_vision_image_mean([float(value) for value in spec["mean"]])
    writer.add_vision_image_std([float(value) for value in spec["std"]])
    writer.add_vision_use_gelu(_GELU[tower.hidden_act])


def mmproj_tensors(source: Source) -> list[GgufTensor]:
    """The blocks that run, and the projector; matrices and the patch kernel are F16, all else float32."""
    blocks = blocks_used(source.config)
    tensors = []
    for name in source.pieces:
        if name.startswith("vision_tower.") and (renamed := _renamed(name.removeprefix("vision_tower."), blocks)):
            # Positions are added to float32, and a table of them is no product.
            kind = Kind.F32 if renamed == "v.position_embd.weight" else fitting(Kind.F16, source.shape(name))
            tensors.append(
                GgufTensor(renamed, source.shape(name), kind, partial(source.rows, name, torch.float32, 1 << 22))
            )
    return [*tensors, *_projector(source)]


def _projector(source: Source) -> list[GgufTensor]:
    """`mm.0` and `mm.2`, with a GELU between them."""
    if source.config.projector_type in _TWO_LAYERS:
        names = [name for name in source.pieces if name.startswith("projector.")]
        held = {f"mm.{name.removeprefix('projector.')}": source.read(name, torch.float32) for name in names}
    else:
        held = _exact_linear(*_only_linear(source))
    return [
        GgufTensor(name, tuple(value.shape), fitting(Kind.F16, value.shape), partial(_once, value))
        for name, value in held.items()
    ]


def _exact_linear(weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """A Linear as two with a GELU between them: gelu(x) - gelu(-x) = x, for each of its approximations."""
    one = torch.eye(len(weight))
    return {
        "mm.0.weight": torch.cat([weight, -weight]),
        "mm.0.bias": torch.cat([bias, -bias]),
        "mm.2.weight": torch.cat([one, -one], dim=1),
        "mm.2.bias": torch.zeros(len(weight)),
    }


def _only_linear(source: Source) -> tuple[Tensor, Tensor]:
    names = sorted(name for name in source.pieces if name.startswith("projector."))
    if not names:
        width = source.config.vision_width
        return torch.eye(width), torch.zeros(width)
    bias, weight = (source.read(name, torch.float32) for name in names)
    return weight, bias


def _once(value: Tensor) -> Iterator[Tensor]:
    yield value


def _renamed(name: str, blocks: int) -> str:
    """llama.cpp's name of a tower's weight, empty for those that it does not need."""
    if not name.startswith("encoder.layers."):
        return _OUTSIDE.get(name, "")
    index, place = name.removeprefix("encoder.layers.").split(".", 1)
    inside, leaf = place.rsplit(".", 1)
    return f"v.blk.{index}.{_INSIDE[inside]}.{leaf}" if int(index) < blocks else ""


def preprocessing_notes(config: VilaConfig) -> list[str]:
    """Where llama.cpp's pixels are not the model's."""
    modes: dict[Any, str] = {
        "pad": "pads pictures to a square with its own colour, that of CLIP's mean",
        "resize": "pads pictures to a square, where the model was trained on squashed ones",
        "square": "pads pictures to a square, where the model was trained on what its tower's processor cuts",
    }
    return [f"llama.cpp {modes[config.vision_spec['image_mode']]}, and resizes by its own arithmetic."]
