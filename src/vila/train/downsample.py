"""A line of any length in bounded memory, for plots of runs with hundreds of thousands of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(slots=True)
class _Stretch:
    """Neighbouring points: where they begin and end, their sum, and the lowest and highest of them."""

    first: float
    last: float
    count: int
    total: float
    low: Point
    high: Point

    def join(self, other: _Stretch) -> None:
        """Take in the stretch that follows."""
        self.last = other.last
        self.count += other.count
        self.total += other.total
        self.low, self.high = min(self.low, other.low, key=_height), max(self.high, other.high, key=_height)


class Curve:
    """Points that come in one by one; past `limit` of them neighbours are put together, two by two.

    No spike is lost: a stretch keeps its lowest and its highest point beside its mean.
    """

    def __init__(self, limit: int = 500) -> None:
        self.limit = limit
        self.lost = 0
        """Points left out because their value is not finite."""
        self._size = 1
        self._stretches: list[_Stretch] = []

    def add(self, x: float, y: float) -> None:
        """The next point, in the order of x."""
        if not math.isfinite(y):
            self.lost += 1
            return
        new = _Stretch(x, x, 1, y, (x, y), (x, y))
        if len(self._stretches) >= self.limit and self._stretches[-1].count == self._size:
            self._halve()
        if self._stretches and self._stretches[-1].count < self._size:
            self._stretches[-1].join(new)
        else:
            self._stretches.append(new)

    def _halve(self) -> None:
        pairs = self._stretches
        for left, right in zip(pairs[::2], pairs[1::2], strict=False):
            left.join(right)
        self._stretches = pairs[::2]
        self._size *= 2

    def __len__(self) -> int:
        """Points that were added and kept."""
        return sum(stretch.count for stretch in self._stretches)

    @property
    def means(self) -> list[Point]:
        """The mean of each stretch, in its middle."""
        return [((s.first + s.last) / 2, s.total / s.count) for s in self._stretches]

    @property
    def extremes(self) -> list[Point]:
        """The lowest and highest point of each stretch, in the order of x; of a single point, the point."""
        return [point for s in self._stretches for point in sorted({s.low, s.high})]


def _height(point: Point) -> float:
    return point[1]
