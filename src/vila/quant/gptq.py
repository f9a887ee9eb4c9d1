"""Rounding column by column, each column's error made up for by those that are not rounded yet.

GPTQ, arXiv 2210.17323, on the scales and zeros that AWQ and its clip limits give: the storage is the same, only codes
differ. What is made small is the error of the output on the calibration, in which errors of correlated inputs cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.kernels.int4 import MAX_CODE, Int4Weight, pack_nibbles, unpack_nibbles

# O output channels  I input channels  G groups of a row  T tokens

DAMPING = 0.01
"""Share of the mean second moment that is added to each input's: keeps inputs apart that the calibration does not."""
_COLUMNS = 128
_ROWS = 64
# Scales that nothing pins down stay where they were.
_RIDGE = 1e-3


def second_moment(inputs_TI: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of x x', [I, I] in float32; a token counts as much as its weight says."""
    rows_TI = inputs_TI.float()
    if weights_T is None:
        return rows_TI.T @ rows_TI / len(rows_TI)
    return (rows_TI * (weights_T / weights_T.sum())[:, None]).T @ rows_TI


def output_error(weight_OI: Tensor, values_OI: Tensor, moments_II: Tensor) -> float:
    """Mean over tokens of the squared error of the output, summed over its channels."""
    error_OI = (values_OI - weight_OI).to(moments_II.dtype)
    return float(((error_OI @ moments_II) * error_OI).sum(dtype=torch.float64))


@torch.no_grad()
def gptq_round(weight_OI: Tensor, grid: Int4Weight, moments_II: Tensor, damping: float = DAMPING) -> Int4Weight:
    """The weight on the grid's scales and zeros, its codes chosen with feedback; the grid's own codes are not read.

    Inputs of large moments go first: what is left of their error has the most columns to go to.
    Raises LayoutError when the moments are not those of finite activations.
    """
    order_I = torch.argsort(moments_II.diagonal(), descending=True, stable=True)
    feedback_II = _feedback(moments_II[order_I][:, order_I], damping)
    left_IO = weight_OI.float().T[order_I].contiguous()
    scales_IO = grid.scales.float().T[order_I // grid.group_size].contiguous()
    zeros_IO = grid.zeros.float().T[order_I // grid.group_size].contiguous()
    codes_IO = torch.empty_like(left_IO)
    for start in range(0, len(left_IO), _COLUMNS):
        end = min(start + _COLUMNS, len(left_IO))
        errors_CO = torch.empty_like(left_IO[start:end])
        for place in range(start, end):
            scale_O, zero_O = scales_IO[place], zeros_IO[place]
            code_O = (left_IO[place] / scale_O).round_().add_(zero_O).clamp_(0, MAX_CODE)
            error_O = (left_IO[place] - (code_O - zero_O) * scale_O) / feedback_II[place, place]
            left_IO[place + 1 : end].addr_(feedback_II[place, place + 1 : end], error_O, alpha=-1)
            codes_IO[place], errors_CO[place - start] = code_O, error_O
        left_IO[end:].addmm_(feedback_II[start:end, end:].T, errors_CO, alpha=-1)
    codes_OI = codes_IO[torch.argsort(order_I)].T.to(torch.uint8)
    return Int4Weight(pack_nibbles(codes_OI.contiguous()), grid.scales, grid.zeros, grid.group_size)


def _feedback(moments_II: Tensor, damping: float) -> Tensor:
    """The upper triangle whose rows say how the error of a column goes to the later ones."""
    wide_II = moments_II.double()
    wide_II.diagonal().add_(damping * wide_II.diagonal().mean().clamp(min=1e-30))
    lower_II, failed = torch.linalg.cholesky_ex(wide_II)
    if int(failed) or not bool(torch.isfinite(lower_II).all()):
        raise LayoutError(
            "the activations of a block are not finite or all zero; search in float32, or check the model"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower_II), upper=True).float()


@torch.no_grad()
def refit_scales(weight_OI: Tensor, rounded: Int4Weight, moments_II: Tensor) -> Int4Weight:
    """The same codes and zeros under the scales that give each row the least error of its output.

    All groups of a row together: a least-squares problem of as many unknowns as there are groups. A scale that would
    not be positive stays as it was.
    """
    size = rounded.group_size
    steps_OGK = unpack_nibbles(rounded.codes).unflatten(-1, (-1, size)).float() - rounded.zeros.float()[..., None]
    fitted = [
        _refit(weight, steps, scales, moments_II.unflatten(0, (-1, size)))
        for weight, steps, scales in zip(
            weight_OI.float().split(_ROWS), steps_OGK.split(_ROWS), rounded.scales.float().split(_ROWS), strict=True
        )
    ]
    kept = torch.cat(fitted).to(rounded.scales.dtype)
    usable = kept.isfinite() & (kept > 0)
    return Int4Weight(rounded.codes, torch.where(usable, kept, rounded.scales), rounded.zeros, size)


def _refit(weight_OI: Tensor, steps_OGK: Tensor, scales_OG: Tensor, moments_GKI: Tensor) -> Tensor:
    groups, size = steps_OGK.shape[1:]
    spread_OGI = torch.einsum("ogk,gki->ogi", steps_OGK, moments_GKI)
    normal_OGG = torch.einsum("oghk,ohk->ogh", spread_OGI.unflatten(-1, (groups, size)), steps_OGK)
    target_OG = torch.einsum("ogi,oi->og", spread_OGI, weight_OI)
    pull_OG = _RIDGE * normal_OGG.diagonal(dim1=1, dim2=2) + 1e-12
    solved: Tensor = torch.linalg.solve(normal_OGG + torch.diag_embed(pull_OG), target_OG + pull_OG * scales_OG)
    return solved
