"""Trainer callbacks that write files of a run: `metrics.jsonl` and `report.html`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vila.core.progress import Events
from vila.train.metrics import MetricsLog
from vila.train.report import RunReport
from vila.train.trainer import Trainer, TrainerCallback


class MetricsCallback(TrainerCallback):
    """Appends the metrics of every step to `metrics.jsonl`. For rank 0 only."""

    def __init__(self, folder: Path, step: int, events: Events) -> None:
        """step: step that the run resumes from; later records are dropped."""
        self._log = MetricsLog(folder / "metrics.jsonl", step)
        if self._log.last_step < step:
            found = f"ends at step {self._log.last_step:,}" if self._log.last_step else "has no steps"
            events.log(
                f"note: {self._log.path} {found}, the run resumes after step {step:,}; metrics and report lack the "
                "steps between"
            )

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Append a record."""
        self._log.write(**metrics)


class ReportCallback(TrainerCallback):
    """Writes `report.html` with every checkpoint. For rank 0 only."""

    def __init__(self, folder: Path) -> None:
        self._report = RunReport(folder)

    def on_save(self, trainer: Trainer) -> None:
        """Update the report."""
        self._report.write()
