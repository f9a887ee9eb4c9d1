"""`metrics.jsonl`: one line a step, cut back to the checkpoint when a run resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vila.core.files import write_text


class MetricsLog:
    """Appends one JSON object a step."""

    def __init__(self, path: Path, step: int) -> None:
        """step: lines of later steps are dropped, as is a half-written last line."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_metrics(path) if row["step"] <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, **facts: Any) -> None:
        """Append a line and flush it."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(facts) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line that a kill cut short is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append(json.loads(line))
    return rows
