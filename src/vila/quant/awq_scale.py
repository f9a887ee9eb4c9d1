"""AWQ search for channel scales and clip limits of Linears (arXiv 2306.00978): candidates and their output error.

The paper searches over s = x^r. The released code tries r = 0, 0.05 .. 0.95 (not 1) on the mean magnitude of each input
channel over all calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vila.core.errors import LayoutError
from vila.quant.apply import fake_quantize
from vila.quant.quant_config import Clipping, Scaling

# N sequences  S sequence length  T tokens (N x S)  I input channels  O output channels
# G groups per output channel  K channels per group

Rerun = Callable[[Tensor], Tensor]
"""The inspected module on some sequences, [n, S, I] to [n, S, O]."""

GRID = 20
_MIN_SCALE = 1e-4
CLIP_GRID, CLIP_STEPS = 20, 10
CLIP_TOKENS = 512
_CLIP_ROWS = 1024
# The published search does not clip queries and keys: their product is not linear in either.
_NOT_CLIPPED = ("q_", "k_", "query", "key", "Wqkv")


@dataclass(frozen=True, slots=True)
class Candidate:
    """Candidate scale and its ratio r. duo: it also depends on the weights."""

    ratio: float
    scale_I: Tensor
    duo: bool = False


@dataclass(frozen=True, slots=True)
class ScaleChoice:
    """Best candidate, and the losses of all candidates in order."""

    best: Candidate
    losses: tuple[float, ...]


def mean_magnitude(inputs_NSI: Tensor, weights_NS: Tensor | None = None) -> Tensor:
    """Return the mean magnitude of each channel over all tokens, [I]. weights_NS: weights of the tokens."""
    magnitude_TI = inputs_NSI.abs().flatten(0, 1)
    if weights_NS is None:
        return magnitude_TI.mean(0)
    share_T = (weights_NS / weights_NS.sum()).flatten().to(magnitude_TI)
    return share_T @ magnitude_TI


def weight_magnitude(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """Return the mean over output channels of |W| relative to its group's maximum, [I].

    Near 1 for channels that determine the quantization step of their group.
    """
    rows = torch.cat([weight.abs() for weight in weights]).unflatten(-1, (-1, group_size))
    return (rows / (rows.amax(-1, keepdim=True) + 1e-6)).flatten(-2).mean(0)


def candidates(mean_I: Tensor, weight_I: Tensor | None = None, scaling: Scaling = "activation") -> list[Candidate]:
    """Return the candidate scales; the first is always the identity.

    activation: the published grid of 20 ratios.
    duo:        the identity, and x^r / w^(1-r) for 19 ratios 0, 1/18 .. 1; the published form lacks the identity.
    both:       the published grid and those 19.
    """
    out = [Candidate(step / GRID, _normalised(mean_I.pow(step / GRID))) for step in range(GRID)]
    if scaling == "activation" or weight_I is None:
        return out
    steps = [step / (GRID - 2) for step in range(GRID - 1)]
    # The small term avoids infinite scales for channels with weights near zero.
    duo = [Candidate(r, _normalised(mean_I.pow(r) / (weight_I.pow(1 - r) + 1e-4)), True) for r in steps]
    return (out[:1] if scaling == "duo" else out) + duo


def _normalised(scale_I: Tensor) -> Tensor:
    scale_I = scale_I.clamp(min=_MIN_SCALE)
    scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
    return torch.where(torch.isfinite(scale_I), scale_I, torch.ones_like(scale_I))


def search_scale(tried: Sequence[Candidate], loss: Callable[[Tensor], float]) -> ScaleChoice:
    """Return the candidate with the lowest loss; the first of equal ones. loss: takes a scale [I].

    Raises LayoutError if no loss is finite: the model's activations overflow.
    """
    losses = tuple(loss(candidate.scale_I) for candidate in tried)
    least = min((value for value in losses if value == value), default=None)
    if least is None or least == float("inf"):
        raise LayoutError("no scale gives a finite error: the activations overflow", hint="search in float32")
    return ScaleChoice(tried[losses.index(least)], losses)


def trial_weight(weight_OI: Tensor, scale_I: Tensor, group_size: int, symmetric: bool) -> Tensor:
    """Return the effective weight of a Linear that is rounded under this scale."""
    return fake_quantize(weight_OI * scale_I, group_size, symmetric).div_(scale_I)


def linear_loss(
    linear: nn.Linear, inputs_NSI: Tensor, weights_NS: Tensor | None, group_size: int, symmetric: bool
) -> Callable[[Tensor], float]:
    """Return the loss function for a Linear: mean squared error of its own output over tokens and channels.

    With weight error D it equals the mean over outputs of D H D', where H is the mean of x x' over tokens. H is used if
    it is cheaper, with many more tokens than channels.
    """
    weight_OI = linear.weight.detach()
    rows_TI = _weighted(inputs_NSI.flatten(0, 1), weights_NS)
    num_tokens, width = rows_TI.shape
    outputs = weight_OI.shape[0]
    second_II: Tensor | None = None
    if width * (num_tokens + GRID * outputs) < GRID * outputs * num_tokens:
        second_II = rows_TI.T @ rows_TI

    def loss(scale_I: Tensor) -> float:
        error_OI = (trial_weight(weight_OI, scale_I, group_size, symmetric) - weight_OI).to(rows_TI.dtype)
        if second_II is not None:
            return float(((error_OI @ second_II) * error_OI).sum(dtype=torch.float64)) / outputs
        total = sum(float((rows @ error_OI.T).square_().sum(dtype=torch.float64)) for rows in rows_TI.split(4096))
        return total / outputs

    return loss


def module_loss(
    linears: Sequence[nn.Linear],
    rerun: Rerun,
    inputs_NSI: Tensor,
    weights_NS: Tensor | None,
    group_size: int,
    symmetric: bool,
    batch: int,
) -> Callable[[Tensor], float]:
    """Return the loss function for Linears of an inspected module: mean squared error of the module's output.

    batch: sequences per forward pass of the module.
    """
    reference = [rerun(some) for some in inputs_NSI.split(batch)]
    width, wide = reference[0].shape[-1], torch.promote_types(reference[0].dtype, torch.float32)
    relative = None if weights_NS is None else (weights_NS / weights_NS.sum()).split(batch)
    tokens = inputs_NSI.shape[0] * inputs_NSI.shape[1]

    def loss(scale_I: Tensor) -> float:
        total = 0.0
        with replaced_weights(
            linears, [trial_weight(one.weight.detach(), scale_I, group_size, symmetric) for one in linears]
        ):
            for number, some in enumerate(inputs_NSI.split(batch)):
                error_NS = (rerun(some).to(wide) - reference[number]).square_().sum(-1)
                if relative is not None:
                    error_NS = error_NS * relative[number].to(error_NS) * tokens
                total += float(error_NS.sum(dtype=torch.float64))
        return total / (tokens * width)

    return loss


@contextmanager
def replaced_weights(linears: Sequence[nn.Linear], weights: Sequence[Tensor]) -> Iterator[None]:
    """Replace the weights of Linears inside the context; the original tensors are restored."""
    own = [linear.weight for linear in linears]
    try:
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for linear, weight in zip(linears, own, strict=True):
            linear.weight = weight


def _weighted(inputs_TI: Tensor, weights_NS: Tensor | None) -> Tensor:
    """Return tokens times the root of their relative weight, so that sums of squares are means; float32 at least."""
    inputs_TI = inputs_TI.to(torch.promote_types(inputs_TI.dtype, torch.float32))
    if weights_NS is None:
        return inputs_TI * inputs_TI.shape[0] ** -0.5
    share_T = (weights_NS / weights_NS.sum()).flatten().to(inputs_TI)
    return inputs_TI * share_T.sqrt()[:, None]


def is_linear_clipped(linear: str, clipping: Clipping) -> bool:
    """Return whether a Linear, by its name in the block, is clipped."""
    if clipping == "published":
        return not any(part in linear for part in _NOT_CLIPPED)
    return clipping == "all"


def sample_tokens(inputs_TI: Tensor, weights_T: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return every (T // 512)-th token and its weight, after removing tokens of weight 0."""
    if weights_T is not None:
        counted = weights_T > 0
        inputs_TI, weights_T = inputs_TI[counted], weights_T[counted]
    step = max(1, inputs_TI.shape[0] // CLIP_TOKENS)
    return inputs_TI[::step], None if weights_T is None else weights_T[::step]


def second_moments(inputs_TI: Tensor, group_size: int, weights_T: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of x x' within each group of channels, [G, K, K]; float32 at least."""
    inputs_TI = inputs_TI.to(torch.promote_types(inputs_TI.dtype, torch.float32))
    share_T = torch.full_like(inputs_TI[:, 0], 1 / inputs_TI.shape[0])
    if weights_T is not None:
        share_T = (weights_T / weights_T.sum()).to(inputs_TI)
    rows_GTK = (inputs_TI * share_T.sqrt()[:, None]).unflatten(-1, (-1, group_size)).transpose(0, 1)
    return rows_GTK.transpose(1, 2) @ rows_GTK


def search_limits(weight_OI: Tensor, moments_GKK: Tensor, symmetric: bool = False) -> Tensor:
    """Return the clipping limit [O, G] of each group with the lowest output error; of equal errors, the largest limit.

    A smaller maximum gives the group a finer quantization step. With weight error d of a group, the mean over tokens of
    (x . d)^2 is d' M d, which avoids the sum over tokens.
    """
    return torch.cat([_limits(rows_OI, moments_GKK, symmetric) for rows_OI in weight_OI.detach().split(_CLIP_ROWS)])


def _limits(weight_OI: Tensor, moments_GKK: Tensor, symmetric: bool) -> Tensor:
    size = moments_GKK.shape[-1]
    groups_OGK = weight_OI.unflatten(-1, (-1, size))
    max_OG1 = groups_OGK.abs().amax(-1, keepdim=True)
    best_OG1 = max_OG1.clone()
    lowest_OG = torch.full_like(max_OG1[..., 0], torch.inf, dtype=moments_GKK.dtype)
    for step in range(CLIP_STEPS):
        limit_OG1 = max_OG1 * (1 - step / CLIP_GRID)
        clamped_OGK = torch.maximum(torch.minimum(groups_OGK, limit_OG1), -limit_OG1)
        error_OGK = fake_quantize(clamped_OGK.flatten(-2), size, symmetric).view_as(groups_OGK).sub_(groups_OGK)
        error_GOK = error_OGK.to(moments_GKK.dtype).transpose(0, 1)
        loss_OG = ((error_GOK @ moments_GKK) * error_GOK).sum(-1).T
        better_OG = loss_OG < lowest_OG
        lowest_OG = torch.where(better_OG, loss_OG, lowest_OG)
        best_OG1 = torch.where(better_OG[..., None], limit_OG1, best_OG1)
    return best_OG1[..., 0]
