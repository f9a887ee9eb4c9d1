"""S2 features (arXiv 2403.13043): one picture seen at several sizes by a tower that takes only one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vila.core.errors import LayoutError

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
