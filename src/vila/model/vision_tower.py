"""Vision towers: which layer's features are taken from a transformers encoder, exactly as the original selects them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from vila.core.errors import LayoutError

# N media items  T tokens with class token  P patches  C tower width  H, W pixels

TOWER_TYPES = ("clip_vision_model", "siglip_vision_model", "dinov2", "internvl_vision")
SELECT_FEATURES = ("patch", "cls_patch")
_WITHOUT_CLS = ("siglip_vision_model",)
_ANY_SIZE = ("dinov2",)
"""Towers that were made to interpolate their position embeddings on the way; in the others it would be an accident."""


class _Reached(Exception):
    """Carries the wanted features out of the tower, so that later blocks do not run."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def num_patches(config: PretrainedConfig, image_size: int) -> int:
    """Return the number of patches of a square image of `image_size` pixels.

    CLIP and SigLIP ignore a rest at the border (384 pixels are 27 patches of 14). Raises LayoutError when patches are
    not square, when there is none, or when they leave a rest where the tower cannot ignore it.
    """
    patch = _side(config.patch_size, "patch_size")
    if image_size < patch or (config.model_type in _ANY_SIZE and image_size % patch):
        raise LayoutError(
            field="image_size", value=image_size, expected=f"a multiple of the tower's patch size {patch}"
        )
    return (image_size // patch) ** 2


def check_tower(config: PretrainedConfig, select_feature: str) -> None:
    """Refuse a tower type, or a feature selection that would give wrong features without an error.

    Raises LayoutError.
    """
    if config.model_type not in TOWER_TYPES:
        raise LayoutError(
            "no vision tower of this type", field="model_type", value=config.model_type, expected=", ".join(TOWER_TYPES)
        )
    if select_feature not in SELECT_FEATURES:
        raise LayoutError(field="select_feature", value=select_feature, expected=", ".join(SELECT_FEATURES))
    if select_feature == "patch" and not has_cls_token(config):
        raise LayoutError(
            f"a {config.model_type} tower has no class token; 'patch' would drop a patch of the image",
            field="select_feature",
            value=select_feature,
            expected="cls_patch",
        )


def check_features(config: PretrainedConfig, select_layer: int, select_feature: str) -> None:
    """Refuse what `select_features` cannot do with a tower. Raises LayoutError as `check_tower` does."""
    check_tower(config, select_feature)
    depth = int(config.num_hidden_layers)
    if not 1 <= _block_index(select_layer, depth) <= depth:
        raise LayoutError(
            f"outside the {depth} blocks of the vision tower",
            field="select_layer",
            value=select_layer,
            expected=f"an integer from 1 to {depth}, or from -{depth} to -1",
        )


def check_image_size(config: PretrainedConfig, image_size: int, scales: Sequence[int] = (), max_split: int = 0) -> None:
    """Refuse images of a size that the tower cannot read. Raises LayoutError.

    scales, max_split: sides of S2 features and of their tiles, in pixels; the tower then reads tiles.
    """
    if not scales:
        if config.model_type not in _ANY_SIZE and image_size != (side := _side(config.image_size, "image_size")):
            raise LayoutError(
                f"the {config.model_type} tower reads {side} pixels", field="image_size", value=image_size
            )
        return
    if min(scales) < 1 or max_split < 1:
        raise LayoutError("scales and tiles are positive", field="s2_scales", value=list(scales))
    for scale in scales:
        tiles = -(-scale // max_split)
        if scale % tiles:
            raise LayoutError(
                f"{scale} pixels cannot be cut into {tiles} equal tiles of at most {max_split}",
                field="s2_scales",
                value=list(scales),
            )
        check_image_size(config, scale // tiles)


def has_cls_token(config: PretrainedConfig) -> bool:
    """Whether the first vector of the tower is that of a class token."""
    return config.model_type not in _WITHOUT_CLS


def _block_index(select_layer: int, depth: int) -> int:
    return select_layer if select_layer >= 0 else depth + 1 + select_layer


def encoder_blocks(tower: nn.Module, depth: int) -> nn.ModuleList:
    """The tower's list of encoder blocks."""
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise LayoutError(f"{type(tower).__name__} has no list of {depth} encoder blocks")


def select_features(
    tower: nn.Module, config: Any, pixels_N3HW: Tensor, select_layer: int, select_feature: str
) -> Tensor:
    """Hidden state `select_layer` of the tower, [N, P, C], before any final norm.

    Hidden states are counted as transformers counts them: 0 is the embeddings, k the output of block k, -1 the last
    block's output. Blocks past the wanted one do not run. Raises LayoutError for a layer that is no block's output,
    and for pictures of another size than the tower's unless it is one that takes any.
    """
    _check_size(config, pixels_N3HW)
    depth = int(config.num_hidden_layers)
    check_features(config, select_layer, select_feature)
    index = _block_index(select_layer, depth)

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    handle = encoder_blocks(tower, depth)[index - 1].register_forward_hook(stop)
    try:
        tower(pixels_N3HW)
    except _Reached as reached:
        features = reached.features
    finally:
        handle.remove()
    return features[:, 1:] if select_feature == "patch" else features


def _check_size(config: Any, pixels_N3HW: Tensor) -> None:
    if config.model_type in _ANY_SIZE:
        return
    side = _side(config.image_size, "image_size")
    height, width = pixels_N3HW.shape[-2:]
    if (height, width) != (side, side):
        raise LayoutError(
            f"pictures of {height} x {width} pixels, but the {config.model_type} tower takes {side} x {side}: the "
            "image size of the vision spec must be the tower's, or be cut into tiles of it (s2_scales)"
        )


def _side(size: int | Sequence[int], name: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise LayoutError(field=name, value=size, expected="a square")
    return int(sides.pop())


def tower_dtype(tower: nn.Module) -> torch.dtype:
    """The dtype of the tower's weights."""
    return next(tower.parameters()).dtype


# --- multiscale
# S2 features (arXiv 2403.13043): one picture seen at several sizes by a tower that takes only one.


# N media items  M tiles  P patches  C tower width  H, W pixels  h, w grid of patches

Encode = Callable[[Tensor], Tensor]
"""Features [M, P, C] of tiles [M, 3, h, w], without a class token."""


def multiscale_features(encode: Encode, pixels_N3HW: Tensor, scales: Sequence[int], max_split: int) -> Tensor:
    """Features [N, P, C * len(scales)], channels from the smallest scale to the largest, P that of the smallest.

    For each scale the picture is resized to it, cut into the fewest equal square tiles of at most `max_split` pixels,
    and encoded tile by tile; the joined feature map is averaged down to the smallest scale's. Resizing is bicubic
    without antialias and in float32, as in the original; a picture that has the scale already is not changed.
    Raises LayoutError for scales that cannot be cut evenly, and for features that are no square grid.
    """
    if not scales or min(scales) < 1 or max_split < 1:
        raise LayoutError(f"S2 needs positive scales and tiles, not scales {list(scales)} and tiles of {max_split}")
    maps = [_feature_map(encode, pixels_N3HW, scale, max_split) for scale in sorted(scales)]
    side = maps[0].shape[-1]
    same_size = [_resize(features_NChw, side, "area") for features_NChw in maps]
    return torch.cat(same_size, dim=1).flatten(2).transpose(1, 2)


def _feature_map(encode: Encode, pixels_N3HW: Tensor, scale: int, max_split: int) -> Tensor:
    splits = math.ceil(scale / max_split)
    if scale % splits:
        raise LayoutError(f"S2 scale {scale} cannot be cut into {splits} equal parts of at most {max_split} pixels")
    features_MPC = encode(_cut(_resize(pixels_N3HW, scale, "bicubic"), splits))
    patches = features_MPC.shape[1]
    side = math.isqrt(patches)
    if side * side != patches:
        raise LayoutError(
            f"S2 needs a square grid of patches, but the tower gives {patches} features for a tile; a class token must "
            "be dropped (select_feature 'patch')"
        )
    return _join(features_MPC.transpose(1, 2).unflatten(2, (side, side)), splits)


def _resize(images: Tensor, side: int, mode: str) -> Tensor:
    return F.interpolate(images.float(), size=(side, side), mode=mode).to(images.dtype)


def _cut(pixels_N3HW: Tensor, splits: int) -> Tensor:
    """Tiles [splits * splits * N, 3, h, w]: row by row, and for each place all pictures."""
    tiles = pixels_N3HW.unflatten(3, (splits, -1)).unflatten(2, (splits, -1))  # N, 3, row, h, column, w
    return tiles.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)


def _join(tiles_MChw: Tensor, splits: int) -> Tensor:
    """Undo `_cut` on feature maps: [N, C, splits * h, splits * w]."""
    places = tiles_MChw.unflatten(0, (splits, splits, -1))  # row, column, N, C, h, w
    return places.permute(2, 3, 0, 4, 1, 5).flatten(4).flatten(2, 3)
