"""How sure a score is: bootstrap intervals and paired tests, over pictures rather than questions.

Questions about one picture are right or wrong together, so pictures are drawn, each with all its questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vila.core.errors import DataError
from vila.eval.benchmark import Mark, Scored

# G pictures  K parts of a headline

_DRAWS = 2000
_SEED = 0


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean of marks in percent, or a score, with the bounds that 95 of 100 bootstrap draws lie between."""

    mean: float
    low: float
    high: float
    questions: int
    groups: int

    def as_json(self) -> dict[str, Any]:
        """Plain data, rounded to hundredths."""
        return {key: round(value, 2) for key, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The second of two runs against the first, on the questions of both.

    difference: mean mark of the second minus the first, in points of a hundred; low, high: its 95 % interval.
    p:          how often chance alone, the runs exchanged picture by picture, gives a difference as large.
    better, worse: questions with a higher and a lower mark.
    """

    difference: float
    low: float
    high: float
    p: float
    better: int
    worse: int
    questions: int

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {key: round(value, 4) for key, value in asdict(self).items()}


def interval(marks: Sequence[Mark]) -> Interval | None:
    """The interval of the mean mark; None without marks."""
    if not marks:
        return None
    sums, counts = _by_group(marks, np.array([mark.value for mark in marks]))
    draws = _drawn_means(sums, counts)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(float(100 * sums.sum() / counts.sum()), float(100 * low), float(100 * high), len(marks), len(sums))


def score_interval(scored: Scored) -> Interval | None:
    """The interval of the score itself, whatever figure it is; None without marks."""
    headline, marks = scored.headline, scored.marks
    if headline is None or not marks:
        return interval(marks)
    names, places = np.unique(_group_names(marks), return_inverse=True)
    parts = np.array(headline.parts)
    sums_GK = np.zeros((len(names), parts.shape[1]))
    np.add.at(sums_GK, places, parts)
    kinds = np.zeros(len(names), int)
    if headline.by_kind:
        kinds[places] = np.unique([mark.kind for mark in marks], return_inverse=True)[1]
    own = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
    rng = np.random.default_rng(_SEED)
    draws = []
    for _ in range(_DRAWS):
        chosen = np.concatenate([rows[rng.integers(0, len(rows), len(rows))] for rows in own])
        draws.append(headline.figure(sums_GK[chosen].sum(0).tolist()))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(headline.figure(sums_GK.sum(0).tolist()), float(low), float(high), len(marks), len(names))


def compare(first: Sequence[Mark], second: Sequence[Mark]) -> Comparison:
    """Two runs over the same questions. Raises DataError when they have none in common."""
    before = {mark.id: mark for mark in first}
    common = [mark for mark in second if mark.id in before]
    if not common:
        raise DataError("the two runs have no question in common")
    changes = np.array([mark.value - before[mark.id].value for mark in common])
    sums, counts = _by_group(common, changes)
    low, high = np.percentile(_drawn_means(sums, counts), [2.5, 97.5])
    observed = abs(sums.sum())
    rng = np.random.default_rng(_SEED)
    as_large = 0
    for _ in range(_DRAWS):
        signs = rng.integers(0, 2, len(sums)) * 2 - 1
        as_large += abs((signs * sums).sum()) >= observed - 1e-12
    return Comparison(
        difference=float(100 * changes.mean()),
        low=float(100 * low),
        high=float(100 * high),
        p=(as_large + 1) / (_DRAWS + 1),
        better=int((changes > 0).sum()),
        worse=int((changes < 0).sum()),
        questions=len(common),
    )


def _by_group(marks: Sequence[Mark], values: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Sum of values and number of questions of each group; a mark without group is one of its own."""
    _, places = np.unique(_group_names(marks), return_inverse=True)
    return np.bincount(places, weights=values), np.bincount(places).astype(float)


def _group_names(marks: Sequence[Mark]) -> list[str]:
    return [mark.group or f"\0{mark.id}" for mark in marks]


def _drawn_means(sums: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(_SEED)
    out = np.empty(_DRAWS)
    for draw in range(_DRAWS):
        chosen = rng.integers(0, len(sums), len(sums))
        out[draw] = sums[chosen].sum() / counts[chosen].sum()
    return out
