"""Downsampled curves in bounded memory, for plots of runs with hundreds of thousands of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(slots=True)
class _Interval:
    """Consecutive points: first and last x, sum of y, and the lowest and highest point."""

    first: float
    last: float
    count: int
    total: float
    low: Point
    high: Point

    def join(self, other: _Interval) -> None:
        """Append the next interval."""
        self.last = other.last
        self.count += other.count
        self.total += other.total
        self.low, self.high = min(self.low, other.low, key=_height), max(self.high, other.high, key=_height)


class Curve:
    """Curve that is built point by point. Above `limit` intervals, neighbours are merged in pairs.

    Spikes are kept: each interval stores its lowest and highest point besides its mean.
    """

    def __init__(self, limit: int = 500) -> None:
        self.limit = limit
        self.lost = 0
        """Number of points that were dropped because they are not finite."""
        self._size = 1
        self._intervals: list[_Interval] = []

    def add(self, x: float, y: float) -> None:
        """Add a point; x must not decrease."""
        if not math.isfinite(y):
            self.lost += 1
            return
        new = _Interval(x, x, 1, y, (x, y), (x, y))
        if len(self._intervals) >= self.limit and self._intervals[-1].count == self._size:
            self._halve()
        if self._intervals and self._intervals[-1].count < self._size:
            self._intervals[-1].join(new)
        else:
            self._intervals.append(new)

    def _halve(self) -> None:
        pairs = self._intervals
        for left, right in zip(pairs[::2], pairs[1::2], strict=False):
            left.join(right)
        self._intervals = pairs[::2]
        self._size *= 2

    def __len__(self) -> int:
        """Return the number of finite points."""
        return sum(interval.count for interval in self._intervals)

    @property
    def means(self) -> list[Point]:
        """Mean of each interval, at its middle."""
        return [((s.first + s.last) / 2, s.total / s.count) for s in self._intervals]

    @property
    def extremes(self) -> list[Point]:
        """Lowest and highest point of each interval in order of x; once if they are the same."""
        return [point for s in self._intervals for point in sorted({s.low, s.high})]


def _height(point: Point) -> float:
    return point[1]
