"""Progress events drawn with rich: a bar a task on a terminal, plain lines in a log."""

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

# --- pace
# How fast a task goes and how long it will still take, from a rate that forgets slowly.


_KEPT = 0.95
"""What an earlier measurement counts when a new one comes in."""
_SHORTEST_S = 1.0
_SHORTEST_SHARE = 0.01
"""A measurement takes at least this long, and this share of the time so far: the rate is that of the last fifth."""


class Pace:
    """Counts what is done of `total`. The first amount tells no rate: it may be what an earlier session did.

    clock: seconds.
    """

    def __init__(self, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.clock = total, clock
        self.done = 0
        self._seconds = self._units = 0.0  # of all measurements, older ones counting less
        self._began: float | None = None
        self._since = 0.0
        self._waiting = 0

    def add(self, amount: int) -> None:
        """More is done."""
        self.done += amount
        now = self.clock()
        if self._began is None:
            self._began = self._since = now
            return
        self._waiting += amount
        seconds = now - self._since
        if self._waiting and seconds >= max(_SHORTEST_S, _SHORTEST_SHARE * (now - self._began)):
            self._seconds = _KEPT * self._seconds + seconds
            self._units = _KEPT * self._units + self._waiting
            self._since, self._waiting = now, 0

    def left(self) -> float | None:
        """Seconds until the end; None when the total is not known, or the rate is not known yet."""
        if self.total is None or not self._units:
            return None
        rest = self.total - self.done + self._waiting
        return max(0.0, rest * self._seconds / self._units - (self.clock() - self._since))


_LOG_EVERY_S = 15.0
_LOG_LATER_S = 60.0
"""Seconds between lines of a log, in the first ten minutes of a task and after them."""
_BEHIND = ("tokens/s", "GiB")
"""Facts that are written as a number and its unit."""


class Screen:
    """An `Events` listener, used as a context manager."""

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
        """A new bar, or a line in a log."""
        if self._live:
            self._tasks[task] = self._bars.add_task(task, total=total, unit=unit, facts="", pace=Pace(total))
        else:
            self._logs[task] = _Log(total, unit)
            self.console.print(f"{task} ...", markup=False)

    def advanced(self, task: str, amount: int = 1, **facts: float | str) -> None:
        """Move the bar; in a log, a line every few seconds."""
        text = write_facts(facts)
        if self._live:
            number = self._tasks[task]
            self._bars.tasks[self._bars.task_ids.index(number)].fields["pace"].add(amount)
            self._bars.update(number, advance=amount, **({"facts": text} if text else {}))  # type: ignore[arg-type]
            return
        log = self._logs[task]
        log.pace.add(amount)
        if log.is_due():
            words = [f"{task}: {write_count(log.pace.done, log.total, log.unit)}", text, log.left()]
            self.console.print("  ".join(filter(None, words)), markup=False, soft_wrap=True)

    def log(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, markup=False, soft_wrap=True)

    def finished(self, task: str, outcome: Outcome = "done") -> None:
        """Stop the bar where it is; one inside other work, which may come again and again, goes away."""
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
    """`step 1,200  loss 2.314  lr 1.87e-5  8,120 tokens/s  MFU 41.2 %`: figures as a line shows them."""
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
    """`45 %`, `1,200/9,673 questions`, or `1,200 files` where the total is not known."""
    if unit == "%" and total:
        return f"{100 * done / total:.{0 if total <= 100 else 1}f} %"
    return f"{done:,}{f'/{total:,}' if total is not None else ''} {unit}".rstrip()


class _Bars(Progress):
    """Bars, and below each one its facts in a line of their own: both fit 80 columns."""

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
    """How much is done."""

    def render(self, task: Task) -> Text:
        total = None if task.total is None else int(task.total)
        return Text(write_count(int(task.completed), total, task.fields["unit"]), style="progress.download")


class _Left(ProgressColumn):
    """How long it will still take."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        seconds = None if task.finished else task.fields["pace"].left()
        return Text("" if seconds is None else f"{write_seconds(seconds)} left", style="progress.remaining")


class _Log:
    """What a log line needs to know of a task."""

    def __init__(self, total: int | None, unit: str) -> None:
        self.total, self.unit = total, unit
        self.pace = Pace(total)
        self.began = self.shown = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time for a line; if so, the time until the next one begins."""
        now = time.monotonic()
        due = now - self.shown >= (_LOG_EVERY_S if now - self.began < 600 else _LOG_LATER_S)
        if due:
            self.shown = now
        return due

    def left(self) -> str:
        seconds = self.pace.left()
        return "" if seconds is None else f"{write_seconds(seconds)} left"
