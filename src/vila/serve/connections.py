"""Connections of the server: how many are open, from whom, and how long one may be kept without a request."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_log = logging.getLogger("vila.serve")

MAX_CONNECTIONS = 1000
"""Open connections of a server by default; one address may hold half of them."""
_SPARE_FILES = 256
"""Open files that are left to everything but connections."""

# How far a connection has come; the lowest are closed first when another one wants its place.
IDLE, READING, ANSWERING = range(3)


@dataclass(eq=False)
class _Open:
    """An open connection."""

    connection: socket.socket
    address: str
    stage: int = IDLE
    since: float = field(default_factory=time.monotonic)


class Connections:
    """Counts open connections, in total and per address, and closes idle ones when the room is needed.

    most:        open connections.
    per_address: of one address (of one /64 network for IPv6); 0 is half of `most`.
    """

    def __init__(self, most: int = MAX_CONNECTIONS, per_address: int = 0) -> None:
        self.most, self.per_address = most, per_address or max(1, most // 2)
        self._open: dict[int, _Open] = {}
        self._of_address: Counter[str] = Counter()
        self._told = 0.0

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: socket.socket, peer: Any) -> bool:
        """Count a new connection, closing one that waits for nothing in its favour; False when there is no place.

        At the limit of an address one of its own connections goes, at the limit of all one of an address that holds
        many. Those whose request is being answered stay.
        """
        address = client_address(peer)
        is_own = self._of_address[address] >= self.per_address
        if (is_own or len(self._open) >= self.most) and not self._close_one(address if is_own else None):
            return False
        self._open[connection.fileno()] = _Open(connection, address)
        self._of_address[address] += 1
        return True

    def release(self, number: int) -> None:
        """Forget a connection by its file descriptor; it is closed."""
        if one := self._open.pop(number, None):
            self._of_address[one.address] -= 1
            if not self._of_address[one.address]:
                del self._of_address[one.address]

    def set_stage(self, number: int, stage: int) -> None:
        """Note how far the request on a connection has come: IDLE, READING (its body) or ANSWERING."""
        if (one := self._open.get(number)) and one.stage != stage:
            one.stage, one.since = stage, time.monotonic()

    def _close_one(self, address: str | None) -> bool:
        """Close the connection that is missed least, of one address or of all; False if all are being answered."""
        self._say()
        waiting = [one for one in self._open.values() if one.stage < ANSWERING and address in (None, one.address)]
        if not waiting:
            return False
        victim = min(waiting, key=lambda one: (one.stage, -self._of_address[one.address], one.since))
        self.release(victim.connection.fileno())
        # The event loop sees the end of the stream and closes the rest, unless the client was faster.
        with suppress(OSError):
            victim.connection.shutdown(socket.SHUT_RDWR)
        return True

    def _say(self) -> None:
        now = time.monotonic()
        if now - self._told > 60:
            self._told = now
            _log.warning("connection limit reached (%d are open); idle ones are closed for new ones", len(self))


def client_address(peer: Any) -> str:
    """The address of a client, by which it is counted: of an IPv6 address the /64 network, which one host can use."""
    host = str(peer[0]) if isinstance(peer, tuple) and peer else "local"
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class Listener(socket.socket):
    """A listening socket that admits connections by a `Connections`, before TLS or HTTP costs anything."""

    connections: Connections

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept the next connection that is admitted. Raises BlockingIOError when none waits."""
        while True:
            number, peer = self._accept()  # type: ignore[attr-defined]  # socket.accept() makes a plain socket of it
            connection = _Counted(self.family, self.type, self.proto, fileno=number)
            if self.connections.admit(connection, peer):
                connection.on_close = self.connections.release
                return connection, peer
            connection.close()


class _Counted(socket.socket):
    """A connection that says when it is closed."""

    on_close: Callable[[int], None] | None = None

    def close(self) -> None:
        """Close it."""
        if self.on_close is not None and self.fileno() >= 0:
            self.on_close(self.fileno())
        super().close()


def listen(host: str, port: int, connections: Connections) -> Listener:
    """Open a listening socket. Raises OSError and OverflowError as `socket.create_server` does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=2048) as plain:
        listener = Listener(plain.family, plain.type, plain.proto, fileno=plain.detach())
    listener.connections = connections
    return listener


def connection_limit(most: int) -> int:
    """At most `most`, as many as this process may have open files for; raises its soft limit where that is allowed."""
    try:
        import resource
    except ImportError:  # Windows
        return most
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return most if soft == resource.RLIM_INFINITY else max(1, min(most, soft - _SPARE_FILES))


class _Reader(h11.Connection):
    """Parses HTTP, and gives up on bodies that come in needlessly small pieces, each of which costs time to parse."""

    max_pieces, mean_bytes = 10_000, 256
    pieces, size, is_too_fine = 0, 0, False

    def next_event(self) -> Any:
        """The next event; NEED_DATA for ever after too many small pieces of one body."""
        if self.is_too_fine:
            return h11.NEED_DATA
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.pieces = self.size = 0
        elif isinstance(event, h11.Data):
            self.pieces += 1
            self.size += len(event.data)
            if self.pieces > self.max_pieces and self.size < self.pieces * self.mean_bytes:
                self.is_too_fine = True
                return h11.NEED_DATA
        return event


class TimedProtocol(H11Protocol):
    """uvicorn's protocol with limits that it lacks.

    head_s:  seconds from a connection, or from the first byte of a further request on it, to the end of its headers.
    stall_s: seconds that a client may leave what was sent to it unread.
    admitted: to which the progress of requests is reported, if any.
    """

    head_s = 20.0
    stall_s = 60.0
    admitted: Connections | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        limit = self.config.h11_max_incomplete_event_size
        self.conn = self._reader = _Reader(h11.SERVER, *([] if limit is None else [limit]))
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._number = -1

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is connected: its first request's headers are awaited."""
        super().connection_made(transport)
        if own := transport.get_extra_info("socket"):
            self._number = own.fileno()
        self._head = self.loop.call_later(self.head_s, self._cut)

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        before = self.cycle
        idle = before is None or before.response_complete
        super().data_received(data)
        if self._reader.is_too_fine:
            self._cut()
        elif self.cycle is not before:
            self._stop_head()
        elif idle and self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(self.head_s, self._cut)
        self._report()

    def on_response_complete(self) -> None:
        """The response is sent; the connection waits for the next request."""
        super().on_response_complete()
        self._report()

    def pause_writing(self) -> None:
        """The client does not read what was sent to it."""
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self.stall_s, self._cut)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._stop_stall()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop_head()
        self._stop_stall()
        self._number = -1
        super().connection_lost(exc)

    def _report(self) -> None:
        if self.admitted is not None:
            cycle = self.cycle
            waits = cycle is None or cycle.response_complete
            self.admitted.set_stage(self._number, IDLE if waits else READING if cycle.more_body else ANSWERING)

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
