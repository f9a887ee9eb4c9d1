"""Progress rendering with rich: a bar per task on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
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

_DECAY = 0.95
"""Weight of earlier rate measurements when a new one is added (exponential moving average)."""
_MIN_S = 1.0
_MIN_FRACTION = 0.01
"""Minimum duration of a rate measurement, in seconds and as a fraction of the elapsed time."""


class Throughput:
    """Moving-average throughput and remaining time of a task with `total` units.

    The first amount does not count for the rate: it may be the progress of an earlier run. clock: seconds.
    """

    def __init__(self, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.clock = total, clock
        self.done = 0
        self._seconds = self._units = 0.0  # exponentially weighted sums
        self._began: float | None = None
        self._since = 0.0
        self._waiting = 0

    def add(self, amount: int) -> None:
        """Add finished units."""
        self.done += amount
        now = self.clock()
        if self._began is None:
            self._began = self._since = now
            return
        self._waiting += amount
        seconds = now - self._since
        if self._waiting and seconds >= max(_MIN_S, _MIN_FRACTION * (now - self._began)):
            self._seconds = _DECAY * self._seconds + seconds
            self._units = _DECAY * self._units + self._waiting
            self._since, self._waiting = now, 0

    def left(self) -> float | None:
        """Return the estimated seconds to the end; None while total or rate is unknown."""
        if self.total is None or not self._units:
            return None
        rest = self.total - self.done + self._waiting
        return max(0.0, rest * self._seconds / self._units - (self.clock() - self._since))


_LOG_EVERY_S = 15.0
_LOG_LATER_S = 60.0
"""Seconds between log lines of a task: in its first ten minutes, and later."""
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
        """Add a bar, or print a log line."""
        if self._live:
            self._tasks[task] = self._bars.add_task(
                task, total=total, unit=unit, facts="", throughput=Throughput(total)
            )
        else:
            self._logs[task] = _Log(total, unit)
            self.console.print(f"{task} ...", markup=False)

    def advanced(self, task: str, amount: int = 1, **facts: float | str) -> None:
        """Advance the bar, or print a log line every few seconds."""
        text = write_facts(facts)
        if self._live:
            number = self._tasks[task]
            self._bars.tasks[self._bars.task_ids.index(number)].fields["throughput"].add(amount)
            self._bars.update(number, advance=amount, **({"facts": text} if text else {}))  # type: ignore[arg-type]
            return
        log = self._logs[task]
        log.throughput.add(amount)
        if log.is_due():
            words = [f"{task}: {write_count(log.throughput.done, log.total, log.unit)}", text, log.left()]
            self.console.print("  ".join(filter(None, words)), markup=False, soft_wrap=True)

    def log(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text, markup=False, soft_wrap=True)

    def finished(self, task: str, outcome: Outcome = "done") -> None:
        """Stop the bar; remove it if it belongs to another running task."""
        if self._live:
            number = self._tasks.pop(task)
            self._bars.stop_task(number)
            if self._tasks:
                self._bars.remove_task(number)
        else:
            log = self._logs.pop(task)
            seconds = time.monotonic() - log.began
            how = "done in" if outcome == "done" else f"{outcome} after"
            self.console.print(f"{task}: {how} {seconds:.0f} s", markup=False)


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
        total = None if task.total is None else int(task.total)
        return Text(write_count(int(task.completed), total, task.fields["unit"]), style="progress.download")


class _Left(ProgressColumn):
    """Column with the remaining time."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        seconds = None if task.finished else task.fields["throughput"].left()
        return Text("" if seconds is None else f"{write_seconds(seconds)} left", style="progress.remaining")


class _Log:
    """State of a task in a log."""

    def __init__(self, total: int | None, unit: str) -> None:
        self.total, self.unit = total, unit
        self.throughput = Throughput(total)
        self.began = self.shown = time.monotonic()

    def is_due(self) -> bool:
        """Return whether a line is due, and start the next interval if so."""
        now = time.monotonic()
        due = now - self.shown >= (_LOG_EVERY_S if now - self.began < 600 else _LOG_LATER_S)
        if due:
            self.shown = now
        return due

    def left(self) -> str:
        seconds = self.throughput.left()
        return "" if seconds is None else f"{write_seconds(seconds)} left"
