"""Connections that cannot be kept open for nothing: by a client that never asks, asks slowly, or never reads."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedProtocol(H11Protocol):
    """uvicorn's protocol with two clocks, which it lacks.

    head_s:  seconds from a connection, or from the first byte of a further request on it, to the end of its headers.
    stall_s: seconds that a client may leave what was sent to it unread.
    """

    head_s = 20.0
    stall_s = 60.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client came: its first request's headers are awaited."""
        super().connection_made(transport)
        self._head = self.loop.call_later(self.head_s, self._cut)

    def data_received(self, data: bytes) -> None:
        """Something came from it."""
        before = self.cycle
        idle = before is None or before.response_complete
        super().data_received(data)
        if self.cycle is not before:
            self._stop_head()
        elif idle and self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(self.head_s, self._cut)

    def pause_writing(self) -> None:
        """It does not read what it was sent."""
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self.stall_s, self._cut)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        self._stop_stall()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._stop_head()
        self._stop_stall()
        super().connection_lost(exc)

    def _cut(self) -> None:
        self.transport.abort()

    def _stop_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _stop_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
