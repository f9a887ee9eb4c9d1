"""Progress events drawn with rich: a bar a task on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LOG_EVERY_S = 15.0


class Screen:
    """An `Events` listener, used as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]done"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("[cyan]{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._live = self.console.is_terminal
        self._tasks: dict[str, TaskID] = {}
        self._logs: dict[str, _Log] = {}

    def __enter__(self) -> Screen:
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bars.stop()

    def started(self, task: str, total: int | None = None, unit: str = "") -> None:
        """A new bar, or a line in a log."""
        if self._live:
            self._tasks[task] = self._bars.add_task(task, total=total, unit=unit, facts="")
        else:
            self._logs[task] = _Log(total, unit)
            self.console.print(f"{task} ...", markup=False)

    def advanced(self, task: str, amount: int = 1, **facts: float | str) -> None:
        """Move the bar; in a log, a line every few seconds."""
        text = "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()
        )
        if self._live:
            number = self._tasks[task]
            self._bars.update(number, advance=amount, **({"facts": text} if text else {}))  # type: ignore[arg-type]
            return
        log = self._logs[task]
        log.done += amount
        if time.monotonic() - log.shown >= _LOG_EVERY_S:
            log.shown = time.monotonic()
            whole = f"/{log.total}" if log.total is not None else ""
            self.console.print(f"{task}: {log.done}{whole} {log.unit}  {text}".rstrip(), markup=False, soft_wrap=True)

    def said(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, markup=False, soft_wrap=True)

    def finished(self, task: str, summary: str = "") -> None:
        """Stop the bar where it is."""
        if self._live:
            self._bars.stop_task(self._tasks.pop(task))
        else:
            log = self._logs.pop(task)
            seconds = time.monotonic() - log.began
            self.console.print(f"{task}: done in {seconds:.0f} s {summary}".rstrip(), markup=False)


class _Log:
    """What a log line needs to know of a task."""

    def __init__(self, total: int | None, unit: str) -> None:
        self.total, self.unit, self.done = total, unit, 0
        self.began = self.shown = time.monotonic()
