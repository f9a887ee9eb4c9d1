"""Checks of vision towers and projectors, and token counts, from configs alone. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from vila.core.errors import LayoutError

TOWER_TYPES = ("clip_vision_model", "siglip_vision_model", "dinov2", "internvl_vision")
SELECT_FEATURES = ("patch", "cls_patch")
_WITHOUT_CLS = ("siglip_vision_model",)
ANY_SIZE = ("dinov2",)
"""Towers that interpolate their position embeddings by design, so that images may have any size."""
_MLP = re.compile(r"mlp([1-9]\d{0,2})x_gelu")


def num_patches(config: Any, image_size: int) -> int:
    """Return the number of patches of a square image of `image_size` pixels.

    CLIP and SigLIP ignore a remainder at the border (384 pixels are 27 patches of 14). Raises LayoutError for patches
    that are not square, for images smaller than a patch, and for a remainder that the tower does not ignore.
    """
    patch = check_square(config.patch_size, "patch_size")
    if image_size < patch or (config.model_type in ANY_SIZE and image_size % patch):
        raise LayoutError(
            field="image_size", value=image_size, expected=f"a multiple of the tower's patch size {patch}"
        )
    return (image_size // patch) ** 2


def check_tower(config: Any, select_feature: str) -> None:
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


def check_features(config: Any, select_layer: int, select_feature: str) -> None:
    """Raise LayoutError for a layer or feature selection that `select_features` does not support."""
    check_tower(config, select_feature)
    depth = int(config.num_hidden_layers)
    if not 1 <= block_index(select_layer, depth) <= depth:
        problem = f"outside the {depth} blocks of the vision tower"
        expected = f"an integer from 1 to {depth}, or from -{depth} to -1"
        raise LayoutError(problem, field="select_layer", value=select_layer, expected=expected)


def check_image_size(config: Any, image_size: int, scales: Sequence[int] = (), max_split: int = 0) -> None:
    """Raise LayoutError for an image size that the tower does not accept.

    scales, max_split: image sizes of S2 features and maximum tile size, in pixels; the tower then encodes tiles.
    """
    if not scales:
        if config.model_type not in ANY_SIZE and image_size != (side := check_square(config.image_size, "image_size")):
            raise LayoutError(f"the {config.model_type} tower expects {side}", field="image_size", value=image_size)
        return
    for scale, splits in num_splits(scales, max_split):
        check_image_size(config, scale // splits)


def num_splits(scales: Sequence[int], max_split: int) -> list[tuple[int, int]]:
    """Return each scale, ascending, and its number of tiles along a side. Raises LayoutError for an uneven split."""
    if not scales or min(scales) < 1 or max_split < 1:
        raise LayoutError("scales and tile size must be positive", field="s2_scales", value=list(scales))
    splits = [(scale, math.ceil(scale / max_split)) for scale in sorted(scales)]
    for scale, number in splits:
        if scale % number:
            problem = f"{scale} pixels cannot be split into {number} equal tiles of at most {max_split}"
            raise LayoutError(problem, field="s2_scales", value=list(scales))
    return splits


def has_cls_token(config: Any) -> bool:
    """Return whether the first feature of the tower is a class token."""
    return config.model_type not in _WITHOUT_CLS


def block_index(select_layer: int, depth: int) -> int:
    """Return the hidden state `select_layer` of a tower of `depth` blocks, counted from the start."""
    return select_layer if select_layer >= 0 else depth + 1 + select_layer


def check_square(size: int | Sequence[int], name: str) -> int:
    """Return the side of a square. Raises LayoutError with the field `name` if it is none."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise LayoutError(field=name, value=size, expected="a square")
    return int(sides.pop())


def side_of(size: int | Sequence[int]) -> int:
    """Return the side of a square, which some configs store as two equal numbers."""
    return size if isinstance(size, int) else size[0]


def num_projected_tokens(projector_type: str, num_patches: int) -> int:
    """Return the number of projected features of an image with `num_patches`: 729 become 196 with `mlp_downsample`.

    Raises LayoutError for an unknown type, and if merging needs a square grid of patches and there is none.
    """
    check_projector(projector_type)
    return math.ceil(grid_side(num_patches) / 2) ** 2 if projector_type == "mlp_downsample" else num_patches


def check_projector(projector_type: str) -> None:
    """Raise LayoutError for an unknown projector type."""
    if projector_type not in ("identity", "linear", "mlp_downsample") and not _MLP.fullmatch(projector_type):
        expected = "identity, linear, mlpNx_gelu (N = 1 to 999) or mlp_downsample"
        raise LayoutError(field="projector_type", value=projector_type, expected=expected)


def grid_side(patches: int) -> int:
    """Return the side of a square grid of patches. Raises LayoutError if it is not square."""
    side = math.isqrt(patches)
    if side * side != patches:
        problem = f"{patches} patches are not a square grid, so 2 x 2 neighbours cannot be merged"
        raise LayoutError(problem, hint="drop the class token with select_feature 'patch'")
    return side
