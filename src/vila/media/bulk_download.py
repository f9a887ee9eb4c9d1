"""Many downloads at once: rate limiting per host, retries with back-off, failures returned instead of raised."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import urlsplit

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from vila.media.http import FetchError, HTTPClient
from vila.media.http_options import DownloadOptions

_MAX_IDLE_HOSTS = 20_000


@dataclass(frozen=True, slots=True)
class DownloadResult:
    """Body of a URL, or the reason why there is none.

    kind:   reason to count by, see `FetchError.kind`; empty on success.
    reason: the failure in words.
    """

    url: str
    content: bytes | None
    kind: str = ""
    reason: str = ""
    attempts: int = 1


class BulkDownloader:
    """Downloads over shared connections. Use as `async with BulkDownloader(options) as downloader`."""

    def __init__(self, options: DownloadOptions) -> None:
        self._options = options
        limiter = RateLimiter(options.max_connections_per_host, options.host_delay_s, options.max_retry_after_s)
        self._client = HTTPClient(options, limiter.request)

    async def __aenter__(self) -> BulkDownloader:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    async def download(self, url: str) -> DownloadResult:
        """Download `url` with up to `max_attempts` attempts."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, FetchError) and error.is_transient),
            wait=self._pause,
            stop=lambda state: (
                state.attempt_number >= self._options.max_attempts
                or state.upcoming_sleep > self._options.max_retry_after_s
            ),
            reraise=True,
        )
        number = 0
        try:
            async for attempt in retrying:
                with attempt:
                    number = attempt.retry_state.attempt_number
                    return DownloadResult(url, await self._client.get(url), attempts=number)
        except FetchError as error:
            return DownloadResult(url, None, error.kind, error.problem or str(error), number)
        raise AssertionError("the last attempt returns or raises")

    def _pause(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        requested = error.retry_after_s if isinstance(error, FetchError) else None
        backoff: float = self._options.initial_backoff_s * 2 ** (state.attempt_number - 1) * (1 + random.random() / 4)
        return max(backoff, requested or 0.0)


@dataclass(slots=True)
class _Host:
    slots: asyncio.Semaphore
    next_start: float = 0.0
    users: int = 0


@dataclass(slots=True)
class RateLimiter:
    """Limit the requests to each host.

    max_concurrent: requests at once.
    delay_s:        minimum time between two starts.
    max_pause_s:    longest Retry-After that pauses the host for all requests.
    """

    max_concurrent: int
    delay_s: float
    max_pause_s: float
    _hosts: dict[str, _Host] = field(default_factory=dict)

    @asynccontextmanager
    async def request(self, host: str) -> AsyncIterator[None]:
        """Wait until a request to `host` may start; hold its slot during the body.

        A FetchError with `retry_after_s` that the body raises pauses the host.
        """
        state = self._hosts.setdefault(host, _Host(asyncio.Semaphore(self.max_concurrent)))
        state.users += 1
        try:
            async with state.slots:
                while (wait := state.next_start - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                state.next_start = time.monotonic() + self.delay_s
                yield
        except FetchError as error:
            if error.retry_after_s is not None and error.retry_after_s <= self.max_pause_s:
                state.next_start = max(state.next_start, time.monotonic() + error.retry_after_s)
            raise
        finally:
            state.users -= 1
            if len(self._hosts) > _MAX_IDLE_HOSTS:
                self._forget_idle()

    def _forget_idle(self) -> None:
        now = time.monotonic()
        for host, state in list(self._hosts.items()):
            if not state.users and state.next_start <= now:
                del self._hosts[host]


def interleave_hosts(urls: Iterable[str]) -> list[str]:
    """Reorder URLs round-robin over their hosts, so that no host delays the others."""
    rank: dict[str, int] = {}
    keyed: list[tuple[int, int, str]] = []
    for position, url in enumerate(urls):
        try:
            host = (urlsplit(url).hostname or "").lower()
        except ValueError:
            host = ""
        rank[host] = rank.get(host, -1) + 1
        keyed.append((rank[host], position, url))
    return [url for _, _, url in sorted(keyed)]
