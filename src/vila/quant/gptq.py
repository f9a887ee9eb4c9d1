"""GPTQ (arXiv 2210.17323) on the scales and zero points of AWQ: only the INT4 codes differ from round to nearest.

Input channels are rounded one by one, and each rounding error is compensated in the channels that are not rounded yet.
This minimises the output error on the calibration, where errors of correlated inputs cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.kernels.int4 import MAX_CODE, Int4Weight, pack_nibbles, unpack_nibbles

# O output channels  I input channels  G groups per output channel  T tokens  C columns of a block

DAMPING = 0.01
"""Fraction of the mean second moment that is added to the diagonal, for a well-conditioned Cholesky factor."""
_COLUMNS = 128
_ROWS = 64
# Ridge penalty that keeps scales near their old values where the calibration does not determine them.
_RIDGE = 1e-3


def second_moment(inputs_TI: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of x x', [I, I] float32. weights_T: weights of the tokens."""
    rows_TI = inputs_TI.float()
    if weights_T is None:
        return rows_TI.T @ rows_TI / len(rows_TI)
    return (rows_TI * (weights_T / weights_T.sum())[:, None]).T @ rows_TI


@torch.no_grad()
def gptq_round(weight_OI: Tensor, grid: Int4Weight, moments_II: Tensor, damping: float = DAMPING) -> Int4Weight:
    """Return the weight with GPTQ codes on the scales and zero points of `grid`, whose own codes are not read.

    Inputs with large second moments are rounded first, when most columns are left to compensate their error.
    Raises LayoutError for moments of activations that are not finite.
    """
    order_I = torch.argsort(moments_II.diagonal(), descending=True, stable=True)
    compensation_II = _compensation(moments_II[order_I][:, order_I], damping)
    rest_IO = weight_OI.float().T[order_I].contiguous()
    scales_IO = grid.scales.float().T[order_I // grid.group_size].contiguous()
    zeros_IO = grid.zeros.float().T[order_I // grid.group_size].contiguous()
    codes_IO = torch.empty_like(rest_IO)
    for start in range(0, len(rest_IO), _COLUMNS):
        end = min(start + _COLUMNS, len(rest_IO))
        errors_CO = torch.empty_like(rest_IO[start:end])
        for row in range(start, end):
            scale_O, zero_O = scales_IO[row], zeros_IO[row]
            code_O = (rest_IO[row] / scale_O).round_().add_(zero_O).clamp_(0, MAX_CODE)
            error_O = (rest_IO[row] - (code_O - zero_O) * scale_O) / compensation_II[row, row]
            rest_IO[row + 1 : end].addr_(compensation_II[row, row + 1 : end], error_O, alpha=-1)
            codes_IO[row], errors_CO[row - start] = code_O, error_O
        rest_IO[end:].addmm_(compensation_II[start:end, end:].T, errors_CO, alpha=-1)
    codes_OI = codes_IO[torch.argsort(order_I)].T.to(torch.uint8)
    return Int4Weight(pack_nibbles(codes_OI.contiguous()), grid.scales, grid.zeros, grid.group_size)


def _compensation(moments_II: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse moments: row i distributes the error of input i to later ones."""
    wide_II = moments_II.double()
    wide_II.diagonal().add_(damping * wide_II.diagonal().mean().clamp(min=1e-30))
    lower_II, failed = torch.linalg.cholesky_ex(wide_II)
    if int(failed) or not bool(torch.isfinite(lower_II).all()):
        raise LayoutError(
            "the activations of a block are not finite or all zero", hint="search in float32, or check the model"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower_II), upper=True).float()


@torch.no_grad()
def refit_scales(weight_OI: Tensor, rounded: Int4Weight, moments_II: Tensor) -> Int4Weight:
    """Return the same codes and zero points with the scales that minimise the output error.

    One least-squares problem per output channel, with a scale per group as unknowns. A scale that would not be positive
    is not changed.
    """
    size = rounded.group_size
    steps_OGK = unpack_nibbles(rounded.codes).unflatten(-1, (-1, size)).float() - rounded.zeros.float()[..., None]
    fitted = [
        _refit(weight, steps, scales, moments_II.unflatten(0, (-1, size)))
        for weight, steps, scales in zip(
            weight_OI.float().split(_ROWS), steps_OGK.split(_ROWS), rounded.scales.float().split(_ROWS), strict=True
        )
    ]
    refitted = torch.cat(fitted).to(rounded.scales.dtype)
    usable = refitted.isfinite() & (refitted > 0)
    return Int4Weight(rounded.codes, torch.where(usable, refitted, rounded.scales), rounded.zeros, size)


def _refit(weight_OI: Tensor, steps_OGK: Tensor, scales_OG: Tensor, moments_GKI: Tensor) -> Tensor:
    groups, size = steps_OGK.shape[1:]
    spread_OGI = torch.einsum("ogk,gki->ogi", steps_OGK, moments_GKI)
    normal_OGG = torch.einsum("oghk,ohk->ogh", spread_OGI.unflatten(-1, (groups, size)), steps_OGK)
    target_OG = torch.einsum("ogi,oi->og", spread_OGI, weight_OI)
    pull_OG = _RIDGE * normal_OGG.diagonal(dim1=1, dim2=2) + 1e-12
    solved: Tensor = torch.linalg.solve(normal_OGG + torch.diag_embed(pull_OG), target_OG + pull_OG * scales_OG)
    return solved
