"""The progress protocol: long work reports its progress, and the listener decides how to show it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from vila.core.errors import Interrupted

Outcome = Literal["done", "stopped", "failed"]


@runtime_checkable
class Events(Protocol):
    """A listener. `task` is the name that `started` gave; `total` is in `unit`, or None when unknown."""

    def started(self, task: str, total: int | None = None, unit: str = "") -> None:
        """Work on `task` begins."""

    def advanced(self, task: str, amount: int = 1, **facts: float | str) -> None:
        """`amount` more units are done; `facts` are figures to show (loss, tokens/s)."""

    def log(self, text: str) -> None:
        """A line for the reader."""

    def finished(self, task: str, outcome: Outcome = "done") -> None:
        """Work on `task` is over."""


@dataclass(frozen=True, slots=True)
class Silent:
    """Listens to nothing; the default everywhere below the command line."""

    def started(self, task: str, total: int | None = None, unit: str = "") -> None:
        """Nothing."""

    def advanced(self, task: str, amount: int = 1, **facts: float | str) -> None:
        """Nothing."""

    def log(self, text: str) -> None:
        """Nothing."""

    def finished(self, task: str, outcome: Outcome = "done") -> None:
        """Nothing."""


SILENT = Silent()


@contextmanager
def task(events: Events, name: str, total: int | None = None, unit: str = "") -> Iterator[None]:
    """`started` on entry and `finished` on exit; "stopped" when the body is interrupted, "failed" when it raises."""
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
