"""Projectors: from the tower's width to the LLM's, one by one or four neighbouring patches at once."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vila.core.errors import LayoutError

# N media items  P patches  C tower width  D model width

_MLP = re.compile(r"mlp([1-9]\d{0,2})x_gelu")


class MergePatches(nn.Module):
    """The module form of `merge_patches`; it has no parameters."""

    def forward(self, features_NPC: Tensor) -> Tensor:
        """[N, P, C] to [N, P', 4C]."""
        return merge_patches(features_NPC)


def build_projector(kind: str, width_in: int, width_out: int) -> nn.Module:
    """A projector of the published kinds, from [N, P, C] to [N, P', D].

    identity:       nothing; both widths must be the same.
    linear:         Linear.
    mlpNx_gelu:     Linear, then N - 1 times GELU and Linear.
    mlp_downsample: `merge_patches`, LayerNorm, Linear, GELU, Linear: the only type with P' < P.

    Parameters have the published names: none, `weight`, `0.weight`, `2.weight` ..., and `1.weight`, `2.weight`,
    `4.weight`, each with its bias. Raises LayoutError for another kind, or an identity that would change the width.
    """
    check_projector(kind)
    if kind == "identity":
        if width_in != width_out:
            raise LayoutError(
                f"cannot turn {width_in} channels into the LLM's {width_out}", field="projector_type", value=kind
            )
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width_in, width_out)
    if kind == "mlp_downsample":
        merged = 4 * width_in
        first, last = nn.Linear(merged, width_out), nn.Linear(width_out, width_out)
        return nn.Sequential(MergePatches(), nn.LayerNorm(merged, eps=1e-5), first, nn.GELU(), last)
    layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
    for _ in range(int(kind[3 : kind.index("x")]) - 1):
        layers += [nn.GELU(), nn.Linear(width_out, width_out)]
    return nn.Sequential(*layers)


def num_projected_tokens(kind: str, patches: int) -> int:
    """How many vectors a projector makes of a picture's `patches`: 729 become 196 with `mlp_downsample`.

    Raises LayoutError for an unknown kind, and for patches that are no square grid where the kind needs one.
    """
    check_projector(kind)
    return math.ceil(_grid_side(patches) / 2) ** 2 if kind == "mlp_downsample" else patches


def merge_patches(features_NPC: Tensor) -> Tensor:
    """Every 2 x 2 block of a square grid becomes one vector, [N, P', 4C].

    An odd grid first gets one more row and column of zeros, at the bottom and at the right. A vector holds its block's
    patches in reading order. Vectors come column by column, as the original's projector was trained: the patches 1..16
    of a 4 x 4 grid give [1, 2, 5, 6], [9, 10, 13, 14], [3, 4, 7, 8], [11, 12, 15, 16].
    Raises LayoutError when P is no square.
    """
    side = _grid_side(features_NPC.shape[1])
    grid = features_NPC.unflatten(1, (side, side))
    grid = F.pad(grid, (0, 0, 0, side % 2, 0, side % 2))
    blocks = grid.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # N, row of blocks, row, column of blocks, column, C
    return blocks.permute(0, 3, 1, 2, 4, 5).flatten(3).flatten(1, 2)


@torch.no_grad()
def calibrate_projector(projector: nn.Module, features_NPC: Tensor, rms: float) -> None:
    """Initialise a fresh projector from data, so that training starts with well-scaled inputs and outputs.

    The first Linear is composed with the standardisation of each channel that reaches it when `features_NPC` go
    through the projector; the last one is scaled so that its outputs have root mean square `rms` (that of the LLM's
    token embeddings). Raises LayoutError for a projector without a Linear.
    """
    linears = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise LayoutError("an identity projector has no weights to calibrate; set projector_init to 'random'")
    first, last = linears[0], linears[-1]
    features_NPC = features_NPC.to(first.weight.dtype)
    flat = _inputs_of(first, projector, features_NPC).flatten(0, -2).float()
    mean, std = flat.mean(0), flat.std(0).clamp_min(1e-4)
    weight = first.weight.float() / std
    first.bias.copy_(first.bias.float() - weight @ mean)
    first.weight.copy_(weight)
    scale = rms / projector(features_NPC).float().square().mean().sqrt().item()
    last.weight.mul_(scale)
    last.bias.mul_(scale)


def _inputs_of(module: nn.Module, projector: nn.Module, features_NPC: Tensor) -> Tensor:
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: Any) -> None:
        seen.append(args[0])

    handle = module.register_forward_pre_hook(keep)
    try:
        projector(features_NPC)
    finally:
        handle.remove()
    return seen[0]


def check_projector(kind: str) -> None:
    """Raises LayoutError for a kind of projector that does not exist."""
    if kind not in ("identity", "linear", "mlp_downsample") and not _MLP.fullmatch(kind):
        raise LayoutError(
            field="projector_type", value=kind, expected="identity, linear, mlpNx_gelu (N = 1 to 999) or mlp_downsample"
        )


def _grid_side(patches: int) -> int:
    side = math.isqrt(patches)
    if side * side != patches:
        raise LayoutError(
            f"{patches} patches are no square grid, so 2 x 2 neighbours cannot be merged; a class token must be "
            "dropped first (select_feature 'patch')"
        )
    return side
