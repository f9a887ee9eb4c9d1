"""TCP connections of the server: limits on their number, in total and per address, and on slow clients."""

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

from vila.core.errors import ConfigError

_log = logging.getLogger("vila.serve")

MAX_CONNECTIONS = 1000
"""Default limit of open connections; one address may hold half of them."""
_RESERVED_FILES = 256
"""File descriptors reserved for everything but connections."""

# Stages of a connection. At the limit, connections of the lowest stage are closed first.
IDLE, READING, ANSWERING = range(3)


@dataclass(eq=False)
class _Open:
    """An open connection and its stage."""

    connection: socket.socket
    address: str
    stage: int = IDLE
    since: float = field(default_factory=time.monotonic)


class Connections:
    """Limits the open connections, in total and per address; at a limit, new connections replace idle ones.

    limit:       connections in total.
    per_address: connections of one address (IPv6: of one /64 network); 0: half of `limit`.
    """

    def __init__(self, limit: int = MAX_CONNECTIONS, per_address: int = 0) -> None:
        self.limit, self.per_address = limit, per_address or max(1, limit // 2)
        self._open: dict[int, _Open] = {}
        self._of_address: Counter[str] = Counter()
        self._last_warning = 0.0

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: socket.socket, peer: Any) -> bool:
        """Count a new connection; at a limit, close another one for it. Returns False if it has to be rejected.

        At the limit per address, one of the same address is closed; at the total limit, one of the address with the
        most connections. Connections with a request in progress are never closed.
        """
        address = client_address(peer)
        is_own = self._of_address[address] >= self.per_address
        if (is_own or len(self._open) >= self.limit) and not self._close_one(address if is_own else None):
            return False
        self._open[connection.fileno()] = _Open(connection, address)
        self._of_address[address] += 1
        return True

    def release(self, number: int) -> None:
        """Stop counting a closed connection, given by its file descriptor."""
        if one := self._open.pop(number, None):
            self._of_address -= Counter({one.address: 1})

    def set_stage(self, number: int, stage: int) -> None:
        """Set the stage of a connection: IDLE, READING (a request body) or ANSWERING."""
        if (one := self._open.get(number)) and one.stage != stage:
            one.stage, one.since = stage, time.monotonic()

    def _close_one(self, address: str | None) -> bool:
        """Close an idle connection, of `address` or of any; False if all have a request in progress."""
        self._warn()
        closable = [one for one in self._open.values() if one.stage < ANSWERING and address in (None, one.address)]
        if not closable:
            return False
        victim = min(closable, key=lambda one: (one.stage, -self._of_address[one.address], one.since))
        self.release(victim.connection.fileno())
        # The event loop sees the end of the stream and closes the socket, unless the client already did.
        with suppress(OSError):
            victim.connection.shutdown(socket.SHUT_RDWR)
        return True

    def _warn(self) -> None:
        now = time.monotonic()
        if now - self._last_warning > 60:
            self._last_warning = now
            _log.warning("connection limit reached (%d open); closing idle connections for new ones", len(self))


def client_address(peer: Any) -> str:
    """Return the address by which a client is counted; for IPv6 its /64 network, which a single host may own."""
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
    """A listening socket that applies the limits of a `Connections` before TLS and HTTP are processed."""

    connections: Connections

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept the next connection within the limits. Raises BlockingIOError if none is pending."""
        while True:
            number, peer = self._accept()  # type: ignore[attr-defined]  # socket.accept() would create a plain socket
            connection = _Counted(self.family, self.type, self.proto, fileno=number)
            if self.connections.admit(connection, peer):
                connection.on_close = self.connections.release
                return connection, peer
            connection.close()


class _Counted(socket.socket):
    """A connection that calls `on_close` when it is closed."""

    on_close: Callable[[int], None] | None = None

    def close(self) -> None:
        """Close the socket."""
        if self.on_close is not None and self.fileno() >= 0:
            self.on_close(self.fileno())
        super().close()


def listen(host: str, port: int, connections: Connections) -> Listener:
    """Open a listening socket. Raises ConfigError if the port cannot be opened."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        plain = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        problem = f"{host} port {port} cannot be opened ({error})"
        raise ConfigError(problem, field="--port", value=port, hint="choose another port") from error
    listener = Listener(plain.family, plain.type, plain.proto, fileno=plain.detach())
    listener.connections = connections
    return listener


def connection_limit(wanted: int) -> int:
    """Return `wanted`, or fewer if the process may not open that many files; raises the soft limit if necessary."""
    try:
        import resource
    except ImportError:  # Windows
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = wanted + _RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < files:
        soft = files if hard == resource.RLIM_INFINITY else min(files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - _RESERVED_FILES))


class _Parser(h11.Connection):
    """HTTP parser that gives up on bodies in many tiny chunks, because each chunk costs time to parse."""

    max_chunks, min_mean_bytes = 10_000, 256
    chunks, size, is_too_fine = 0, 0, False

    def next_event(self) -> Any:
        """Return the next event; always NEED_DATA after too many tiny chunks of one body."""
        if self.is_too_fine:
            return h11.NEED_DATA
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = self.size = 0
        elif isinstance(event, h11.Data):
            self.chunks += 1
            self.size += len(event.data)
            if self.chunks > self.max_chunks and self.size < self.chunks * self.min_mean_bytes:
                self.is_too_fine = True
                return h11.NEED_DATA
        return event


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP protocol with timeouts against slow clients.

    head_s:      seconds until a request's headers are complete, from the connection or, for further requests, from
                 their first byte.
    stall_s:     seconds during which a client may leave the response unread.
    open_connections: receives the stage of the connection, if set.
    """

    head_s = 20.0
    stall_s = 60.0
    open_connections: Connections | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        limit = self.config.h11_max_incomplete_event_size
        self.conn = self._parser = _Parser(h11.SERVER, *([] if limit is None else [limit]))
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._number = -1

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout for the headers of the first request."""
        super().connection_made(transport)
        if own := transport.get_extra_info("socket"):
            self._number = own.fileno()
        self._start("head", self.head_s)

    def data_received(self, data: bytes) -> None:
        """Parse received data and update the timeouts."""
        before = self.cycle
        idle = before is None or before.response_complete
        super().data_received(data)
        if self._parser.is_too_fine:
            self.transport.abort()
        elif self.cycle is not before:
            self._stop("head")
        elif idle and not self.transport.is_closing():
            self._start("head", self.head_s)
        self._update_stage()

    def on_response_complete(self) -> None:
        """Mark the connection as idle."""
        super().on_response_complete()
        self._update_stage()

    def pause_writing(self) -> None:
        """Start the timeout for a client that does not read."""
        super().pause_writing()
        self._start("stall", self.stall_s)

    def resume_writing(self) -> None:
        """Stop the timeout for a client that does not read."""
        super().resume_writing()
        self._stop("stall")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timeouts."""
        self._stop("head", "stall")
        self._number = -1
        super().connection_lost(exc)

    def _update_stage(self) -> None:
        if self.open_connections is not None:
            cycle = self.cycle
            is_idle = cycle is None or cycle.response_complete
            self.open_connections.set_stage(
                self._number, IDLE if is_idle else READING if cycle.more_body else ANSWERING
            )

    def _start(self, timer: str, seconds: float) -> None:
        if timer not in self._timers:
            self._timers[timer] = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self, *timers: str) -> None:
        for timer in timers:
            if handle := self._timers.pop(timer, None):
                handle.cancel()
