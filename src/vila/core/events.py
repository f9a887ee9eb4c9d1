"""The progress protocol: long work tells what it does, and whoever listens decides how to show it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Events(Protocol):
    """A listener. `task` is the name that `started` gave; `total` is in `unit`, or None when unknown."""

    def started(self, task: str, total: int | None = None, unit: str = "") -> None:
        """Work on `task` begins."""

    def advanced(self, task: str, amount: int = 1, **facts: float | str) -> None:
        """`amount` more units are done; `facts` are figures to show (loss, tokens/s)."""

    def said(self, text: str) -> None:
        """A line for the reader."""

    def finished(self, task: str, summary: str = "") -> None:
        """Work on `task` is over."""


@dataclass(frozen=True, slots=True)
class Silent:
    """Listens to nothing; the default everywhere below the command line."""

    def started(self, task: str, total: int | None = None, unit: str = "") -> None:
        """Nothing."""

    def advanced(self, task: str, amount: int = 1, **facts: float | str) -> None:
        """Nothing."""

    def said(self, text: str) -> None:
        """Nothing."""

    def finished(self, task: str, summary: str = "") -> None:
        """Nothing."""


SILENT = Silent()


@contextmanager
def task(events: Events, name: str, total: int | None = None, unit: str = "") -> Iterator[None]:
    """`started` on entry and `finished` on exit, also when the body raises."""
    events.started(name, total, unit)
    try:
        yield
    finally:
        events.finished(name)
