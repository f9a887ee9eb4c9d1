"""The only place that opens a URL: http and https, public addresses, a size limit and one deadline.

Proxies from the environment are not used: the check of the address would then be the proxy's.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import http.client
import ipaddress
import re
import socket
import ssl
import string
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

import httpcore2

from vila.core.errors import CancelledError, MediaError
from vila.media.limits import DEFAULT_LIMITS, IsCancelled, never

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


# --- connection
# Connections of `vila.media.http`: names resolved once, sockets that keep a deadline, TLS verified.


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


# --- addresses
# Which IP addresses and host names may be fetched from. The ranges are listed here, not taken from `ipaddress`.


# IANA IPv4 Special-Purpose Address Registry, those that are reachable included: none of them serves images.
_IPV4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private use
        "100.64.0.0/10",  # shared address space (carrier-grade NAT); Alibaba's metadata at 100.100.100.200
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # not IANA's: the host of a virtual machine at Azure
        "169.254.0.0/16",  # link-local; metadata of most clouds at 169.254.169.254
        "172.16.0.0/12",  # private use
        "192.0.0.0/24",  # IETF protocol assignments; Oracle's metadata at 192.0.0.192
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private use
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved; limited broadcast
    )
)
# IPv6 is the other way round: IANA has allocated this for global unicast, and everything else is special.
_IPV6_GLOBAL = ipaddress.IPv6Network("2000::/3")
_IPV6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # IETF protocol assignments: Teredo 2001::/32, benchmarking 2001:2::/48, ORCHID, DRIP, ...
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: leads on to an IPv4 address, which could be any
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is reachable from the whole Internet and serves no special purpose.

    An IPv4-mapped (`::ffff:0:0/96`) or NAT64 (`64:ff9b::/96`) address is as public as the IPv4 address inside it. What
    is no address, or has a zone (`fe80::1%eth0`), is not public.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _IPV4)
    if ip.scope_id is not None:
        return False
    if ip in _MAPPED or ip in _NAT64:
        return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip in _IPV6_GLOBAL and not any(ip in network for network in _IPV6)


def is_allowed(host: str, domains: Sequence[str]) -> bool:
    """Whether `host` is one of `domains`; `*.example.org` stands for every host below example.org. None allow all."""
    if not domains:
        return True
    name = normal_host(host)
    for domain in domains:
        below = domain.startswith("*.")
        wanted = normal_host(domain[2:] if below else domain)
        if name.endswith(f".{wanted}") if below else name == wanted:
            return True
    return False


def normal_host(host: str) -> str:
    """A host name in the one form in which names are compared: small ASCII letters, no dot at the end.

    Raises ValueError for a name that has no such form.
    """
    return host.encode("idna").decode("ascii").lower().rstrip(".")


_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 16
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
_BY_PATH = "download the file and give its path"


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
    """The body of `url`, complete.

    timeout_s:       for everything together: name lookup, redirects, and the last byte of the body.
    allow_private:   also fetch from this machine and its network. Without it every address that is not public is
                     refused, at each redirect too, and the connection goes to the very address that was checked.
    allowed_domains: hosts to fetch from, at each redirect too; see `is_allowed`. Empty: all.
    cancelled:       called between reads.
    Raises MediaError naming the URL (its query left out, for it may hold a key), the reason and what to do, and
    CancelledError. The text holds nothing that a name server or a peer sent: it may go to whoever gave the URL.
    """
    until = time.monotonic() + timeout_s
    target = parse_url(url)
    visited = {url}
    while True:
        if not is_allowed(target.host, allowed_domains):
            hint = "use an allowed host, or a data: URL"
            raise target.error("is not among the allowed media domains", hint, "host")
        try:
            answer = _ask(target, until, max_bytes, allow_private, cancelled)
        except TimeoutError as error:
            raise target.error(f"no complete answer within {timeout_s:g} s", f"try again, or {_BY_PATH}") from error
        except ssl.SSLCertVerificationError as error:
            problem = f"its certificate is not trusted ({error.verify_message})"
            raise target.error(problem, f"check the address, or {_BY_PATH}") from error
        except socket.gaierror as error:
            raise _unreachable(target, allow_private) from error
        except http.client.HTTPException as error:
            raise target.error("the server's answer is not sound HTTP", f"check the address, or {_BY_PATH}") from error
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise target.error(f"the connection failed ({reason})", f"try again, or {_BY_PATH}") from error
        if isinstance(answer, bytes):
            return answer
        if answer in visited:
            raise target.error("redirects in a circle", "check the address")
        if len(visited) > max_redirects:
            problem, hint = f"more than {max_redirects} redirects", "give the address that they end at"
            raise MediaError(problem, file=redact_url(url), hint=hint)
        visited.add(answer)
        following = parse_url(answer)
        if target.scheme == "https" and following.scheme == "http":
            raise target.error(f"redirects from https to http ({following.display})", "give an https address")
        target = following


def _unreachable(target: Target, allow_private: bool) -> MediaError:
    # One message for both cases, so that a client cannot find out which internal host names exist.
    if allow_private:
        return target.error("is unknown", "check the address", "host")
    hint = f"check the address, {_BY_PATH}, or allow private addresses"
    return target.error("is unknown, or has an address that is not public", hint, "host")


def data_url_bytes(url: str, *, max_bytes: int = DEFAULT_LIMITS.image_bytes) -> bytes:
    """The content of a `data:` URL, base64 or percent-encoded. Raises MediaError when it is malformed or too large."""
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
            problem = f"its base64 is damaged ({error})"
            raise MediaError(problem, file=redact_url(url), hint="encode the file again") from error
    if len(content) > max_bytes:
        raise _too_large(redact_url(url), max_bytes)
    return content


def redact_url(url: str) -> str:
    """`url` as messages name it: without its query and credentials, which may be secret, and not endless."""
    if url[:5].lower() == "data:":
        return url if len(url) <= 60 else f"{url[:40]}... ({len(url)} characters)"
    plain = "".join(char if char.isprintable() else "_" for char in url)
    scheme, mark, rest = plain.partition("://")
    authority, slash, path = rest.partition("/")
    plain = scheme + mark + authority.rpartition("@")[2] + slash + path
    plain, mark, _ = plain.partition("?")
    plain += "?..." if mark else ""
    return plain if len(plain) <= 200 else f"{plain[:180]}... ({len(plain)} characters)"


@dataclass(frozen=True, slots=True)
class Target:
    """One URL, taken apart and checked; `path` is ready to be sent."""

    scheme: str
    host: str
    port: int
    path: str
    url: str

    @property
    def display(self) -> str:
        """The address as messages name it."""
        return redact_url(self.url)

    def error(self, problem: str, hint: str, field: str | None = None) -> MediaError:
        """An error that names this URL."""
        return MediaError(problem, file=self.display, field=field, hint=hint)


def parse_url(url: str) -> Target:
    """The parts of an http or https address. Raises MediaError for any other, and for one with credentials."""
    try:
        parts = urlsplit(url)
        host = normal_host(parts.hostname or "")
        port = parts.port
    except ValueError as error:
        raise MediaError(f"not a valid URL ({error})", file=redact_url(url), hint="check the address") from error
    if parts.scheme not in ("http", "https"):
        expected = "an http or https address"
        raise MediaError(file=redact_url(url), field="scheme", value=parts.scheme, expected=expected, hint=_BY_PATH)
    if not _HOST.fullmatch(host):
        raise MediaError("names no valid host", file=redact_url(url), expected="http(s)://host/path")
    if parts.username is not None or parts.password is not None:
        raise MediaError("holds a user name or password, which is not supported", file=redact_url(url), hint=_BY_PATH)
    path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=string.punctuation)
    return Target(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path, url)


def _ask(target: Target, until: float, max_bytes: int, allow_private: bool, cancelled: IsCancelled) -> bytes | str:
    """One request. Returns the body, or the absolute URL that the server redirects to."""
    addresses = resolve(target.host, target.port, until)
    if not allow_private and not all(is_public(address[0]) for *_, address in addresses):
        raise _unreachable(target, allow_private)
    connection = PinnedConnection(target.host, target.port, addresses, secure=target.scheme == "https", until=until)
    try:
        connection.request(
            "GET", target.path, headers={"User-Agent": "vila", "Accept-Encoding": "identity", "Connection": "close"}
        )
        response = connection.getresponse()
        if response.status in _REDIRECTS and (location := response.getheader("Location")):
            # Headers arrive as latin-1; bytes beyond ASCII are sent back as they came, percent-encoded.
            return urljoin(target.url, quote(location.strip(), safe=string.punctuation, encoding="latin-1"))
        if response.status != 200:
            raise target.error(f"the server answered {_status(response)}", f"check the address, or {_BY_PATH}")
        if (response.getheader("Content-Encoding") or "identity").lower() != "identity":
            raise target.error("the server sent an encoding that was not asked for", _BY_PATH)
        body = bytearray()
        for piece in _pieces(response, max_bytes):
            if cancelled():
                raise CancelledError("fetching was cancelled", file=target.display)
            body += piece
            if len(body) > max_bytes:
                raise _too_large(target.display, max_bytes)
        return bytes(body)
    except _TooLarge:
        raise _too_large(target.display, max_bytes) from None
    finally:
        connection.close()


def _status(response: http.client.HTTPResponse) -> str:
    # With the standard's phrase, not the server's own.
    try:
        return f"{response.status} {HTTPStatus(response.status).phrase}"
    except ValueError:
        return str(response.status)


class _TooLarge(Exception):
    """The body announces more bytes than the limit."""


_LENGTH = re.compile(r"[0-9]{1,18}")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(;[^\r\n]*)?\r?\n")
_MAX_LINE = 4096
_MAX_TRAILERS = 100


def _pieces(response: http.client.HTTPResponse, max_bytes: int) -> Iterator[bytes]:
    """The body in pieces of at most 64 KiB. Raises HTTPException when it does not end as its headers or chunks say.

    `http.client` would take any text that `int` takes for a length, and reads to the end of the stream for a negative
    one, past every limit.
    """
    coding = (response.getheader("Transfer-Encoding") or "").strip().lower()
    if coding == "chunked":
        yield from _dechunked(response, max_bytes)
        return
    lengths = {length.strip() for length in response.headers.get_all("Content-Length", [])}
    if coding or len(lengths) > 1 or not all(map(_LENGTH.fullmatch, lengths)):
        raise http.client.HTTPException("contradictory or malformed length of the body")
    promised = int(lengths.pop()) if lengths else None
    if promised is not None and promised > max_bytes:
        raise _TooLarge
    received = 0
    while piece := response.read(_CHUNK):
        received += len(piece)
        yield piece
    if promised is not None and received != promised:
        raise http.client.IncompleteRead(b"", promised - received)


def _dechunked(response: http.client.HTTPResponse, max_bytes: int) -> Iterator[bytes]:
    """The body of a response in chunked transfer coding (RFC 9112, 7.1); extensions and trailers are dropped."""
    stream, left, framing = response.fp, max_bytes, max_bytes + (1 << 16)

    def line() -> bytes:
        nonlocal framing
        text = stream.readline(_MAX_LINE)
        framing -= len(text)
        if not text.endswith(b"\n") or framing < 0:
            raise http.client.HTTPException("malformed chunk")
        return text

    while True:
        match = _CHUNK_SIZE.fullmatch(line())
        if match is None:
            raise http.client.HTTPException("malformed chunk size")
        size = int(match[1], 16)
        if size > left:
            raise _TooLarge
        left -= size
        if not size:
            break
        while size:
            piece = stream.read(min(size, _CHUNK))
            if not piece:
                raise http.client.IncompleteRead(b"", size)
            size -= len(piece)
            yield piece
        if line() not in (b"\r\n", b"\n"):
            raise http.client.HTTPException("chunk longer than its size")
    for _ in range(_MAX_TRAILERS):
        if line() in (b"\r\n", b"\n"):
            return
    raise http.client.HTTPException("too many trailers")


def _too_large(name: str, max_bytes: int) -> MediaError:
    expected = f"at most {max_bytes:,} bytes"
    return MediaError(
        "too many bytes", file=name, field="max_bytes", expected=expected, hint=f"shrink it, or {_BY_PATH}"
    )


# --- checked_network
# Connections of `vila.media.bulk_download`: names resolved once, addresses checked, the checked address dialled.


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
