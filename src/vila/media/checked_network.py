"""Connections of `vila.media.fetch_many`: names resolved once, addresses checked, the checked address dialled."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import httpcore2

from vila.media.addresses import is_public

_REMEMBER_S = 300.0
_LOOK_UPS = 32


class PrivateAddressError(Exception):
    """A host whose address is not public; the text names both."""


class CheckedNetwork(httpcore2.AsyncNetworkBackend):
    """Resolves a host, refuses it when any address is not public, and connects to one of the very addresses checked.

    TLS still verifies the name. Answers are remembered for five minutes, so a name that changes its address between
    two requests is checked again.
    """

    def __init__(self, *, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._below = httpcore2.AnyIOBackend()
        self._known: dict[str, tuple[float, asyncio.Future[list[str]]]] = {}
        # The loop's own executor has few threads, and getaddrinfo holds one for as long as a dead name server takes.
        self._threads = ThreadPoolExecutor(_LOOK_UPS, thread_name_prefix="vila-resolve")

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect within `timeout` seconds, name lookup included. Raises PrivateAddressError, or httpcore2's errors."""
        until = time.monotonic() + (timeout or 3600)
        try:
            addresses = await asyncio.wait_for(asyncio.shield(self._addresses(host)), until - time.monotonic())
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout(f"{host}: name lookup") from error
        for address in addresses:
            if not (self._allow_private or is_public(address)):
                raise PrivateAddressError(f"{host} is {address}, which is not a public address")
        failure: Exception = httpcore2.ConnectError(f"{host} has no address")
        for tried, address in enumerate(addresses):
            left = (until - time.monotonic()) / (len(addresses) - tried)
            if left <= 0:
                break
            try:
                return await self._below.connect_tcp(address, port, left, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None
    ) -> httpcore2.AsyncNetworkStream:
        """Never: the web is not behind a socket file."""
        raise PrivateAddressError(f"{path}: a socket file, which is not a public address")

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    def close(self) -> None:
        """Let go of the threads that look names up."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _addresses(self, host: str) -> asyncio.Future[list[str]]:
        now = time.monotonic()
        known = self._known.get(host)
        if known is not None and known[0] > now and not _failed(known[1]):
            return known[1]
        if len(self._known) > 50_000:
            self._known.clear()
        found = asyncio.get_running_loop().run_in_executor(self._threads, _look_up, host)
        self._known[host] = (now + _REMEMBER_S, found)
        return found


def _failed(future: asyncio.Future[list[str]]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)


def _look_up(host: str) -> list[str]:
    found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
