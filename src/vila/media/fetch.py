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
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

from vila.core.errors import MediaError
from vila.media.connection import PinnedConnection, is_public, resolve

MAX_BYTES = 50 * 2**20
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 16
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
_BY_PATH = "download the file and give its path"


def fetch(
    url: str,
    *,
    max_bytes: int = MAX_BYTES,
    timeout_s: float = 20,
    max_redirects: int = 5,
    allow_private: bool = False,
) -> bytes:
    """The body of `url`, all of it or an error.

    timeout_s:     for everything together: name lookup, redirects, and the last byte of the body.
    allow_private: also fetch from this machine and its network. Without it every address that is not public is
                   refused, at each redirect too, and the connection goes to the very address that was checked.
    Raises MediaError naming the URL (its query left out, for it may hold a key), the reason and what to do.
    """
    until = time.monotonic() + timeout_s
    target = parse_url(url)
    seen = {url}
    while True:
        try:
            answer = _ask(target, until, max_bytes, allow_private)
        except TimeoutError as error:
            raise MediaError(
                f"{target.shown}: no complete answer within {timeout_s:g} s; try again, or {_BY_PATH}"
            ) from error
        except ssl.SSLCertVerificationError as error:
            reason = error.verify_message
            raise MediaError(
                f"{target.shown}: its certificate is not trusted ({reason}); check the address, or {_BY_PATH}"
            ) from error
        except socket.gaierror as error:
            raise MediaError(f"{target.shown}: the host is unknown ({error.strerror}); check the address") from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise MediaError(f"{target.shown}: the connection failed ({reason}); try again, or {_BY_PATH}") from error
        if isinstance(answer, bytes):
            return answer
        if answer in seen:
            raise MediaError(f"{target.shown}: redirects in a circle; check the address")
        if len(seen) > max_redirects:
            raise MediaError(f"{shown(url)}: more than {max_redirects} redirects; give the address that they end at")
        seen.add(answer)
        following = parse_url(answer)
        if target.scheme == "https" and following.scheme == "http":
            raise MediaError(f"{target.shown}: redirects from https to http ({following.shown}); give an https address")
        target = following


def data_url_bytes(url: str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a `data:` URL, base64 or percent-encoded. Raises MediaError when it is malformed or too large."""
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().startswith("data:"):
        raise MediaError(f"{shown(url)}: not a data URL; expected data:image/png;base64,...")
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
            raise MediaError(f"{shown(url)}: its base64 is damaged ({error}); encode the file again") from error
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


def parse_url(url: str) -> Target:
    """The parts of an http or https address. Raises MediaError for any other, and for one with credentials."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode("ascii")
        port = parts.port
    except ValueError as error:
        raise MediaError(f"{shown(url)}: not a valid URL ({error}); check the address") from error
    if parts.scheme not in ("http", "https"):
        raise MediaError(f"{shown(url)}: only http and https addresses are opened, not {parts.scheme!r}; {_BY_PATH}")
    if not _HOST.fullmatch(host):
        raise MediaError(f"{shown(url)}: names no valid host; expected http(s)://host/path")
    if parts.username is not None or parts.password is not None:
        raise MediaError(f"{shown(url)}: holds a user name or password, which is not supported; {_BY_PATH}")
    path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=string.punctuation)
    return Target(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path, url)


def _ask(target: Target, until: float, max_bytes: int, allow_private: bool) -> bytes | str:
    """One request. Returns the body, or the absolute URL that the server redirects to."""
    addresses = resolve(target.host, target.port, until)
    for *_, address in addresses:
        if not (allow_private or is_public(address[0])):
            raise MediaError(
                f"{target.shown}: {target.host} is {address[0]}, which is not a public address; {_BY_PATH}, "
                "or allow private addresses"
            )
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
            status = f"{response.status} {response.reason}".strip()
            raise MediaError(f"{target.shown}: the server answered {status}; check the address, or {_BY_PATH}")
        encoding = response.getheader("Content-Encoding") or "identity"
        if encoding.lower() != "identity":
            raise MediaError(
                f"{target.shown}: the server sent {encoding!r} encoding, which was not asked for; {_BY_PATH}"
            )
        return _read(response, target, max_bytes)
    finally:
        connection.close()


def _read(response: http.client.HTTPResponse, target: Target, max_bytes: int) -> bytes:
    promised = response.length
    if promised is not None and promised > max_bytes:
        raise _too_large(target.shown, max_bytes)
    body = bytearray()
    while chunk := response.read(_CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(target.shown, max_bytes)
    if promised is not None and len(body) != promised:
        raise MediaError(f"{target.shown}: {promised} bytes announced, {len(body)} received; try again")
    return bytes(body)


def _too_large(name: str, max_bytes: int) -> MediaError:
    return MediaError(f"{name}: larger than the limit of {max_bytes:,} bytes; shrink it, or {_BY_PATH}")
