"""Samples that could not be read: each one is written down, and too many stop the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vila.core.errors import DataError
from vila.core.files import write_text


@dataclass(frozen=True, slots=True)
class Fault:
    """A sample that was skipped: its global position, and why."""

    position: int
    reason: str


class FaultLog:
    """`faults.jsonl` of a run, and its budget."""

    def __init__(
        self, path: Path, budget: int, *, seen: Callable[[int], bool] = lambda position: True, write: bool = True
    ) -> None:
        """seen: whether the rows up to the checkpoint have used a position; lines of later ones are dropped, since
        the run comes by there again. write: false counts alone, where another process writes the same file."""
        self.path, self.budget, self.write = path, budget, write
        self.count = 0
        if path.is_file():
            # A kill may have cut the last line short.
            whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            rows = [row for row in map(json.loads, whole) if seen(row["position"])]
            if write:
                write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
            self.count = len(rows)

    def add(self, faults: Sequence[Fault]) -> None:
        """Write the faults of a step down. Raises DataError naming the last one when there are more than the budget."""
        if not faults:
            return
        if self.write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                for fault in faults:
                    stream.write(json.dumps({"position": fault.position, "reason": fault.reason}) + "\n")
        self.count += len(faults)
        if self.count > self.budget:
            raise DataError(
                f"{self.count} samples could not be read, data.max_faults allows {self.budget}; they are listed in "
                f"{self.path}. The last: {faults[-1].reason}"
            )
