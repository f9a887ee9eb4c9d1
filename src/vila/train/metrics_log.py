"""JSONL logs of a run (`metrics.jsonl`, `evaluations.jsonl`, ...): one record per step, truncated on resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.files import write_text
from vila.core.reading import read_jsonl

_HINT = "delete the line, or delete the file to resume without it"


class MetricsLog:
    """JSONL file with one record per step, opened for appending."""

    def __init__(self, path: Path, step: int) -> None:
        """Drop the records after `step` and an incomplete last line. Raises DataError as `read_metrics`."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [record for record in read_metrics(path) if record["step"] <= step]
        self.last_step: int = max((record["step"] for record in records), default=0)
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))

    def write(self, **record: Any) -> None:
        """Append a record and flush it."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


class BadStepLog:
    """`bad_steps.jsonl`: steps that were skipped because their loss or gradient was not finite.

    limit: number of such steps that a run may skip.
    """

    def __init__(self, path: Path, limit: int, step: int, *, write: bool) -> None:
        """Drop the records after `step`. write: False on ranks other than 0, which write nothing."""
        self.path, self.limit, self._is_writer = path, limit, write
        if write and path.is_file():
            MetricsLog(path, step)

    def write(self, *, step: int, **record: Any) -> None:
        """Append the record of a skipped step."""
        if self._is_writer:
            MetricsLog(self.path, step - 1).write(step=step, **record)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a log; empty if the file does not exist. An incomplete last line is ignored.

    Raises DataError naming file, line and field for a line that is not an object with a `step`.
    """
    if not path.is_file():
        return []
    records = []
    for number, record in read_jsonl(path, DataError, appended=True):
        check_record(record, path, number)
        records.append(record)
    return records


def check_record(record: Any, path: Path, line: int, key: str = "step") -> None:
    """Raise DataError unless a record of a log is an object with a non-negative integer at `key`."""
    count = record.get(key) if isinstance(record, dict) else None
    if type(count) is not int or not 0 <= count < 2**62:
        raise DataError(
            file=path,
            record=f"line {line}",
            field=key if isinstance(record, dict) else None,
            value=count if isinstance(record, dict) else record,
            expected="an integer >= 0" if isinstance(record, dict) else "an object ({...})",
            hint=_HINT,
        )
