"""Log of samples that could not be read, and the budget that stops a run when there are too many."""

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
"""File of a sample and number of its record: the same in every epoch, repeat and process."""


def location_of_position(position: int) -> RecordLocation:
    """Return a location for a sample of which only the global position is known."""
    return "", position


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that could not be read: global position of this visit, reason, and location."""

    position: int
    reason: str
    location: RecordLocation


class BadSampleLog:
    """`faults.jsonl` of a run: one line for each different sample, identified by its location.

    A sample that is met again in later epochs is listed and counted once.
    """

    def __init__(
        self, path: Path, budget: int, *, seen: Callable[[int], bool] = lambda position: True, write: bool = True
    ) -> None:
        """Read the lines of earlier processes of the run. Raises CheckpointError for a damaged file.

        budget: number of different samples that may be listed.
        seen:   whether the checkpoint is past a position; other lines are dropped, since the run reads them again.
        write:  False only counts, for ranks that do not write the file.
        """
        self.path, self.budget, self.write = path, budget, write
        self._locations: set[RecordLocation] = set()
        if path.is_file():
            lines = [line for line in self._read() if seen(line["position"])]
            if write:
                write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
            self._locations = {_location(line) for line in lines}

    @property
    def count(self) -> int:
        """Number of different samples."""
        return len(self._locations)

    def add(self, samples: Sequence[BadSample]) -> int:
        """List the samples that are not listed yet, and return their number.

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
                    line = {"position": sample.position, "file": file, "record": record, "reason": sample.reason}
                    stream.write(json.dumps(line) + "\n")
        self._locations |= new.keys()
        if self.count > self.budget:
            last = next(reversed(new.values()))
            raise DataError(
                f"too many unreadable samples; last error: {last.reason}",
                file=self.path,
                field="data.max_faults",
                value=self.count,
                expected=f"at most {self.budget}",
                hint="repair them or raise data.max_faults, which counts each sample once",
            )
        return len(new)

    def _read(self) -> list[dict[str, Any]]:
        lines = []
        for number, line in read_jsonl(self.path, CheckpointError, appended=True):
            position = line.get("position") if isinstance(line, dict) else None
            if not isinstance(position, int) or isinstance(position, bool):
                raise CheckpointError(
                    field="position",
                    file=self.path,
                    record=f"line {number}",
                    value=position if isinstance(line, dict) else line,
                    expected="an object with a whole number as position",
                    hint="delete the file to start counting again",
                )
            lines.append(line)
        return lines


def _location(line: dict[str, Any]) -> RecordLocation:
    """Return the location of a line. Version one wrote positions only."""
    file, record = line.get("file"), line.get("record")
    if isinstance(file, str) and isinstance(record, int):
        return file, record
    return location_of_position(line["position"])
