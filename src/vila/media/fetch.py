"""The only place that opens a URL: http and https, public addresses, a size limit and one deadline.

Proxies from the environment are not used: the check of the address would then be the proxy's.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import re
import socket
import ssl
import string
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

from vila.core.errors import CancelledError, MediaError
from vila.media.addresses import is_allowed, is_public, normal_host
from vila.media.connection import PinnedConnection, resolve
from vila.media.limits import DEFAULT_LIMITS, IsCancelled, never

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
            raise MediaError(problem, file=shown(url), hint=hint)
        visited.add(answer)
        following = parse_url(answer)
        if target.scheme == "https" and following.scheme == "http":
            raise target.error(f"redirects from https to http ({following.shown})", "give an https address")
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
        raise MediaError("not a data URL", file=shown(url), expected="data:image/png;base64,...")
    if not head.lower().endswith(";base64"):
        content = unquote_to_bytes(payload)
    else:
        try:
            packed = "".join(unquote_to_bytes(payload).decode("ascii").split()).rstrip("=")
            packed = packed.replace("-", "+").replace("_", "/")
            if len(packed) * 3 // 4 > max_bytes:
                raise _too_large(shown(url), max_bytes)
            content = base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
        except (binascii.Error, UnicodeDecodeError) as error:
            problem = f"its base64 is damaged ({error})"
            raise MediaError(problem, file=shown(url), hint="encode the file again") from error
    if len(content) > max_bytes:
        raise _too_large(shown(url), max_bytes)
    return content


def shown(url: str) -> str:
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
    def shown(self) -> str:
        """The address as messages name it."""
        return shown(self.url)

    def error(self, problem: str, hint: str, field: str | None = None) -> MediaError:
        """An error that names this URL."""
        return MediaError(problem, file=self.shown, field=field, hint=hint)


def parse_url(url: str) -> Target:
    """The parts of an http or https address. Raises MediaError for any other, and for one with credentials."""
    try:
        parts = urlsplit(url)
        host = normal_host(parts.hostname or "")
        port = parts.port
    except ValueError as error:
        raise MediaError(f"not a valid URL ({error})", file=shown(url), hint="check the address") from error
    if parts.scheme not in ("http", "https"):
        expected = "an http or https address"
        raise MediaError(file=shown(url), field="scheme", value=parts.scheme, expected=expected, hint=_BY_PATH)
    if not _HOST.fullmatch(host):
        raise MediaError("names no valid host", file=shown(url), expected="http(s)://host/path")
    if parts.username is not None or parts.password is not None:
        raise MediaError("holds a user name or password, which is not supported", file=shown(url), hint=_BY_PATH)
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
                raise CancelledError("fetching was cancelled", file=target.shown)
            body += piece
            if len(body) > max_bytes:
                raise _too_large(target.shown, max_bytes)
        return bytes(body)
    except _TooLarge:
        raise _too_large(target.shown, max_bytes) from None
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
