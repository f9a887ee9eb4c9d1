"""Learning-rate schedule: linear warm-up, then half a cosine to zero, over the run's budget of tokens or samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vila.train.checkpoint import Progress


def lr_multiplier(budget_fraction: float, warmup_ratio: float) -> float:
    """Return the factor (0..1) on the peak learning rates after `budget_fraction` (0..1) of the budget."""
    if budget_fraction < warmup_ratio:
        return (budget_fraction + 1e-3) / (warmup_ratio + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (budget_fraction - warmup_ratio) / (1 - warmup_ratio))))


@dataclass(frozen=True, slots=True)
class LRSchedule:
    """Learning-rate schedule of a run. Exactly one of `max_tokens` and `max_visits` is set.

    warmup_ratio: fraction (0..1) of the budget with a rising learning rate.
    max_tokens:   budget in tokens (`budget.tokens`).
    max_visits:   budget in sample visits (`budget.epochs` times the length of an epoch).
    """

    warmup_ratio: float
    max_tokens: int | None = None
    max_visits: int | None = None

    def budget_fraction(self, progress: Progress) -> float:
        """Return the fraction of the budget that is used up; the last step may exceed 1."""
        if self.max_visits is not None:
            return progress.visits / self.max_visits
        assert self.max_tokens is not None
        return progress.tokens / self.max_tokens

    def multiplier(self, progress: Progress) -> float:
        """Return the factor on the peak learning rates for the next step."""
        return lr_multiplier(self.budget_fraction(progress), self.warmup_ratio)
