"""Access to the server: API keys, allowed host names, and the fair limit on concurrent requests.

Checking the `Host` header protects a local server against DNS rebinding: a web page that points its own host name at
127.0.0.1 could otherwise read the answers, because the browser takes the server for the page's origin.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from vila.core.errors import ConfigError
from vila.core.reading import read_text
from vila.serve.errors import ApiError, too_many_requests


class AllowedHosts:
    """Host names that requests may use; loopback names are always allowed.

    names: further names; `*.example.org` allows every subdomain of example.org.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = tuple(name.lower().rstrip(".") for name in names)

    def accepts(self, host: str) -> bool:
        """Return whether a host (without port) is allowed."""
        return is_loopback(host.lower().rstrip(".")) or self.is_named(host)

    def is_named(self, host: str) -> bool:
        """Return whether a host is in `names`."""
        host = host.lower().rstrip(".")
        return any(host == name or (name.startswith("*.") and host.endswith(name[1:])) for name in self.names)

    def check(self, headers: Headers) -> None:
        """Raise ApiError (403) for another `Host`. HTTP/1.0 requests without one pass: browsers do not send them."""
        if not all(self.accepts(host_name(value)) for value in headers.getlist("host")):
            message = "this host name is not allowed; start the server with --allowed-host NAME"
            raise ApiError(403, message, code="host_not_allowed")


class SameOrigin:
    """ASGI middleware of a web page: rejects other host names and requests from pages of other origins.

    Browsers send the origin of the requesting page in the `Origin` header, whatever the page's script does.
    hosts: allowed host names; None allows all.
    """

    def __init__(self, app: ASGIApp, hosts: AllowedHosts | None = None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request, or respond with 403."""
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            try:
                if self.hosts is not None:
                    self.hosts.check(headers)
                self._check_origin(headers)
            except ApiError as error:
                await error.response(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check_origin(self, headers: Headers) -> None:
        if (origin := headers.get("origin")) is None:
            return
        page = origin.lower().partition("://")[2]
        is_own = page == headers.get("host", "").lower()
        if not page or not (is_own or (self.hosts is not None and self.hosts.is_named(host_name(page)))):
            raise ApiError(403, "requests from pages of other origins are not allowed", code="origin_not_allowed")


def parse_allowed_hosts(listening: str, allowed: Iterable[str]) -> AllowedHosts | None:
    """Return the allowed host names of a server that listens on address `listening`; None allows all.

    allowed: names given by the user. Without any, a server on a loopback address accepts loopback names only, any
    other server accepts all. Raises ConfigError for invalid names.
    """
    allowed = tuple(allowed)
    for name in allowed:
        bare = name.removeprefix("*.")
        if not bare or host_name(bare) != bare.lower() or not bare.isascii() or set(bare) & set("* "):
            expected = "a host name without scheme and port, or *.NAME for all its subdomains"
            raise ConfigError(field="--allowed-host", value=name, expected=expected)
    return AllowedHosts(allowed) if allowed or is_loopback(listening) else None


def host_name(value: str) -> str:
    """Return the host of a `Host` header, without port and brackets; empty if it is malformed."""
    try:
        return "" if set(value) & set("@/?#\\") else urlsplit(f"//{value.strip()}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Return whether a host is localhost, a subdomain of it, in 127.0.0.0/8, or ::1."""
    host = host.lower().strip("[]")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_api_keys(given: Iterable[str], file: Path | None, variable: str = "") -> tuple[str, ...]:
    """Return all API keys without duplicates; empty if the server requires none.

    given:    keys of the command line.
    file:     file with one key per line; blank lines and lines that start with # are skipped.
    variable: value of the environment variable VILA_API_KEY, empty if it is not set.
    Raises ConfigError for a file that is unreadable or contains no key, and for keys that an HTTP header cannot carry.
    Error messages never show a key.
    """
    keys = [(key, {"field": "--api-key"}) for key in given]
    if variable:
        keys.append((variable, {"field": "VILA_API_KEY"}))
    if file is not None:
        lines = [line.strip() for line in read_text(file, ConfigError).splitlines()]
        found = [(line, number) for number, line in enumerate(lines, start=1) if line and not line.startswith("#")]
        if not found:
            raise ConfigError("contains no key", file=file, expected="one key per line")
        keys += [(key, {"file": str(file), "record": f"line {number}"}) for key, number in found]
    for key, location in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            problem = "the key has characters that HTTP headers cannot carry" if key else "the key is empty"
            raise ConfigError(problem, expected="printable ASCII without spaces", **location)
    return tuple(dict.fromkeys(key for key, _ in keys))


_ACTIVE_S = 30.0
"""Seconds after its last request during which a client counts for the fair share."""


class ConcurrencyLimit:
    """Limits the requests of one model that run or wait, fairly between clients.

    A single client may use the whole capacity. When several are active, each gets an equal share; a client without a
    request is admitted even beyond the capacity, so that one client cannot lock the others out. Requests count from
    the moment when their body has been received and validated; one with n answers counts n.

    capacity: concurrent requests.
    reserve:  requests beyond the capacity, for clients without a running request.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.reserve = max(1, capacity // 8)
        self._active: Counter[str] = Counter()
        self._last_seen: dict[str, float] = {}

    @property
    def active(self) -> int:
        """Requests that are running or waiting."""
        return self._active.total()

    @property
    def is_full(self) -> bool:
        """Whether requests of every client would be rejected."""
        return self.active >= self.capacity + self.reserve

    def acquire(self, client: str, count: int = 1) -> None:
        """Count `count` answers of a client until `release`. Raises ApiError (429)."""
        now = time.monotonic()
        self._last_seen[client] = now
        self._last_seen = {
            name: at for name, at in self._last_seen.items() if now - at < _ACTIVE_S or self._active[name]
        }
        own, share = self._active[client], max(1, self.capacity // len(self._last_seen))
        within_share = own == 0 or len(self._last_seen) == 1 or own + count <= share
        limit = self.capacity if own else self.capacity + self.reserve
        if self.active + count > limit or not within_share:
            detail = "" if within_share else f", {own} of them yours, which is your share"
            raise too_many_requests(f"{self.active} requests are running or waiting{detail}; retry later", 1)
        self._active[client] += count

    def release(self, client: str, count: int = 1) -> None:
        """Stop counting `count` answers of a client."""
        self._active -= Counter({client: count})
