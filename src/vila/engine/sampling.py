"""From logits to tokens: pure functions, each transform with the result of transformers' own.

Nothing here mixes rows, so what is drawn for a row does not depend on its neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from vila.engine.request import SamplingParams, TokenLogprob

# B rows  V vocab  K kept or reported tokens


def penalize_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make the tokens of `seen_BV` (bool) less likely: logits above 0 are divided by the penalty, others multiplied."""
    penalized = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, penalized, logits_BV)


def scale_temperature(logits_BV: Tensor, temperature: float) -> Tensor:
    """Logits divided by a temperature above 0."""
    return logits_BV / temperature


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """All but the `k` greatest logits become -inf; whatever equals the k-th stays too."""
    least_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """The least likely tokens, as many as together have at most probability 1 - p, become -inf; one always stays."""
    ascending_BV, order_BV = logits_BV.sort(dim=-1)
    drop_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - p
    drop_BV[:, -1] = False
    return logits_BV.masked_fill(torch.zeros_like(drop_BV).scatter(1, order_BV, drop_BV), -torch.inf)


def keep_min_p(logits_BV: Tensor, p: float) -> Tensor:
    """Tokens less likely than `p` times the likeliest become -inf."""
    probabilities_BV = logits_BV.softmax(-1)
    return logits_BV.masked_fill(probabilities_BV < p * probabilities_BV.amax(-1, keepdim=True), -torch.inf)


def shape_logits(logits_BV: Tensor, seen_BV: Tensor | None, sampling: SamplingParams) -> Tensor:
    """All transforms that the sampling asks for, in transformers' order; greedy choice needs the penalty alone.

    seen_BV: bool, the tokens of each row's text so far; None where there is no repetition penalty.
    """
    if seen_BV is not None:
        logits_BV = penalize_repetition(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits_BV
    logits_BV = scale_temperature(logits_BV, sampling.temperature)
    if sampling.top_k:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    if sampling.min_p > 0:
        logits_BV = keep_min_p(logits_BV, sampling.min_p)
    return logits_BV


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Token ids [B] drawn by inverting each row's cumulative distribution at a number of [0, 1), float64."""
    mass_BV = logits_BV.softmax(-1).double().cumsum(-1)
    return torch.searchsorted(mass_BV, uniform_B[:, None] * mass_BV[:, -1:], right=True)[:, 0]


def row_generator(seed: int, row: int) -> torch.Generator:
    """The random numbers of one conversation: those of its seed and its place in the batch, whoever else is there."""
    digest = hashlib.sha256(f"{seed}/{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def report_logprobs(logits_BV: Tensor, ids_B: Tensor, count: int) -> Sequence[TokenLogprob]:
    """For each row the chosen token's log-probability and those of the `count` likeliest tokens."""
    logprobs_BV = logits_BV.log_softmax(-1)
    top = logprobs_BV.topk(min(count, logits_BV.shape[-1]), dim=-1)
    rows = zip(
        ids_B.tolist(),
        logprobs_BV.gather(1, ids_B[:, None])[:, 0].tolist(),
        top.indices.tolist(),
        top.values.tolist(),
        strict=True,
    )
    return [TokenLogprob(id_, own, tuple(zip(ids, values, strict=True))) for id_, own, ids, values in rows]
