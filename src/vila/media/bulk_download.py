"""Fetching by the hundred: the rules of `vila.media.http`, with many requests in flight and patience for busy hosts.

What goes wrong is returned, not raised: in a list of a million addresses a dead one is an ordinary result.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import string
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from types import TracebackType
from urllib.parse import quote, urljoin, urlsplit

import httpcore2

from vila.core.errors import MediaError
from vila.media.http import CheckedNetwork, PrivateAddressError, Target, parse_url

# --- politeness
# How hard one host may be pressed: requests at once, pauses between them, and waiting when it asks for it.


_MANY = 20_000


@dataclass(slots=True)
class _Host:
    slots: asyncio.Semaphore
    next_start: float = 0.0
    users: int = 0


@dataclass(slots=True)
class RateLimiter:
    """One gate per host. `per_host` requests at once; `delay_s` seconds at least from one start to the next."""

    per_host: int
    delay_s: float
    _hosts: dict[str, _Host] = field(default_factory=dict)

    @asynccontextmanager
    async def passing(self, host: str) -> AsyncIterator[None]:
        """Wait for a turn at `host`, and hold it while the body runs."""
        gate = self._hosts.setdefault(host, _Host(asyncio.Semaphore(self.per_host)))
        gate.users += 1
        try:
            async with gate.slots:
                while (wait := gate.next_start - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                gate.next_start = time.monotonic() + self.delay_s
                yield
        finally:
            gate.users -= 1
            if len(self._hosts) > _MANY:
                self._forget_idle()

    def _forget_idle(self) -> None:
        now = time.monotonic()
        idle = [host for host, gate in self._hosts.items() if not gate.users and gate.next_start <= now]
        for host in idle:
            del self._hosts[host]

    def pause(self, host: str, seconds: float) -> None:
        """Nothing more goes to `host` for `seconds`: it has said that it is pressed too hard."""
        if gate := self._hosts.get(host):
            gate.next_start = max(gate.next_start, time.monotonic() + seconds)


def retry_after_s(value: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date (RFC 9110, 10.2.3); None when it says nothing.

    now: Unix time.
    """
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except ValueError:
        return None


def spread_by_host(urls: Iterable[str]) -> list[str]:
    """The same URLs, the first of every host before the second of any: no host keeps the others waiting."""
    rank: dict[str, int] = {}
    keyed: list[tuple[int, int, str]] = []
    for position, url in enumerate(urls):
        host = host_of(url)
        rank[host] = rank.get(host, -1) + 1
        keyed.append((rank[host], position, url))
    return [url for _, _, url in sorted(keyed)]


def host_of(url: str) -> str:
    """The host that a URL names, in small letters, or nothing when it names none."""
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_REFUSED_TAGS = ("noai", "noimageai")


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """How to ask, how long to wait, and what to refuse."""

    concurrency: int = 256
    """Requests at once, over all hosts."""
    per_host: int = 4
    """Requests at once to one host."""
    host_delay_s: float = 0.05
    """Least time from one request to a host to the next."""
    connect_timeout_s: float = 5.0
    """For the name lookup and the connection, and once more for TLS."""
    read_timeout_s: float = 10.0
    """Longest silence."""
    total_timeout_s: float = 30.0
    """For one attempt, redirects and the last byte included; waiting for a turn at the host is not counted."""
    attempts: int = 3
    """Tries in all for timeouts, broken connections and busy servers; other failures are final at once."""
    backoff_s: float = 1.0
    """Pause before the second try; it doubles each time, with up to a quarter of chance added."""
    max_wait_s: float = 60.0
    """A server that asks for more than this with Retry-After has failed."""
    max_bytes: int = 20 * 2**20
    """Largest body."""
    max_redirects: int = 5
    """Redirects per attempt."""
    allow_private: bool = False
    """Also fetch from this machine and its network."""
    respect_noai: bool = True
    """Leave what an `X-Robots-Tag` header (noai, noimageai) keeps from training."""
    user_agent: str = "vila"
    """Who we say we are; name a contact here for large downloads."""


DEFAULT_OPTIONS = DownloadOptions()


@dataclass(frozen=True, slots=True)
class DownloadResult:
    """What came of one address. `content` is None exactly when it failed.

    kind:   a short word to count failures by (http_404, timeout, too_large, ...), empty on success.
    reason: the failure in words.
    """

    url: str
    content: bytes | None
    kind: str = ""
    reason: str = ""
    attempts: int = 1


class _Failure(Exception):
    def __init__(self, kind: str, reason: str, *, again: bool = False, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.again, self.wait_s = kind, reason, again, wait_s


class BulkDownloader:
    """Connections that are shared by many requests; use as `async with BulkDownloader(rules) as fetcher`."""

    def __init__(self, rules: DownloadOptions) -> None:
        self._rules = rules
        self._gates = RateLimiter(rules.per_host, rules.host_delay_s)
        self._network = CheckedNetwork(allow_private=rules.allow_private)
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(),
            max_connections=rules.concurrency,
            max_keepalive_connections=rules.concurrency // 2,
            keepalive_expiry=5.0,
            http1=True,
            http2=False,
            network_backend=self._network,
        )

    async def __aenter__(self) -> BulkDownloader:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.aclose()
        self._network.close()

    async def fetch(self, url: str) -> DownloadResult:
        """The body of `url`, or why there is none, after as many attempts as the rules allow."""
        for attempt in range(1, self._rules.attempts + 1):
            try:
                return DownloadResult(url, await self._attempt(url), attempts=attempt)
            except _Failure as failure:
                last = DownloadResult(url, None, failure.kind, failure.reason, attempt)
                wait = self._rules.backoff_s * 2 ** (attempt - 1) * (1 + random.random() / 4)
                wait = max(wait, failure.wait_s or 0)
                if not failure.again or attempt == self._rules.attempts or wait > self._rules.max_wait_s:
                    return last
                await asyncio.sleep(wait)
        raise AssertionError("at least one attempt is made")

    async def _attempt(self, url: str) -> bytes:
        seen: set[str] = set()
        address, previous = url, None
        left = self._rules.total_timeout_s
        while True:
            try:
                target = parse_url(address)
            except (MediaError, UnicodeError) as error:
                raise _Failure("bad_url", str(error)) from error
            if previous is not None and previous.scheme == "https" and target.scheme == "http":
                raise _Failure("redirect", f"redirects from https to http ({target.display})")
            seen.add(address)
            async with self._gates.passing(target.host):
                began = time.monotonic()
                answer = await self._ask(target, left)
                left -= time.monotonic() - began
            if isinstance(answer, bytes):
                return answer
            if answer in seen:
                raise _Failure("redirect", "redirects in a circle")
            if len(seen) > self._rules.max_redirects:
                raise _Failure("redirect", f"more than {self._rules.max_redirects} redirects")
            address, previous = answer, target

    async def _ask(self, target: Target, left_s: float) -> bytes | str:
        """One request, its failures translated. Returns the body, or the absolute URL of a redirect."""
        try:
            async with asyncio.timeout(left_s):
                return await self._request(target)
        except (TimeoutError, httpcore2.TimeoutException) as error:
            raise _Failure("timeout", "no complete answer in time", again=True) from error
        except PrivateAddressError as error:
            raise _Failure("private_address", str(error)) from error
        except OSError as error:  # from the name lookup; those of connections come as httpcore2's
            raise _Failure("unknown_host", str(error), again=error.errno == socket.EAI_AGAIN) from error
        except httpcore2.ConnectError as error:
            if untrusted := _certificate_error(error):
                raise _Failure("tls", f"its certificate is not trusted ({untrusted.verify_message})") from error
            raise _Failure("connection", str(error) or "no connection", again=True) from error
        except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            raise _Failure("connection", str(error) or type(error).__name__, again=True) from error
        except (httpcore2.UnsupportedProtocol, ValueError) as error:
            raise _Failure("bad_url", str(error)) from error

    async def _request(self, target: Target) -> bytes | str:
        rules = self._rules
        timeouts = {"connect": rules.connect_timeout_s, "read": rules.read_timeout_s, "write": rules.read_timeout_s}
        request = self._pool.stream(
            "GET",
            httpcore2.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path),
            headers={"Host": _authority(target), "User-Agent": rules.user_agent, "Accept-Encoding": "identity"},
            extensions={"timeout": timeouts},
        )
        async with request as response:
            headers = _headers(response.headers)
            if response.status in _REDIRECTS and (location := headers.get("location")):
                return urljoin(target.url, quote(location.strip(), safe=string.punctuation, encoding="latin-1"))
            if response.status != 200:
                self._raise_status(response.status, headers, target.host)
            self._check_headers(headers)
            body = bytearray()
            async for chunk in response.aiter_stream():
                body += chunk
                if len(body) > rules.max_bytes:
                    raise _Failure("too_large", f"larger than the limit of {rules.max_bytes:,} bytes")
            return bytes(body)

    def _raise_status(self, status: int, headers: dict[str, str], host: str) -> None:
        wait = retry_after_s(headers.get("retry-after"), time.time()) if status in (429, 503) else None
        if wait is not None and wait <= self._rules.max_wait_s:
            self._gates.pause(host, wait)
        raise _Failure(f"http_{status}", f"the server answered {status}", again=status in _BUSY, wait_s=wait)

    def _check_headers(self, headers: dict[str, str]) -> None:
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._rules.max_bytes:
            raise _Failure("too_large", f"{int(length):,} bytes announced, over the limit of {self._rules.max_bytes:,}")
        if (encoding := headers.get("content-encoding", "identity").lower()) != "identity":
            raise _Failure("encoding", f"sent in {encoding!r} encoding, which was not asked for")
        words = headers.get("x-robots-tag", "").lower().replace(":", ",").replace(" ", ",").split(",")
        if self._rules.respect_noai and any(tag in words for tag in _REFUSED_TAGS):
            raise _Failure("kept_out", "its X-Robots-Tag header keeps it from training")


def _headers(listed: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in ((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in listed):
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _certificate_error(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error


def _authority(target: Target) -> str:
    host = f"[{target.host}]" if ":" in target.host else target.host
    return host if target.port == {"http": 80, "https": 443}[target.scheme] else f"{host}:{target.port}"
