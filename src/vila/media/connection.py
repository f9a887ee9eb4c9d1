"""Connections of `vila.media.fetch`: names resolved once, sockets that keep a deadline, TLS verified."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Address = tuple[Any, ...]
"""One entry of `socket.getaddrinfo`."""


def resolve(host: str, port: int, until: float) -> list[Address]:
    """Every address of `host`. Raises OSError when there is none, TimeoutError when the answer is not there in time."""
    found: list[list[Address] | OSError] = []

    def look_up() -> None:
        try:
            found.append(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except OSError as error:
            found.append(error)

    # getaddrinfo takes no timeout, so it waits in a thread that may be left behind.
    thread = threading.Thread(target=look_up, name="vila-resolve", daemon=True)
    thread.start()
    thread.join(_left(until))
    if not found:
        raise TimeoutError
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class PinnedConnection(http.client.HTTPConnection):
    """Connects to addresses that were checked, never resolving the name again; TLS still verifies the name."""

    def __init__(self, host: str, port: int, addresses: list[Address], *, secure: bool, until: float) -> None:
        super().__init__(host, port)
        if secure:
            self.default_port = http.client.HTTPS_PORT
        self._addresses, self._secure, self._until = addresses, secure, until

    def connect(self) -> None:
        """Try the addresses in their order until one accepts."""
        failure = OSError("the host has no address")
        for tried, (family, kind, protocol, _, address) in enumerate(self._addresses):
            try:
                plain = _Socket(family, kind, protocol)
            except OSError as error:  # a family that this machine does not have
                failure = error
                continue
            plain.until = self._until
            try:
                # An address that stays silent leaves time for the others.
                plain.settimeout(_left(self._until) / (len(self._addresses) - tried))
                plain.connect(address)
                self.sock = self._secured(plain) if self._secure else plain
                return
            except ssl.SSLError:
                plain.close()
                raise
            except OSError as error:
                plain.close()
                failure = error
        raise failure

    def _secured(self, plain: socket.socket) -> ssl.SSLSocket:
        plain.settimeout(_left(self._until))
        secured = _tls().wrap_socket(plain, server_hostname=self.host)
        assert isinstance(secured, _SecureSocket)
        secured.until = self._until
        return secured


class _Socket(socket.socket):
    """A socket that never waits past `until`, however slowly bytes drip in."""

    until: float

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        self.settimeout(_left(self.until))
        return super().recv_into(buffer, nbytes, flags)


class _SecureSocket(ssl.SSLSocket):
    """The same over TLS."""

    until: float

    def recv_into(self, buffer: WriteableBuffer, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(_left(self.until))
        return super().recv_into(buffer, nbytes, flags)


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    """Certificates and host names are verified against the system's authorities."""
    context = ssl.create_default_context()
    context.sslsocket_class = _SecureSocket
    return context
