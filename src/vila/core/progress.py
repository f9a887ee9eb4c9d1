"""Progress protocol: long-running work reports `Events`; a listener (the command line, a test) displays them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from vila.core.errors import Interrupted

Outcome = Literal["done", "stopped", "failed"]


@runtime_checkable
class Events(Protocol):
    """Listener for progress. `task` is the name passed to `started`."""

    def started(self, task: str, total: int | None = None, unit: str = "") -> None:
        """`task` begins. total: amount of work in `unit`; None if unknown."""

    def advanced(self, task: str, amount: int = 1, **facts: float | str) -> None:
        """`amount` more units are done. facts: figures to display, such as loss or tokens/s."""

    def log(self, text: str) -> None:
        """Log one line."""

    def finished(self, task: str, outcome: Outcome = "done") -> None:
        """`task` has ended."""


@dataclass(frozen=True, slots=True)
class Silent:
    """`Events` that ignores everything; the default of the Python API."""

    def started(self, task: str, total: int | None = None, unit: str = "") -> None:
        """Do nothing."""

    def advanced(self, task: str, amount: int = 1, **facts: float | str) -> None:
        """Do nothing."""

    def log(self, text: str) -> None:
        """Do nothing."""

    def finished(self, task: str, outcome: Outcome = "done") -> None:
        """Do nothing."""


SILENT = Silent()


@contextmanager
def task(events: Events, name: str, total: int | None = None, unit: str = "") -> Iterator[None]:
    """Report `started` on entry and `finished` on exit: "stopped" on an interrupt, "failed" on any other exception."""
    events.started(name, total, unit)
    outcome: Outcome = "failed"
    try:
        yield
        outcome = "done"
    except (Interrupted, KeyboardInterrupt, GeneratorExit):
        outcome = "stopped"
        raise
    finally:
        events.finished(name, outcome)
