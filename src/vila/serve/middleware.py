"""Middleware that every request passes first: its id, header limits, host, key and body; and the log line about it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vila.core.errors import CancelledError
from vila.serve.admission import AllowedHosts
from vila.serve.chat import Service
from vila.serve.connections import client_address
from vila.serve.errors import ApiError, busy, internal_error, to_api_error, unavailable

# --- body
# Reading the body of a request within limits on its size, its time, and the memory of all bodies together.


_LINGER_S = 5.0
_LINGER_BYTES = 256 * 2**20
_BUSY = busy("too many large requests at once; ask again in a moment", 2)


@dataclass
class BodyReader:
    """Reads bodies within limits, and counts the bytes of all that are in memory.

    most:    bytes of a body.
    total:   bytes of all bodies of requests that are being answered; one client may hold half of them.
    seconds: for a whole body.
    stall_s: between two pieces of one.
    """

    most: int
    total: int
    seconds: float
    stall_s: float = 15.0
    held: Counter[str] = field(default_factory=Counter)

    async def read(self, scope: Scope, receive: Receive, client: str) -> bytes:
        """Read a body; the caller gives its length to `release` when it is no longer needed.

        Raises ApiError: 413 when it is too large, 408 when it is too slow, 429 when memory is short. What is refused is
        read on for a moment and thrown away, because a client that is still sending does not see the answer.
        """
        announced = content_length(scope)
        body = bytearray()
        until = asyncio.get_running_loop().time() + self.seconds
        try:
            if announced > self.most:
                await _throw_away(receive)
                raise self._refusal()
            while True:
                message = await self._piece(receive, until)
                if message["type"] == "http.disconnect":
                    raise CancelledError("the client closed the connection")
                piece, more = message.get("body", b""), message.get("more_body", False)
                body += piece
                self.held[client] += len(piece)
                too_large = len(body) > self.most
                if too_large or self.held[client] > self.total // 2 or self.held.total() > self.total:
                    if more:
                        await _throw_away(receive)
                    raise self._refusal() if too_large else _BUSY
                if not more:
                    return bytes(body)
        except BaseException:
            self.release(client, len(body))
            raise

    def release(self, client: str, count: int) -> None:
        """Stop counting `count` bytes of a client."""
        self.held[client] -= count
        if self.held[client] <= 0:
            del self.held[client]

    async def _piece(self, receive: Receive, until: float) -> Message:
        try:
            async with asyncio.timeout_at(min(until, asyncio.get_running_loop().time() + self.stall_s)):
                return await receive()
        except TimeoutError as error:
            late = asyncio.get_running_loop().time() >= until
            why = f"was not complete within {self.seconds:g} s" if late else f"made a pause of {self.stall_s:g} s"
            raise ApiError(408, f"the body {why}", headers={"Connection": "close"}) from error

    def _refusal(self) -> ApiError:
        message = f"the body is larger than {self.most:,} bytes; send fewer or smaller images, or their addresses"
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def replay(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body was read already."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _throw_away(receive: Receive) -> None:
    count = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while count < _LINGER_BYTES:
                message = await receive()
                count += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def content_length(scope: Scope) -> int:
    """Bytes of the body by its announcement, 0 if there is none."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and len(value) < 20:
            return int(value)
    return 0


def has_body(scope: Scope) -> bool:
    """Whether a body is announced, of known length or in chunks."""
    return content_length(scope) > 0 or any(name == b"transfer-encoding" for name, _ in scope["headers"])


_log = logging.getLogger("vila.serve")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KNOWN_PATHS = ("/v1/chat/completions", "/v1/models", "/health", "/ready", "/metrics", "/openapi.json")
_BODY_PATHS = frozenset({"/v1/chat/completions"})
MAX_HEADERS, MAX_HEADER_BYTES = 100, 8192
"""Headers of a request, and bytes of the name and the value of one. All together have at most 32 KiB."""


class RequestMiddleware:
    """ASGI middleware around the whole application.

    keys:      that open `/v1`; none leaves it open.
    hosts:     names under which the server answers; None for all.
    root_path: under which a proxy shows the server, whether or not it takes the path away.
    body_s, stall_s: seconds for the body of a request, and between two pieces of it.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        keys: Sequence[str] = (),
        hosts: AllowedHosts | None = None,
        root_path: str = "",
        body_s: float = 60,
        stall_s: float = 15,
    ) -> None:
        self.app, self.service, self.hosts, self.root_path = app, service, hosts, root_path
        # Digests have one length, so that the time of a comparison says nothing about the length of a key.
        self.keys = [_digest(key.encode()) for key in keys]
        most = service.limits.body
        self.bodies = BodyReader(most, 8 * most, body_s, stall_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer in its place."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.root_path:
            path = scope["path"].removeprefix(self.root_path)
            scope = {**scope, "root_path": self.root_path, "path": self.root_path + path}
        seen = _RequestTrace(scope, receive, send)
        exits = ExitStack()
        scope.setdefault("state", {}).update(request_id=seen.id, begun=seen.begun, exits=exits)
        self.service.metrics.open.inc()
        try:
            with exits:
                _check_headers(scope)
                if self.hosts is not None:
                    self.hosts.check(scope)
                client = scope["state"]["client"] = self._check_key(scope)
                body = await self._body(scope, seen.receive, client, exits)
                await self.app(scope, replay(body, seen.receive), seen.send)
        except Exception as error:  # noqa: BLE001 - the border: a client gets words, the log gets the rest
            known = to_api_error(error)
            if known is None:
                _log.exception("%s failed", seen.id)
            if not seen.status:
                await respond(known or internal_error(seen.id))(scope, receive, seen.send)
        finally:
            self.service.metrics.open.dec()
            self._note(scope, seen)

    def _check_key(self, scope: Scope) -> str:
        """The client, by which requests are counted: its key, or its address where none is needed."""
        address = client_address(scope.get("client"))
        if not self.keys or not _path(scope).startswith("/v1") or scope["method"] == "OPTIONS":
            return address
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = _digest(key.strip())
        # All keys are compared, so that the time says nothing about which one was near.
        matches = [hmac.compare_digest(digest, own) for own in self.keys]
        if scheme.lower() != b"bearer" or not any(matches):
            message = "no valid key; send the header 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return f"key {matches.index(True)}"

    async def _body(self, scope: Scope, receive: Receive, client: str, exits: ExitStack) -> bytes:
        """The body of a request that may have one; nothing is read for any other."""
        path, method = _path(scope), scope["method"]
        if path not in _BODY_PATHS or method != "POST":
            if has_body(scope) and (path in _KNOWN_PATHS or method in ("GET", "HEAD", "OPTIONS")):
                raise ApiError(400, f"{method} {path[:200]} takes no body", code="unexpected_body")
            return b""
        if self.service.models.draining:
            raise unavailable("the server is stopping and takes no new requests")
        if self.service.models.is_full:
            raise busy("too many requests are open already; ask again in a moment", 1)
        body = await self.bodies.read(scope, receive, client)
        exits.callback(self.bodies.release, client, len(body))
        return body

    def _note(self, scope: Scope, seen: _RequestTrace) -> None:
        path = _path(scope)
        known = path if path in _KNOWN_PATHS else "/v1/models" if path.startswith("/v1/models/") else "other"
        status = 499 if seen.gone else seen.status
        self.service.metrics.requests.labels(known, str(status)).inc()
        usage: dict[str, Any] = scope["state"].get("tokens", {})
        tokens = f" {usage['prompt_tokens']}+{usage['completion_tokens']} tokens" if usage else ""
        quiet = path in ("/health", "/ready", "/metrics")
        _log.log(
            logging.DEBUG if quiet else logging.INFO,
            "%s %s %s %d %.3f s%s", seen.id, scope["method"][:20], ascii(path[:200])[1:-1], status,
            time.monotonic() - seen.begun, tokens,
        )  # fmt: skip


class _RequestTrace:
    """A request's own `receive` and `send`, which notice how it ends and give the answer its id."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        self.id = given if _ID.fullmatch(given) else secrets.token_hex(8)
        self.begun = time.monotonic()
        self.status, self.gone, self._complete = 0, False, False
        self._receive, self._send = receive, send

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._complete:
            self.gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["X-Request-Id"] = self.id
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = True
        await self._send(message)


def respond(error: ApiError) -> JSONResponse:
    """The response that carries an error."""
    return JSONResponse(error.body, error.status, dict(error.headers))


def _check_headers(scope: Scope) -> None:
    headers = scope["headers"]
    if len(headers) > MAX_HEADERS:
        raise ApiError(431, f"{len(headers)} headers; this server takes {MAX_HEADERS}", code="headers_too_large")
    for name, value in headers:
        if len(name) + len(value) > MAX_HEADER_BYTES:
            message = f"a header of {len(name) + len(value):,} bytes; this server takes {MAX_HEADER_BYTES:,}"
            raise ApiError(431, message, code="headers_too_large")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _path(scope: Scope) -> str:
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root) else path
