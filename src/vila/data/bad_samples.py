"""Samples that could not be read: each one is listed once, and too many stop the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.errors import CheckpointError, DataError
from vila.core.files import write_text
from vila.core.reading import read_jsonl

RecordLocation = tuple[str, int]
"""File of a sample and number of its record there: equal for every visit, in any epoch, repeat or process."""


def location_of_position(position: int) -> RecordLocation:
    """Return a place for samples that are known by their global position alone."""
    return "", position


@dataclass(frozen=True, slots=True)
class BadSample:
    """A visit of a sample that could not be read: its global position, the reason, and the sample's place."""

    position: int
    reason: str
    location: RecordLocation


class BadSampleLog:
    """`faults.jsonl` of a run, a line for each different sample, and its budget.

    A sample that every epoch comes back to is listed and counted once, by its place.
    """

    def __init__(
        self, path: Path, budget: int, *, seen: Callable[[int], bool] = lambda position: True, write: bool = True
    ) -> None:
        """Read what an earlier process listed. Raises CheckpointError for a damaged file.

        seen: whether the rows up to the checkpoint have used a position; lines of later ones are dropped, since the
        run comes by there again. write: false counts alone, where another process writes the same file.
        """
        self.path, self.budget, self.write = path, budget, write
        self._locations: set[RecordLocation] = set()
        if path.is_file():
            rows = [row for row in self._read() if seen(row["position"])]
            if write:
                write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
            self._locations = {_location(row) for row in rows}

    @property
    def count(self) -> int:
        """Number of different samples."""
        return len(self._locations)

    def add(self, samples: Sequence[BadSample]) -> int:
        """List the samples of a step that are not listed yet, and return their number.

        Raises DataError with the last one if there are more than the budget.
        """
        new: dict[RecordLocation, BadSample] = {}
        for sample in samples:
            if sample.location not in self._locations:
                new.setdefault(sample.location, sample)
        if not new:
            return 0
        if self.write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                for (file, record), sample in new.items():
                    row = {"position": sample.position, "file": file, "record": record, "reason": sample.reason}
                    stream.write(json.dumps(row) + "\n")
        self._locations |= new.keys()
        if self.count > self.budget:
            last = next(reversed(new.values()))
            raise DataError(
                f"{self.count} samples could not be read, {self.budget} are allowed; the last: {last.reason}",
                file=self.path,
                field="data.max_faults",
                hint="mend them or raise data.max_faults, which counts each sample once",
            )
        return len(new)

    def _read(self) -> list[dict[str, Any]]:
        rows = []
        for number, row in read_jsonl(self.path, CheckpointError, appended=True):
            position = row.get("position") if isinstance(row, dict) else None
            if not isinstance(position, int) or isinstance(position, bool):
                raise CheckpointError(
                    field="position",
                    file=self.path,
                    record=f"line {number}",
                    value=position if isinstance(row, dict) else row,
                    expected="an object with the number of a position",
                    hint="delete the file to count anew",
                )
            rows.append(row)
        return rows


def _location(row: dict[str, Any]) -> RecordLocation:
    """Return the place of a line. Version one wrote positions alone."""
    file, record = row.get("file"), row.get("record")
    if isinstance(file, str) and isinstance(record, int):
        return file, record
    return location_of_position(row["position"])
