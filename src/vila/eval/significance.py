"""Bootstrap confidence intervals and paired permutation tests, clustered by image.

Scores of questions about one image are correlated, so images are resampled, each with all its questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vila.core.errors import DataError
from vila.eval.benchmark import BenchmarkResult, QuestionScore

# G groups (images)  K terms of an aggregate metric

_DRAWS = 2000
_SEED = 0

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Interval:
    """A score and its 95 % bootstrap interval, in percent or in the unit of the score."""

    mean: float
    low: float
    high: float
    questions: int
    groups: int

    def as_json(self) -> dict[str, Any]:
        """Return the fields, rounded to hundredths."""
        return {key: round(value, 2) for key, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """Second run against the first, on the questions of both.

    difference:    mean question score of the second minus that of the first, in percentage points.
    low, high:     95 % interval of the difference.
    p:             two-sided p-value of a permutation test that swaps the runs per image.
    better, worse: number of questions with a higher and with a lower score.
    """

    difference: float
    low: float
    high: float
    p: float
    better: int
    worse: int
    questions: int

    def as_json(self) -> dict[str, Any]:
        """Return the fields, rounded to four decimals."""
        return {key: round(value, 4) for key, value in asdict(self).items()}


def mean_interval(scores: Sequence[QuestionScore]) -> Interval | None:
    """Return the mean score in percent with its interval; None without scores."""
    if not scores:
        return None
    sums, counts = _by_group(scores, np.array([score.value for score in scores]))
    low, high = np.percentile(_bootstrap_means(sums, counts), [2.5, 97.5])
    return Interval(float(100 * sums.sum() / counts.sum()), float(100 * low), float(100 * high), len(scores), len(sums))


def score_interval(result: BenchmarkResult) -> Interval | None:
    """Return the score of a benchmark with its interval; None without question scores."""
    aggregate, scores = result.aggregate, result.question_scores
    if aggregate is None or not scores:
        return mean_interval(scores)
    names, group_index = np.unique(_group_names(scores), return_inverse=True)
    terms = np.array(aggregate.terms)
    sums_GK = np.zeros((len(names), terms.shape[1]))
    np.add.at(sums_GK, group_index, terms)
    strata = np.zeros(len(names), int)
    if aggregate.stratified:
        strata[group_index] = np.unique([score.category for score in scores], return_inverse=True)[1]
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    rng = np.random.default_rng(_SEED)
    draws = []
    for _ in range(_DRAWS):
        chosen = np.concatenate([groups[rng.integers(0, len(groups), len(groups))] for groups in members])
        draws.append(aggregate.compute(sums_GK[chosen].sum(0).tolist()))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(aggregate.compute(sums_GK.sum(0).tolist()), float(low), float(high), len(scores), len(names))


def compare_paired(first: Sequence[QuestionScore], second: Sequence[QuestionScore]) -> PairedComparison:
    """Compare two runs on the questions of both. Raises DataError if there is none."""
    before = {score.id: score for score in first}
    common = [score for score in second if score.id in before]
    if not common:
        raise DataError("the two runs have no question in common")
    changes = np.array([score.value - before[score.id].value for score in common])
    sums, counts = _by_group(common, changes)
    low, high = np.percentile(_bootstrap_means(sums, counts), [2.5, 97.5])
    observed = abs(sums.sum())
    rng = np.random.default_rng(_SEED)
    as_large = 0
    for _ in range(_DRAWS):
        signs = rng.integers(0, 2, len(sums)) * 2 - 1
        as_large += abs((signs * sums).sum()) >= observed - 1e-12
    return PairedComparison(
        difference=float(100 * changes.mean()),
        low=float(100 * low),
        high=float(100 * high),
        p=(as_large + 1) / (_DRAWS + 1),
        better=int((changes > 0).sum()),
        worse=int((changes < 0).sum()),
        questions=len(common),
    )


def _by_group(scores: Sequence[QuestionScore], values: Array) -> tuple[Array, Array]:
    """Return the sum of the values and the number of questions of each group."""
    _, group_index = np.unique(_group_names(scores), return_inverse=True)
    return np.bincount(group_index, weights=values), np.bincount(group_index).astype(float)


def _group_names(scores: Sequence[QuestionScore]) -> list[str]:
    """Return the group of each score; one without a group is a group of its own."""
    return [score.group or f"\0{score.id}" for score in scores]


def _bootstrap_means(sums: Array, counts: Array) -> Array:
    rng = np.random.default_rng(_SEED)
    means = np.empty(_DRAWS)
    for draw in range(_DRAWS):
        chosen = rng.integers(0, len(sums), len(sums))
        means[draw] = sums[chosen].sum() / counts[chosen].sum()
    return means
