"""Logs of a run, read into bounded memory: downsampled curves, counts and thinned records of its report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vila.core.errors import DataError
from vila.core.reading import file_errors, parse_json
from vila.train.metrics import check_record

# Downsampled curves in bounded memory, for plots of runs with hundreds of thousands of steps.


K = TypeVar("K")
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


_ROWS_KEPT = 40
_REASONS_KEPT = 10

Row = dict[str, Any]


@dataclass
class DataSetCurve:
    """Loss curve and number of tokens of a data set."""

    loss: Curve = field(default_factory=Curve)
    seen: int = 0


@dataclass
class ThinnedRecords:
    """Records of a log of any length: the first, the newest, and evenly spaced ones between.

    best: first record with the highest `score`.
    """

    rows: list[Row] = field(default_factory=list)
    count: int = 0
    best: Row | None = None
    _every: int = 1
    _newest: Row | None = None

    def add(self, row: Row) -> None:
        """Add the next record."""
        if self.count % self._every == 0:
            self.rows.append(row)
            if len(self.rows) > _ROWS_KEPT:
                self.rows = self.rows[::2]
                self._every *= 2
        self.count += 1
        self._newest = row
        score = row.get("score")
        if score is not None and (self.best is None or score > self.best["score"]):
            self.best = row

    @property
    def shown(self) -> list[Row]:
        """Return the selected records, the newest one last."""
        newest = [] if self._newest is None or self.rows[-1] is self._newest else [self._newest]
        return [*self.rows, *newest]


class StepCurves:
    """Curves and totals of `metrics.jsonl`; `read` adds the lines since its last call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clear()

    def _clear(self) -> None:
        self._lines = LogReader(self.path)
        self.curves: dict[str, Curve] = {}
        self.data_sets: dict[str, DataSetCurve] = {}
        self.totals = {"tokens": 0, "supervised": 0, "images": 0, "dropped": 0, "truncated": 0, "faults": 0}
        self.last: Row = {}

    def read(self) -> None:
        """Add new complete lines. A file that was truncated, as on resume, is read from its start."""
        if self._lines.was_cut():
            self._clear()
        for row in self._lines:
            with file_errors(self.path, DataError, record=self._lines.record):
                self._add(row)

    def _add(self, row: Row) -> None:
        step = row["step"]
        for name, value in _drawn(row).items():
            self.curves.setdefault(name, Curve()).add(step, value)
        for name, value in row.get("loss_by_data_set", {}).items():
            self.data_sets.setdefault(name, DataSetCurve()).loss.add(step, value)
        for name, value in row.get("tokens_by_data_set", {}).items():
            self.data_sets.setdefault(name, DataSetCurve()).seen += value
        for name in self.totals:
            self.totals[name] += row.get(name, 0)
        self.last = row


_PLAIN = ("loss", "lr", "grad_norm", "tokens_per_second", "memory_gib")


def _drawn(row: Row) -> dict[str, float]:
    """Return the plotted values of a step; fractions in percent."""
    out = {name: row[name] for name in _PLAIN if row.get(name) is not None}
    if row.get("mfu") is not None:
        out["mfu"] = 100 * row["mfu"]
    if row.get("fill") is not None:
        out["padding"] = 100 * (1 - row["fill"])
    if row.get("tokens"):
        out["supervised"] = 100 * row.get("supervised", 0) / row["tokens"]
    return out


class LogReader:
    """Iterates over the complete lines of a log; further iterations yield only new lines.

    Raises DataError naming file and line for a record that is not an object with a count at `key`.
    """

    def __init__(self, path: Path, key: str = "step") -> None:
        self.path, self.key = path, key
        self._offset = 0
        self._number = 0
        self._tail = b""

    @property
    def record(self) -> str:
        """Location of the last line, for errors."""
        return f"line {self._number}"

    def was_cut(self) -> bool:
        """Return whether the part of the file that was read has changed: it is shorter, or its last line differs."""
        if not self._offset:
            return False
        if not self.path.is_file() or self.path.stat().st_size < self._offset:
            return True
        with self.path.open("rb") as stream:
            stream.seek(self._offset - len(self._tail))
            return stream.read(len(self._tail)) != self._tail

    def __iter__(self) -> Iterator[Row]:
        if not self.path.is_file():
            return
        with self.path.open("rb") as stream:
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                self._number += 1
                self._tail = line
                row = parse_json(line, file=self.path, record=self.record)
                check_record(row, self.path, self._number, self.key)
                yield row


def read_answers(path: Path) -> dict[tuple[str, str], ThinnedRecords]:
    """Read answers by prompt and image, in order of first appearance."""
    return _grouped(path, lambda row: (str(row["prompt"]), str(row.get("image", ""))))


def read_evaluations(path: Path) -> dict[str, ThinnedRecords]:
    """Read evaluations by benchmark."""
    return _grouped(path, lambda row: str(row["benchmark"]))


def _grouped(path: Path, key_of: Callable[[Row], K]) -> dict[K, ThinnedRecords]:
    out: dict[K, ThinnedRecords] = {}
    for row in (lines := LogReader(path)):
        with file_errors(path, DataError, record=lines.record):
            out.setdefault(key_of(row), ThinnedRecords()).add(row)
    return out


def read_first_records(path: Path, key: str = "step") -> tuple[list[Row], int]:
    """Return the first records of a log, and their total number. key: field with the count of each record."""
    rows: list[Row] = []
    count = 0
    for count, row in enumerate(LogReader(path, key), start=1):
        if count <= _REASONS_KEPT:
            rows.append(row)
    return rows, count
