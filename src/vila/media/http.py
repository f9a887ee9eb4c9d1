"""HTTP client for URLs that come from data or from requests, with one SSRF check.

`HTTPClient` resolves a host, rejects it unless all its addresses are public, connects to exactly these addresses, and
limits redirects, body size and total time. `fetch` is the blocking call for one URL; `vila.media.bulk_download` runs
many at once. `api_client` is for a server that the user names. Proxies from the environment are ignored: a proxy would
resolve the host itself, unchecked.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import re
import socket
import ssl
import string
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

import httpcore2

from vila.core.errors import CancelledError, MediaError
from vila.media.http_options import HTTPOptions
from vila.media.limits import DEFAULT_LIMITS, IsCancelled, never
from vila.media.ssrf import is_allowed, is_public, normal_host

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")


# URLs

_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
_DOWNLOAD = "download the file and give its path"
_CHECK = f"check the address, or {_DOWNLOAD}"


class FetchError(MediaError):
    """A URL cannot be fetched. The text contains nothing that a name server or a peer sent.

    kind:          reason to count by: bad_url, host_not_allowed, unknown_host, private_address, timeout, tls,
                   connection, redirect, http_404 (or another status), too_large, encoding, noai.
    is_transient:  whether a later attempt may succeed.
    retry_after_s: pause that the server requested.
    """

    def __init__(
        self,
        kind: str,
        problem: str = "",
        *,
        is_transient: bool = False,
        retry_after_s: float | None = None,
        **details: Any,
    ) -> None:
        super().__init__(problem, **details)
        self.kind, self.is_transient, self.retry_after_s = kind, is_transient, retry_after_s


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed and checked URL. `path` is percent-encoded and includes the query."""

    scheme: str
    host: str
    port: int
    path: str
    url: str

    def error(
        self, kind: str, problem: str, hint: str = f"check the address, or {_DOWNLOAD}", **rest: Any
    ) -> FetchError:
        """Return an error that names this URL."""
        return FetchError(kind, problem, file=redact_url(self.url), hint=hint, **rest)


def parse_url(url: str) -> Target:
    """Parse an http or https URL. Raises FetchError (`bad_url`) for other schemes and for URLs with credentials."""
    file = redact_url(url)
    try:
        parts = urlsplit(url)
        host = normal_host(parts.hostname or "")
        port = parts.port
    except ValueError as error:
        raise FetchError("bad_url", f"not a valid URL ({error})", file=file, hint="check the address") from error
    if parts.scheme not in ("http", "https"):
        raise FetchError(
            "bad_url", file=file, field="scheme", value=parts.scheme, expected="an http or https URL", hint=_DOWNLOAD
        )
    if not _HOST.fullmatch(host):
        raise FetchError("bad_url", "no valid host", file=file, expected="http(s)://host/path")
    if parts.username is not None or parts.password is not None:
        raise FetchError("bad_url", "a user name or password in a URL is not supported", file=file, hint=_DOWNLOAD)
    path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=string.punctuation)
    return Target(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path, url)


def redact_url(url: str) -> str:
    """Return `url` for messages: printable, shortened, without query and credentials, which may be secret."""
    if url[:5].lower() == "data:":
        return url if len(url) <= 60 else f"{url[:40]}... ({len(url)} characters)"
    plain = "".join(char if char.isprintable() else "_" for char in url)
    scheme, mark, rest = plain.partition("://")
    authority, slash, path = rest.partition("/")
    plain = scheme + mark + authority.rpartition("@")[2] + slash + path
    plain, mark, _ = plain.partition("?")
    plain += "?..." if mark else ""
    return plain if len(plain) <= 200 else f"{plain[:180]}... ({len(plain)} characters)"


def data_url_bytes(url: str, *, max_bytes: int = DEFAULT_LIMITS.image_bytes) -> bytes:
    """Decode a `data:` URL, base64 or percent-encoded. Raises MediaError if it is malformed or too large."""
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().startswith("data:"):
        raise MediaError("not a data URL", file=redact_url(url), expected="data:image/png;base64,...")
    if not head.lower().endswith(";base64"):
        content = unquote_to_bytes(payload)
    else:
        try:
            packed = "".join(unquote_to_bytes(payload).decode("ascii").split()).rstrip("=")
            packed = packed.replace("-", "+").replace("_", "/")
            if len(packed) * 3 // 4 > max_bytes:
                raise _too_large(redact_url(url), max_bytes)
            content = base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
        except (binascii.Error, UnicodeDecodeError) as error:
            raise MediaError(f"invalid base64 ({error})", file=redact_url(url), hint="encode the file again") from error
    if len(content) > max_bytes:
        raise _too_large(redact_url(url), max_bytes)
    return content


def _too_large(name: str, max_bytes: int) -> FetchError:
    return FetchError(
        "too_large",
        "too many bytes",
        file=name,
        field="max_bytes",
        expected=f"at most {max_bytes:,} bytes",
        hint=f"shrink it, or {_DOWNLOAD}",
    )


# Connections

_REMEMBER_S = 300.0
_MAX_LOOKUPS = 32
_FRAMING_BYTES = 1 << 17


class PrivateAddressError(Exception):
    """A host has an address that is not public."""


class CheckedNetwork(httpcore2.AsyncNetworkBackend):
    """Network backend that resolves a host, rejects it if any address is not public, and connects to one of them.

    The name is never resolved a second time for the connection, so DNS rebinding has no effect. TLS still verifies the
    name. Addresses are cached for five minutes.
    max_bytes: a response that has received more than twice as many, framing included, is ended.
    """

    def __init__(self, *, allow_private: bool, max_bytes: int) -> None:
        self._allow_private = allow_private
        self._max_received = 2 * max_bytes + _FRAMING_BYTES
        self._backend = httpcore2.AnyIOBackend()
        self._known: dict[str, tuple[float, asyncio.Task[list[str]]]] = {}
        self._lookups = asyncio.Semaphore(_MAX_LOOKUPS)

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect within `timeout` seconds, name lookup included.

        Raises PrivateAddressError, OSError from the lookup, TimeoutError, and httpcore2's errors.
        """
        until = time.monotonic() + (timeout or 3600)
        async with asyncio.timeout(timeout):
            addresses = await asyncio.shield(self._resolve(host))
        if not (self._allow_private or all(map(is_public, addresses))):
            raise PrivateAddressError
        failure: Exception = httpcore2.ConnectError("the host has no address")
        for tried, address in enumerate(addresses):
            # An address that does not answer leaves time for the others.
            left = (until - time.monotonic()) / (len(addresses) - tried)
            if left <= 0:
                break
            try:
                stream = await self._backend.connect_tcp(address, port, left, local_address, socket_options)
                return _LimitedStream(stream, self._max_received)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def sleep(self, seconds: float) -> None:
        """Sleep."""
        await asyncio.sleep(seconds)

    def _resolve(self, host: str) -> asyncio.Task[list[str]]:
        now = time.monotonic()
        expires, lookup = self._known.get(host, (0.0, None))
        if lookup is None or expires <= now or (lookup.done() and (lookup.cancelled() or lookup.exception())):
            if len(self._known) > 50_000:
                self._known.clear()
            lookup = asyncio.create_task(self._look_up(host))
            lookup.add_done_callback(lambda task: task.cancelled() or task.exception())  # retrieved, so not logged
            self._known[host] = (now + _REMEMBER_S, lookup)
        return lookup

    async def _look_up(self, host: str) -> list[str]:
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[str]] = loop.create_future()

        def look_up() -> None:
            try:
                entries = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
                settle, result = found.set_result, list(dict.fromkeys(str(entry[4][0]) for entry in entries))
            except OSError as error:
                settle, result = found.set_exception, error  # type: ignore[assignment]
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(lambda: found.done() or settle(result))

        async with self._lookups:
            # getaddrinfo has no timeout. A daemon thread, unlike an executor's, does not delay the end of the process.
            threading.Thread(target=look_up, name="vila-resolve", daemon=True).start()
            return await found


class _LimitedStream(httpcore2.AsyncNetworkStream):
    """Network stream that ends after `max_received` bytes of one response: chunk extensions have no limit otherwise."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream, max_received: int) -> None:
        self._stream, self._max_received, self._received = stream, max_received, 0

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        content = await self._stream.read(max_bytes, timeout)
        self._received += len(content)
        if self._received > self._max_received:
            raise httpcore2.ReadError("too much data for one response")
        return content

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._received = 0
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.AsyncNetworkStream:
        stream = await self._stream.start_tls(ssl_context, server_hostname, timeout)
        return _LimitedStream(stream, self._max_received)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


@lru_cache(maxsize=1)
def tls_context() -> ssl.SSLContext:
    """Return a TLS context that verifies certificates and host names against the system's authorities."""
    return ssl.create_default_context()


# Client

_REDIRECTS = (301, 302, 303, 307, 308)
_TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_NOAI_TAGS = ("noai", "noimageai")


class HTTPClient:
    """GET requests over shared connections. Use as `async with HTTPClient(options) as client`.

    limiter: called with the host of each request, redirects included; returns a context manager that is held meanwhile.
    """

    def __init__(
        self, options: HTTPOptions, limiter: Callable[[str], AbstractAsyncContextManager[None]] | None = None
    ) -> None:
        self._options = options
        self._limiter = limiter or (lambda _: nullcontext())
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls_context(),
            max_connections=options.max_connections,
            max_keepalive_connections=options.max_connections // 2,
            keepalive_expiry=5.0,
            http1=True,
            http2=False,
            network_backend=CheckedNetwork(allow_private=options.allow_private, max_bytes=options.max_bytes),
        )

    async def __aenter__(self) -> HTTPClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.aclose()

    async def get(self, url: str, *, allowed_domains: Sequence[str] = (), cancelled: IsCancelled = never) -> bytes:
        """Return the complete body of `url`, following redirects.

        allowed_domains: see `is_allowed`; checked at each redirect too, like the address.
        cancelled:       called after each chunk of the body.
        Raises FetchError, and CancelledError once `cancelled` returns True.
        """
        target, visited, left = parse_url(url), {url}, self._options.total_timeout_s
        while True:
            if not is_allowed(target.host, allowed_domains):
                hint = "use an allowed host, or a data: URL"
                raise target.error("host_not_allowed", "not one of the allowed media domains", hint, field="host")
            async with self._limiter(target.host):
                began = time.monotonic()
                with self._translated_errors(target):
                    async with asyncio.timeout(left):
                        body, location = await self._request(target, cancelled)
                left -= time.monotonic() - began
            if location is None:
                return body
            if location in visited:
                raise target.error("redirect", "circular redirect")
            if len(visited) > self._options.max_redirects:
                problem = f"more than {self._options.max_redirects} redirects"
                raise parse_url(url).error("redirect", problem, "give the final address")
            visited.add(location)
            following = parse_url(location)
            if target.scheme == "https" and following.scheme == "http":
                raise following.error("redirect", "redirect from https to http", "give an https address")
            target = following

    async def _request(self, target: Target, cancelled: IsCancelled) -> tuple[bytes, str | None]:
        """Send one request. Returns the body, or the absolute URL that the server redirects to."""
        options = self._options
        timeouts = {"connect": options.connect_timeout_s, "read": options.read_timeout_s,
                    "write": options.read_timeout_s}  # fmt: skip
        request = self._pool.stream(
            "GET",
            httpcore2.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path),
            headers={"Host": _host_header(target), "User-Agent": options.user_agent, "Accept-Encoding": "identity"},
            extensions={"timeout": timeouts},
        )
        async with request as response:
            headers = _joined_headers(response.headers)
            if response.status in _REDIRECTS and (location := headers.get("location")):
                # Headers are decoded as latin-1; bytes beyond ASCII are sent back percent-encoded.
                return b"", urljoin(target.url, quote(location.strip(), safe=string.punctuation, encoding="latin-1"))
            self._check_head(target, response.status, headers)
            body = bytearray()
            async for chunk in response.aiter_stream():
                if cancelled():
                    raise CancelledError("fetching was cancelled", file=redact_url(target.url))
                body += chunk
                if len(body) > options.max_bytes:
                    raise _too_large(redact_url(target.url), options.max_bytes)
            return bytes(body), None

    def _check_head(self, target: Target, status: int, headers: dict[str, str]) -> None:
        if status != 200:
            raise target.error(
                f"http_{status}",
                f"HTTP status {_status_text(status)}",
                is_transient=status in _TRANSIENT_STATUSES,
                retry_after_s=retry_after_s(headers.get("retry-after"), time.time()) if status in (429, 503) else None,
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._options.max_bytes:
            raise _too_large(redact_url(target.url), self._options.max_bytes)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise target.error("encoding", "the server sent a content encoding that was not requested", _DOWNLOAD)
        tags = re.split(r"[:, ]+", headers.get("x-robots-tag", "").lower())
        if self._options.respect_noai and any(tag in tags for tag in _NOAI_TAGS):
            raise target.error("noai", "its X-Robots-Tag header forbids use for training")

    @contextmanager
    def _translated_errors(self, target: Target) -> Iterator[None]:
        """Raise FetchError for errors of the network and of the protocol."""
        try:
            yield
        except (TimeoutError, httpcore2.TimeoutException) as error:
            expected = f"a complete response within {self._options.total_timeout_s:g} s"
            raise target.error(
                "timeout", "timed out", f"try again, or {_DOWNLOAD}", expected=expected, is_transient=True
            ) from error
        except PrivateAddressError as error:
            raise self._unreachable(target, "private_address") from error
        except socket.gaierror as error:
            again = error.errno == socket.EAI_AGAIN
            raise self._unreachable(target, "unknown_host", is_transient=again) from error
        except (httpcore2.ProtocolError, httpcore2.UnsupportedProtocol) as error:
            raise target.error("connection", "the response is not valid HTTP", is_transient=True) from error
        except (httpcore2.NetworkError, OSError) as error:
            causes = list(_causes(error))
            untrusted = next((one for one in causes if isinstance(one, ssl.SSLCertVerificationError)), None)
            if untrusted:
                problem = f"its certificate is not trusted ({untrusted.verify_message})"
                raise target.error("tls", problem) from error
            # The text of the operating system for the error number: the exception's own text may contain an address.
            number = next((one.errno for one in causes if isinstance(one, OSError) and one.errno), None)
            reason = "the peer closed it" if number is None else os.strerror(number)
            problem, hint = f"the connection failed ({reason})", f"try again, or {_DOWNLOAD}"
            raise target.error("connection", problem, hint, is_transient=True) from error

    def _unreachable(self, target: Target, kind: str, **rest: Any) -> FetchError:
        # One message for both cases: a client of a server must not learn which internal host names exist.
        if self._options.allow_private:
            return target.error(kind, "unknown host", "check the address", field="host", **rest)
        hint = f"check the address, {_DOWNLOAD}, or allow private addresses"
        return target.error(kind, "unknown host, or an address that is not public", hint, field="host", **rest)


def fetch(
    url: str,
    *,
    max_bytes: int = DEFAULT_LIMITS.image_bytes,
    timeout_s: float = DEFAULT_LIMITS.image_fetch_s,
    max_redirects: int = 5,
    allow_private: bool = False,
    allowed_domains: Sequence[str] = (),
    cancelled: IsCancelled = never,
) -> bytes:
    """Return the complete body of `url`; blocks. `timeout_s` limits everything together, name lookup included.

    See `HTTPOptions` and `HTTPClient.get` for the other arguments and for the errors.
    """
    options = HTTPOptions(
        max_connections=1,
        connect_timeout_s=timeout_s,
        read_timeout_s=timeout_s,
        total_timeout_s=timeout_s,
        max_bytes=max_bytes,
        max_redirects=max_redirects,
        allow_private=allow_private,
    )

    async def get() -> bytes:
        async with HTTPClient(options) as client:
            return await client.get(url, allowed_domains=allowed_domains, cancelled=cancelled)

    return _run(get())


def api_client(*, max_connections: int, connect_timeout_s: float, read_timeout_s: float) -> httpx2.Client:
    """Return a blocking client for a server that the user names, which may be private: no address check.

    Redirects are not followed, because they would carry the API key to another host.
    """
    import httpx2

    return httpx2.Client(
        verify=tls_context(),
        trust_env=False,
        timeout=httpx2.Timeout(read_timeout_s, connect=connect_timeout_s, pool=None),
        limits=httpx2.Limits(max_connections=max_connections),
        headers={"User-Agent": "vila", "Accept-Encoding": "identity"},
    )


def retry_after_s(value: str | None, now: float) -> float | None:
    """Parse a Retry-After header, seconds or a date (RFC 9110, 10.2.3). None if it is absent or malformed.

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


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also where the calling thread has a running event loop (a notebook)."""
    is_running = True
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        is_running = False
    if not is_running:  # not in the `except` block, whose error would become the context of those raised here
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _joined_headers(listed: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in ((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in listed):
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _host_header(target: Target) -> str:
    host = f"[{target.host}]" if ":" in target.host else target.host
    return host if target.port == {"http": 80, "https": 443}[target.scheme] else f"{host}:{target.port}"


def _status_text(status: int) -> str:
    # The standard's phrase, not the server's.
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)
