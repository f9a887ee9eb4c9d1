"""Vision towers: features of a selected layer of a transformers encoder, S2 multi-scale features (arXiv 2403.13043)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from vila.core.errors import LayoutError

# N images  M tiles  P patches  C tower width  H, W pixels  h, w grid of patches

TOWER_TYPES = ("clip_vision_model", "siglip_vision_model", "dinov2", "internvl_vision")
SELECT_FEATURES = ("patch", "cls_patch")
_WITHOUT_CLS = ("siglip_vision_model",)
_ANY_SIZE = ("dinov2",)
"""Towers that interpolate their position embeddings by design, so that images may have any size."""


class _StopForward(Exception):
    """Carries features out of the tower's forward pass, so that later blocks do not run."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def num_patches(config: PretrainedConfig, image_size: int) -> int:
    """Return the number of patches of a square image of `image_size` pixels.

    CLIP and SigLIP ignore a remainder at the border (384 pixels are 27 patches of 14). Raises LayoutError for patches
    that are not square, for images smaller than a patch, and for a remainder that the tower does not ignore.
    """
    patch = _side(config.patch_size, "patch_size")
    if image_size < patch or (config.model_type in _ANY_SIZE and image_size % patch):
        raise LayoutError(
            field="image_size", value=image_size, expected=f"a multiple of the tower's patch size {patch}"
        )
    return (image_size // patch) ** 2


def check_tower(config: PretrainedConfig, select_feature: str) -> None:
    """Raise LayoutError for an unsupported tower type, or a feature selection that would silently be wrong."""
    if config.model_type not in TOWER_TYPES:
        raise LayoutError(
            "unknown vision tower", field="model_type", value=config.model_type, expected=", ".join(TOWER_TYPES)
        )
    if select_feature not in SELECT_FEATURES:
        raise LayoutError(field="select_feature", value=select_feature, expected=", ".join(SELECT_FEATURES))
    if select_feature == "patch" and not has_cls_token(config):
        problem = f"a {config.model_type} tower has no class token; 'patch' would drop an image patch"
        raise LayoutError(problem, field="select_feature", value=select_feature, expected="cls_patch")


def check_features(config: PretrainedConfig, select_layer: int, select_feature: str) -> None:
    """Raise LayoutError for a layer or feature selection that `select_features` does not support."""
    check_tower(config, select_feature)
    depth = int(config.num_hidden_layers)
    if not 1 <= block_index(select_layer, depth) <= depth:
        problem = f"outside the {depth} blocks of the vision tower"
        expected = f"an integer from 1 to {depth}, or from -{depth} to -1"
        raise LayoutError(problem, field="select_layer", value=select_layer, expected=expected)


def check_image_size(config: PretrainedConfig, image_size: int, scales: Sequence[int] = (), max_split: int = 0) -> None:
    """Raise LayoutError for an image size that the tower does not accept.

    scales, max_split: image sizes of S2 features and maximum tile size, in pixels; the tower then encodes tiles.
    """
    if not scales:
        if config.model_type not in _ANY_SIZE and image_size != (side := _side(config.image_size, "image_size")):
            raise LayoutError(f"the {config.model_type} tower expects {side}", field="image_size", value=image_size)
        return
    for scale, splits in _num_splits(scales, max_split):
        check_image_size(config, scale // splits)


def _num_splits(scales: Sequence[int], max_split: int) -> list[tuple[int, int]]:
    """Return each scale, ascending, and its number of tiles along a side. Raises LayoutError for an uneven split."""
    if not scales or min(scales) < 1 or max_split < 1:
        raise LayoutError("scales and tile size must be positive", field="s2_scales", value=list(scales))
    splits = [(scale, math.ceil(scale / max_split)) for scale in sorted(scales)]
    for scale, number in splits:
        if scale % number:
            problem = f"{scale} pixels cannot be split into {number} equal tiles of at most {max_split}"
            raise LayoutError(problem, field="s2_scales", value=list(scales))
    return splits


def has_cls_token(config: PretrainedConfig) -> bool:
    """Return whether the first feature of the tower is a class token."""
    return config.model_type not in _WITHOUT_CLS


def block_index(select_layer: int, depth: int) -> int:
    """Return the hidden state `select_layer` of a tower of `depth` blocks, counted from the start."""
    return select_layer if select_layer >= 0 else depth + 1 + select_layer


def encoder_blocks(tower: nn.Module, depth: int) -> nn.ModuleList:
    """Return the tower's list of `depth` encoder blocks. Raises LayoutError if there is none."""
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise LayoutError(f"{type(tower).__name__} has no list of {depth} encoder blocks")


def select_features(
    tower: nn.Module, config: Any, pixels_N3HW: Tensor, select_layer: int, select_feature: str
) -> Tensor:
    """Return hidden state `select_layer` of the tower, [N, P, C], before any final norm.

    Hidden states are numbered as in transformers: 0 is the embeddings, k the output of block k, -1 the last block's
    output. Blocks after the selected one do not run. Raises LayoutError for a layer that is not the output of a block,
    and for images of an unsupported size.
    """
    _check_size(config, pixels_N3HW)
    depth = int(config.num_hidden_layers)
    check_features(config, select_layer, select_feature)
    index = block_index(select_layer, depth)

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _StopForward(output[0] if isinstance(output, tuple) else output)

    handle = encoder_blocks(tower, depth)[index - 1].register_forward_hook(stop)
    try:
        tower(pixels_N3HW)
    except _StopForward as stopped:
        features = stopped.features
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
            f"images of {height} x {width} pixels, but the {config.model_type} tower expects {side} x {side}",
            hint="set the image size of the vision spec to the tower's, or split images into tiles (s2_scales)",
        )


def _side(size: int | Sequence[int], name: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise LayoutError(field=name, value=size, expected="a square")
    return int(sides.pop())


def side_of(size: int | Sequence[int]) -> int:
    """Return the side of a square, which some configs store as two equal numbers."""
    return size if isinstance(size, int) else size[0]


def tower_dtype(tower: nn.Module) -> torch.dtype:
    """Return the dtype of the tower's weights."""
    return next(tower.parameters()).dtype


Encode = Callable[[Tensor], Tensor]
"""Features [M, P, C] of tiles [M, 3, h, w], without a class token."""


def multiscale_features(encode: Encode, pixels_N3HW: Tensor, scales: Sequence[int], max_split: int) -> Tensor:
    """Return S2 features [N, P, C * len(scales)], channels ordered by ascending scale; P is that of the smallest scale.

    For each scale, images are resized to it, split into the fewest equal square tiles of at most `max_split` pixels,
    and encoded tile by tile; the joined feature map is averaged down to that of the smallest scale. As in the released
    code, resizing is bicubic in float32 without antialiasing, and skipped for images that already have the size.
    Raises LayoutError for scales that cannot be split evenly, and for features that are not a square grid.
    """
    maps = [_feature_map(encode, pixels_N3HW, *one) for one in _num_splits(scales, max_split)]
    side = maps[0].shape[-1]
    same_size = [_resize(features_NChw, side, "area") for features_NChw in maps]
    return torch.cat(same_size, dim=1).flatten(2).transpose(1, 2)


def _feature_map(encode: Encode, pixels_N3HW: Tensor, scale: int, splits: int) -> Tensor:
    features_MPC = encode(_split_tiles(_resize(pixels_N3HW, scale, "bicubic"), splits))
    patches = features_MPC.shape[1]
    side = math.isqrt(patches)
    if side * side != patches:
        problem = f"S2 needs a square grid of patches, but the tower returns {patches} features per tile"
        raise LayoutError(problem, hint="drop the class token with select_feature 'patch'")
    return _join_tiles(features_MPC.transpose(1, 2).unflatten(2, (side, side)), splits)


def _resize(images: Tensor, side: int, mode: str) -> Tensor:
    return F.interpolate(images.float(), size=(side, side), mode=mode).to(images.dtype)


def _split_tiles(pixels_N3HW: Tensor, splits: int) -> Tensor:
    """Split images into tiles [splits * splits * N, 3, h, w], tile-major in reading order."""
    tiles = pixels_N3HW.unflatten(3, (splits, -1)).unflatten(2, (splits, -1))  # N, 3, row, h, column, w
    return tiles.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)


def _join_tiles(tiles_MChw: Tensor, splits: int) -> Tensor:
    """Inverse of `_split_tiles` for feature maps: [N, C, splits * h, splits * w]."""
    grid = tiles_MChw.unflatten(0, (splits, splits, -1))  # row, column, N, C, h, w
    return grid.permute(2, 3, 0, 4, 1, 5).flatten(4).flatten(2, 3)
