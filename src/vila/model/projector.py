"""Projectors from the tower's width to the LLM's width, with or without merging of 2 x 2 neighbouring patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vila.core.errors import LayoutError
from vila.model.vision_sizes import check_projector, grid_side

# N images  P patches  C tower width  D model width


class MergePatches(nn.Module):
    """`merge_patches` as a module without parameters."""

    def forward(self, features_NPC: Tensor) -> Tensor:
        """[N, P, C] to [N, P', 4C]."""
        return merge_patches(features_NPC)


def build_projector(projector_type: str, width_in: int, width_out: int) -> nn.Module:
    """Build a projector from [N, P, C] to [N, P', D].

    identity:       no layer; both widths must be equal.
    linear:         Linear.
    mlpNx_gelu:     Linear, then N - 1 times GELU and Linear.
    mlp_downsample: `merge_patches`, LayerNorm, Linear, GELU, Linear; the only type with P' < P.

    Parameters have the published names: none, `weight`, `0.weight`, `2.weight` ..., and `1.weight`, `2.weight`,
    `4.weight`, each with its bias. Raises LayoutError for an unknown type, or an identity that would change the width.
    """
    check_projector(projector_type)
    if projector_type == "identity":
        if width_in != width_out:
            raise LayoutError(
                f"the tower has {width_in} channels, the LLM {width_out}", field="projector_type", value=projector_type
            )
        return nn.Identity()
    if projector_type == "linear":
        return nn.Linear(width_in, width_out)
    if projector_type == "mlp_downsample":
        merged = 4 * width_in
        first, last = nn.Linear(merged, width_out), nn.Linear(width_out, width_out)
        return nn.Sequential(MergePatches(), nn.LayerNorm(merged, eps=1e-5), first, nn.GELU(), last)
    layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
    for _ in range(int(projector_type[3 : projector_type.index("x")]) - 1):
        layers += [nn.GELU(), nn.Linear(width_out, width_out)]
    return nn.Sequential(*layers)


def merge_patches(features_NPC: Tensor) -> Tensor:
    """Concatenate every 2 x 2 block of a square grid of patches into one vector: [N, P, C] to [N, P', 4C].

    An odd grid is zero-padded at the bottom and right. Within a vector, patches are in reading order. Vectors are in
    column-major order, as in the released projectors: patches 1..16 of a 4 x 4 grid give [1, 2, 5, 6], [9, 10, 13, 14],
    [3, 4, 7, 8], [11, 12, 15, 16]. Raises LayoutError if P is not a square number.
    """
    side = grid_side(features_NPC.shape[1])
    grid = features_NPC.unflatten(1, (side, side))
    grid = F.pad(grid, (0, 0, 0, side % 2, 0, side % 2))
    blocks = grid.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # N, block row, row, block column, column, C
    return blocks.permute(0, 3, 1, 2, 4, 5).flatten(3).flatten(1, 2)


@torch.no_grad()
def calibrate_projector(projector: nn.Module, features_NPC: Tensor, rms: float) -> None:
    """Initialise a new projector from data, so that training starts with well-scaled inputs and outputs.

    The first Linear absorbs the standardisation of its input channels, measured on `features_NPC`; the last Linear is
    scaled so that its outputs have root mean square `rms` (that of the LLM's token embeddings).
    Raises LayoutError for a projector without a Linear.
    """
    linears = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise LayoutError("an identity projector has no weights to calibrate", hint="set projector_init to 'random'")
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
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        projector(features_NPC)
    finally:
        handle.remove()
    return inputs[0]
