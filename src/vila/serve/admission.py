"""Who may ask: the keys of the server, and the host names under which it answers.

A page of another site must not reach a server on this machine by a name of its own. DNS rebinding lets a web page point
its own host name to 127.0.0.1; the browser then takes the server for the page's own and lets it read the answers. The
name still stands in the `Host` header.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vila.core.errors import ConfigError
from vila.core.reading import file_errors
from vila.serve.errors import ApiError, busy


class AllowedHosts:
    """Host names of a server; loopback names always belong to them.

    names: further ones; `*.example.org` stands for every name below example.org.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = tuple(name.lower().rstrip(".") for name in names)

    def accepts(self, host: str) -> bool:
        """Whether a host, without its port, is one of the names."""
        return is_loopback(host.lower().rstrip(".")) or self.is_named(host)

    def is_named(self, host: str) -> bool:
        """Whether a host is one of the further names."""
        host = host.lower().rstrip(".")
        return any(host == name or (name.startswith("*.") and host.endswith(name[1:])) for name in self.names)

    def check(self, scope: Mapping[str, Any]) -> None:
        """Raises ApiError, 403, for a request to another name. HTTP/1.0 without a name passes: no browser sends it."""
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if not all(self.accepts(host_name(value)) for value in given):
            message = "the server does not answer to this host name; start it with --allowed-host NAME"
            raise ApiError(403, message, code="host_not_allowed")


class SameOrigin:
    """ASGI middleware of a web page: answers to its own host names only, and to requests of its own pages only.

    A browser names the page that a request comes from in the `Origin` header, whatever script sent it.
    hosts: names under which the page answers; None for all.
    """

    def __init__(self, app: ASGIApp, hosts: AllowedHosts | None = None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] in ("http", "websocket"):
            try:
                if self.hosts is not None:
                    self.hosts.check(scope)
                self._check_origin(scope)
            except ApiError as error:
                await JSONResponse(error.body, error.status)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check_origin(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if (origin := headers.get(b"origin")) is None:
            return
        own = headers.get(b"host", "").lower()
        page = origin.lower().partition("://")[2]
        known = page == own or (self.hosts is not None and self.hosts.is_named(host_name(page)))
        if not page or not known:
            raise ApiError(403, "a page of another site cannot use this one", code="origin_not_allowed")


def parse_allowed_hosts(listening: str, allowed: Iterable[str]) -> AllowedHosts | None:
    """The names of a server that listens on an address; None for all.

    allowed: further names. Without any, a server that others can reach answers to every name. Raises ConfigError for
    what is no host name.
    """
    allowed = tuple(allowed)
    for name in allowed:
        bare = name.removeprefix("*.")
        if not bare or host_name(bare) != bare.lower() or not bare.isascii() or set(bare) & set("* "):
            expected = "a host name without scheme and port, or *.NAME for all names below NAME"
            raise ConfigError(field="--allowed-host", value=name, expected=expected)
    return AllowedHosts(allowed) if allowed or is_loopback(listening) else None


def host_name(value: str) -> str:
    """The host of a Host header, without port and brackets; empty for what is none."""
    try:
        return "" if set(value) & set("@/?#\\") else urlsplit(f"//{value.strip()}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a name stands for this machine alone: localhost, names below it, 127.0.0.0/8 and ::1."""
    host = host.lower().strip("[]")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_api_keys(given: Iterable[str], file: Path | None, variable: str = "") -> tuple[str, ...]:
    """All keys that open a server; empty when it needs none.

    given:    of the command line.
    file:     with a key a line; empty lines and lines that begin with # are left out.
    variable: value of the environment variable, empty when it is not set.
    Raises ConfigError for a file that cannot be read or holds no key, and for a key that no header can carry. Messages
    do not show keys.
    """
    keys = [(key, {"field": "--api-key"}) for key in given]
    if variable:
        keys.append((variable, {"field": "VILA_API_KEY"}))
    if file is not None:
        with file_errors(file, ConfigError):
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        found = [(line.strip(), number) for number, line in enumerate(lines, start=1) if not _is_aside(line)]
        if not found:
            raise ConfigError("holds no key", file=file, expected="a key a line")
        keys += [(key, {"file": str(file), "record": f"line {number}"}) for key, number in found]
    for key, where in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            problem = "the key is empty" if not key else "the key holds a character that no header can carry"
            raise ConfigError(problem, expected="printable ASCII without spaces", **where)
    return tuple(dict.fromkeys(key for key, _ in keys))


def _is_aside(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


# --- room
# ConcurrencyLimit for requests, shared fairly between clients.


_RECENT_S = 30.0
"""A client that asked this lately has a claim to its share."""


class ConcurrencyLimit:
    """Requests of one model that run or wait, counted once their body has arrived and is valid.

    A client alone may fill the room. As soon as others ask, each has an equal share of it; and a client that holds
    nothing gets one request in beyond the room, so that whoever filled it does not lock the others out.

    capacity: requests, each answer of `n` counted.
    reserve:  requests beyond, for clients that hold none.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.reserve = reserved_slots(capacity)
        self._held: Counter[str] = Counter()
        self._asked: dict[str, float] = {}

    @property
    def held(self) -> int:
        """Requests that are in."""
        return self._held.total()

    @property
    def is_full(self) -> bool:
        """Whether nobody at all would be let in."""
        return self.held >= self.capacity + self.reserve

    def acquire(self, client: str, count: int = 1) -> None:
        """Take room for `count` answers; `leave` gives it back. Raises ApiError, 429."""
        now = time.monotonic()
        self._asked[client] = now
        self._asked = {one: at for one, at in self._asked.items() if now - at < _RECENT_S or self._held[one]}
        own, share = self._held[client], max(1, self.capacity // len(self._asked))
        within = own == 0 or len(self._asked) == 1 or own + count <= share
        limit = self.capacity if own else self.capacity + self.reserve
        if self.held + count > limit or not within:
            others = "" if len(self._asked) == 1 else f", {own} of them yours, which is your share"
            raise busy(f"{self.held} requests are open already{others if not within else ''}; ask again in a moment", 1)
        self._held[client] += count

    def release(self, client: str, count: int = 1) -> None:
        """Give back the room of a request that has ended."""
        self._held[client] -= count
        if self._held[client] <= 0:
            del self._held[client]


def reserved_slots(capacity: int) -> int:
    """Requests beyond the capacity that are kept for clients that hold none."""
    return max(1, capacity // 8)
