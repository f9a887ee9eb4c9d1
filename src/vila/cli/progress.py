"""Progress rendering with rich: a bar per task on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from vila.core.progress import Outcome
from vila.report.numbers import write_seconds

_LOG_EVERY_S = 15.0
_LOG_LATER_S = 60.0
"""Seconds between log lines of a task: in its first ten minutes, and later."""
_SPEED_WINDOW_S = 3600.0
"""Updates of this time, at most 1,000, determine the rate; without it, slow steps would have none."""
_BEHIND = ("tokens/s", "GiB")
"""Metrics that are written as a number with a unit."""


class Screen:
    """`Events` listener that renders to the terminal or log; a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._bars = _Bars(
            SpinnerColumn(finished_text="[green]done"),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=24 if self.console.width >= 100 else 10),
            _Count(Column(no_wrap=True)),
            TimeElapsedColumn(Column(no_wrap=True)),
            _Left(Column(no_wrap=True)),
            console=self.console,
            speed_estimate_period=_SPEED_WINDOW_S,
            get_time=time.monotonic,
        )
        self._live = self.console.is_terminal
        self._tasks: dict[str, TaskID] = {}

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
        """Add a bar, or print a log line."""
        self._tasks[task] = self._bars.add_task(task, total=total, unit=unit, facts="", logged_s=0.0)
        if not self._live:
            self.console.print(f"{task} ...", markup=False)

    def advanced(self, task: str, amount: int = 1, **facts: float | str) -> None:
        """Advance the bar, or print a log line every few seconds."""
        number, text = self._tasks[task], write_facts(facts)
        self._bars.update(number, advance=amount, **({"facts": text} if text else {}))  # type: ignore[arg-type]
        bar = self._bar(number)
        elapsed_s = bar.elapsed or 0.0
        interval_s = _LOG_EVERY_S if elapsed_s < 600 else _LOG_LATER_S
        if not self._live and elapsed_s - bar.fields["logged_s"] >= interval_s:
            bar.fields["logged_s"] = elapsed_s
            words = [f"{task}: {_done(bar)}", text, _left(bar)]
            self.console.print("  ".join(filter(None, words)), markup=False, soft_wrap=True)

    def log(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text, markup=False, soft_wrap=True)

    def finished(self, task: str, outcome: Outcome = "done") -> None:
        """Stop the bar; remove it if it belongs to another running task."""
        number = self._tasks.pop(task)
        self._bars.stop_task(number)
        if not self._live:
            how = "done in" if outcome == "done" else f"{outcome} after"
            self.console.print(f"{task}: {how} {self._bar(number).elapsed or 0.0:.0f} s", markup=False)
        if self._tasks or not self._live:
            self._bars.remove_task(number)

    def _bar(self, number: TaskID) -> Task:
        return self._bars.tasks[self._bars.task_ids.index(number)]


def write_facts(facts: dict[str, float | str]) -> str:
    """Return metrics as one line: `step 1,200  loss 2.314  lr 1.87e-5  8,120 tokens/s  MFU 41.2 %`."""
    return "  ".join(_fact(name, value) for name, value in facts.items())


def _fact(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return f"{name} {value}"
    if name == "MFU":
        return f"{name} {100 * value:.1f} %"
    return f"{_number(value)} {name}" if name in _BEHIND else f"{name} {_number(value)}"


def _number(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if value and abs(value) < 1e-3:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(power)}"
    return f"{value:.4g}"


def write_count(done: int, total: int | None, unit: str) -> str:
    """Return `45 %`, `1,200/9,673 questions`, or `1,200 files` if the total is unknown."""
    if unit == "%" and total:
        return f"{100 * done / total:.{0 if total <= 100 else 1}f} %"
    return f"{done:,}{f'/{total:,}' if total is not None else ''} {unit}".rstrip()


class _Bars(Progress):
    """Bars with their metrics on a separate line below, within 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        waiting: list[Task] = []
        for task in self.tasks:
            waiting.append(task)
            if task.fields["facts"]:
                yield self.make_tasks_table(waiting)
                yield Text(f"  {task.fields['facts']}", style="cyan", no_wrap=True, overflow="ellipsis")
                waiting = []
        if waiting:
            yield self.make_tasks_table(waiting)


class _Count(ProgressColumn):
    """Column with the number of finished units."""

    def render(self, task: Task) -> Text:
        return Text(_done(task), style="progress.download")


class _Left(ProgressColumn):
    """Column with the remaining time."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        return Text("" if task.finished else _left(task), style="progress.remaining")


def _done(task: Task) -> str:
    return write_count(int(task.completed), None if task.total is None else int(task.total), task.fields["unit"])


def _left(task: Task) -> str:
    """Return the remaining time; empty while unknown. rich skips the first update, which may be of an earlier run."""
    seconds = task.time_remaining
    return "" if seconds is None else f"{write_seconds(seconds)} left"
