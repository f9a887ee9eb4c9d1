"""Vision towers: features of a selected layer of a transformers encoder, S2 multi-scale features (arXiv 2403.13043)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vila.core.errors import LayoutError
from vila.model.vision_sizes import ANY_SIZE, block_index, check_features, check_square, num_splits

# N images  M tiles  P patches  C tower width  H, W pixels  h, w grid of patches


class _StopForward(Exception):
    """Carries features out of the tower's forward pass, so that later blocks do not run."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


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
    if config.model_type in ANY_SIZE:
        return
    side = check_square(config.image_size, "image_size")
    height, width = pixels_N3HW.shape[-2:]
    if (height, width) != (side, side):
        raise LayoutError(
            f"images of {height} x {width} pixels, but the {config.model_type} tower expects {side} x {side}",
            hint="set the image size of the vision spec to the tower's, or split images into tiles (s2_scales)",
        )


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
    maps = [_feature_map(encode, pixels_N3HW, *one) for one in num_splits(scales, max_split)]
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
