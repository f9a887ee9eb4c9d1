"""The search for clip limits: a smaller greatest weight of a group makes the steps of all its weights finer.

AWQ, arXiv 2306.00978. As the released code: each group of a row is judged on its own partial output, on 512 to 1023
tokens, with limits 1, 0.95 .. 0.55 of the greatest magnitude; scales are folded before.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vila.quant.rounding import fake_quantize

# T tokens  I input channels  O output channels  G groups of a row  K channels of a group

Clipping = Literal["none", "published", "all"]

STEPS = 10
GRID = 20
TOKENS = 512
_ROWS = 1024
# The published search leaves out queries and keys: their product has no linear error.
_LEFT_OUT = ("q_", "k_", "query", "key", "Wqkv")


def is_clipped(linear: str, clipping: Clipping) -> bool:
    """Whether the Linear of this name, inside its block, gets limits."""
    if clipping == "published":
        return not any(part in linear for part in _LEFT_OUT)
    return clipping == "all"


def sample_tokens(inputs_TI: Tensor, weights_T: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Every (T // 512)-th token, and their weights; tokens of weight 0 are left out first."""
    if weights_T is not None:
        counted = weights_T > 0
        inputs_TI, weights_T = inputs_TI[counted], weights_T[counted]
    step = max(1, inputs_TI.shape[0] // TOKENS)
    return inputs_TI[::step], None if weights_T is None else weights_T[::step]


def second_moments(inputs_TI: Tensor, group_size: int, weights_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of x x' inside each group of channels, [G, K, K], in float32 at least."""
    inputs_TI = inputs_TI.to(torch.promote_types(inputs_TI.dtype, torch.float32))
    share_T = torch.full_like(inputs_TI[:, 0], 1 / inputs_TI.shape[0])
    if weights_T is not None:
        share_T = (weights_T / weights_T.sum()).to(inputs_TI)
    rows_GTK = (inputs_TI * share_T.sqrt()[:, None]).unflatten(-1, (-1, group_size)).transpose(0, 1)
    return rows_GTK.transpose(1, 2) @ rows_GTK


def search_limits(weight_OI: Tensor, moments_GKK: Tensor, symmetric: bool = False) -> Tensor:
    """The limit of each group that gives the least error of its partial output, [O, G]; of equal ones the greatest.

    The mean over tokens of (x . d)^2, d being the error of a group's weights, is d' M d: as good as the sum over
    tokens, and a fraction of the work.
    """
    return torch.cat([_limits(rows_OI, moments_GKK, symmetric) for rows_OI in weight_OI.detach().split(_ROWS)])


def _limits(weight_OI: Tensor, moments_GKK: Tensor, symmetric: bool) -> Tensor:
    size = moments_GKK.shape[-1]
    groups_OGK = weight_OI.unflatten(-1, (-1, size))
    greatest_OG1 = groups_OGK.abs().amax(-1, keepdim=True)
    best_OG1 = greatest_OG1.clone()
    least_OG = torch.full_like(greatest_OG1[..., 0], torch.inf, dtype=moments_GKK.dtype)
    for step in range(STEPS):
        limit_OG1 = greatest_OG1 * (1 - step / GRID)
        clamped_OGK = torch.maximum(torch.minimum(groups_OGK, limit_OG1), -limit_OG1)
        error_OGK = fake_quantize(clamped_OGK.flatten(-2), size, symmetric).view_as(groups_OGK).sub_(groups_OGK)
        error_GOK = error_OGK.to(moments_GKK.dtype).transpose(0, 1)
        loss_OG = ((error_GOK @ moments_GKK) * error_GOK).sum(-1).T
        better_OG = loss_OG < least_OG
        least_OG = torch.where(better_OG, loss_OG, least_OG)
        best_OG1 = torch.where(better_OG[..., None], limit_OG1, best_OG1)
    return best_OG1[..., 0]
