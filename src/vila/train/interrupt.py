"""Turning signals into a request that the loop answers between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
"""Ctrl-C, what `kill` and batch systems send, and what they send some time before they do (Slurm: `--signal`)."""


class StopRequest:
    """number: the signal that asked the process to stop, 0 for none. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.number = 0


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Listen to SIGNALS while the body runs. Outside the main thread nothing is installed."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if request.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.number = request.number or number

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
