"""ASGI middleware: assigns a request id, checks the API key, enforces header, body and memory limits, writes the access
log.
"""

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
from vila.serve.errors import ApiError, internal_error, to_api_error, too_many_requests, unavailable

_log = logging.getLogger("vila.serve")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KNOWN_PATHS = ("/v1/chat/completions", "/v1/models", "/health", "/ready", "/metrics", "/openapi.json")
_BODY_PATHS = frozenset({"/v1/chat/completions"})
MAX_HEADERS, MAX_HEADER_BYTES = 100, 8192
"""Headers of a request, and bytes of one header's name and value. uvicorn limits all headers together to 32 KiB."""

_DRAIN_S = 5.0
_DRAIN_BYTES = 256 * 2**20
"""Limits on reading the rest of a rejected body, so that a client that is still sending sees the response."""


@dataclass
class BodyReader:
    """Reads request bodies under limits and counts the bytes that are in memory.

    max_bytes:       limit of one body.
    max_total_bytes: limit of the bodies of all requests in progress; one client may use half of it.
    timeout_s:       for a whole body.
    stall_s:         between two chunks of a body.
    buffered:        bytes in memory, by client.
    """

    max_bytes: int
    max_total_bytes: int
    timeout_s: float
    stall_s: float = 15.0
    buffered: Counter[str] = field(default_factory=Counter)

    async def read(self, scope: Scope, receive: Receive, client: str) -> bytes:
        """Read a body; the caller passes its length to `release` when the request ends.

        Raises ApiError: 413 if it is too large, 408 if it is too slow, 429 if too much memory is in use; and
        CancelledError if the client disconnects.
        """
        body = bytearray()
        deadline = asyncio.get_running_loop().time() + self.timeout_s
        try:
            if content_length(scope) > self.max_bytes:
                await _drain(receive)
                raise self._too_large()
            while True:
                message = await self._receive(receive, deadline)
                if message["type"] == "http.disconnect":
                    raise CancelledError("the client closed the connection")
                chunk, more = message.get("body", b""), message.get("more_body", False)
                body += chunk
                self.buffered[client] += len(chunk)
                is_too_large = len(body) > self.max_bytes
                if is_too_large or self._is_full(client):
                    if more:
                        await _drain(receive)
                    if is_too_large:
                        raise self._too_large()
                    raise too_many_requests("too many large requests in progress; retry later", 2)
                if not more:
                    return bytes(body)
        except BaseException:
            self.release(client, len(body))
            raise

    def release(self, client: str, count: int) -> None:
        """Stop counting `count` bytes of a client."""
        self.buffered[client] -= count
        if self.buffered[client] <= 0:
            del self.buffered[client]

    def _is_full(self, client: str) -> bool:
        return self.buffered[client] > self.max_total_bytes // 2 or self.buffered.total() > self.max_total_bytes

    async def _receive(self, receive: Receive, deadline: float) -> Message:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + self.stall_s)):
                return await receive()
        except TimeoutError as error:
            is_late = loop.time() >= deadline
            problem = f"not complete within {self.timeout_s:g} s" if is_late else f"no data for {self.stall_s:g} s"
            raise ApiError(408, f"reading the body: {problem}", headers={"Connection": "close"}) from error

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self.max_bytes:,} bytes; send fewer or smaller images, or their URLs"
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields a body that was already read, then the messages of `receive`."""
    is_sent = False

    async def replayed() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _drain(receive: Receive) -> None:
    """Read and discard the rest of a body, within limits."""
    count = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            while count < _DRAIN_BYTES:
                message = await receive()
                count += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def content_length(scope: Scope) -> int:
    """Return the value of the Content-Length header, 0 without one."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and len(value) < 20:
            return int(value)
    return 0


def has_body(scope: Scope) -> bool:
    """Return whether the headers announce a body, of known length or chunked."""
    return content_length(scope) > 0 or any(name == b"transfer-encoding" for name, _ in scope["headers"])


class RequestMiddleware:
    """Outermost ASGI middleware of the server.

    keys:      API keys for `/v1`; empty: no authentication.
    hosts:     allowed host names; None allows all.
    root_path: path prefix of a reverse proxy, which may or may not strip it.
    body_s, stall_s: timeouts of a body and between its chunks, in seconds.
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
        # Comparing digests of equal length does not leak the length of a key.
        self.keys = [_digest(key.encode()) for key in keys]
        limit = service.limits.body
        self.bodies = BodyReader(limit, 8 * limit, body_s, stall_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the request and forward it, or respond with an error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.root_path:
            path = scope["path"].removeprefix(self.root_path)
            scope = {**scope, "root_path": self.root_path, "path": self.root_path + path}
        trace = _RequestTrace(scope, receive, send)
        exits = ExitStack()
        scope.setdefault("state", {}).update(request_id=trace.id, begun=trace.begun, exits=exits)
        self.service.metrics.open.inc()
        try:
            with exits:
                _check_headers(scope)
                if self.hosts is not None:
                    self.hosts.check(scope)
                client = scope["state"]["client"] = self._authenticate(scope)
                body = await self._read_body(scope, trace.receive, client, exits)
                await self.app(scope, replay(body, trace.receive), trace.send)
        except Exception as error:  # noqa: BLE001 - outermost handler: the client gets an error object, the log the rest
            known = to_api_error(error)
            if known is None:
                _log.exception("%s failed", trace.id)
            if not trace.status:
                await error_response(known or internal_error(trace.id))(scope, receive, trace.send)
        finally:
            self.service.metrics.open.dec()
            self._log_access(scope, trace)

    def _authenticate(self, scope: Scope) -> str:
        """Return the client's name for the limits: the number of its API key, or its address. Raises ApiError (401)."""
        address = client_address(scope.get("client"))
        if not self.keys or not _path(scope).startswith("/v1") or scope["method"] == "OPTIONS":
            return address
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = header.partition(b" ")
        digest = _digest(key.strip())
        # All keys are compared, so that the response time does not depend on which one matches.
        matches = [hmac.compare_digest(digest, own) for own in self.keys]
        if scheme.lower() != b"bearer" or not any(matches):
            message = "missing or invalid API key; send the header 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return f"key {matches.index(True)}"

    async def _read_body(self, scope: Scope, receive: Receive, client: str, exits: ExitStack) -> bytes:
        """Return the body of a request whose route takes one; other requests must not have one."""
        path, method = _path(scope), scope["method"]
        if path not in _BODY_PATHS or method != "POST":
            if has_body(scope) and (path in _KNOWN_PATHS or method in ("GET", "HEAD", "OPTIONS")):
                raise ApiError(400, f"{method} {path[:200]} takes no body", code="unexpected_body")
            return b""
        if self.service.models.draining:
            raise unavailable("the server is shutting down and accepts no new requests")
        if self.service.models.is_full:
            raise too_many_requests("too many requests in progress; retry later", 1)
        body = await self.bodies.read(scope, receive, client)
        exits.callback(self.bodies.release, client, len(body))
        return body

    def _log_access(self, scope: Scope, trace: _RequestTrace) -> None:
        path = _path(scope)
        metric = path if path in _KNOWN_PATHS else "/v1/models" if path.startswith("/v1/models/") else "other"
        status = 499 if trace.disconnected else trace.status
        self.service.metrics.requests.labels(metric, str(status)).inc()
        usage: dict[str, Any] = scope["state"].get("usage", {})
        tokens = f" {usage['prompt_tokens']}+{usage['completion_tokens']} tokens" if usage else ""
        is_probe = path in ("/health", "/ready", "/metrics")
        _log.log(
            logging.DEBUG if is_probe else logging.INFO,
            "%s %s %s %d %.3f s%s", trace.id, scope["method"][:20], ascii(path[:200])[1:-1], status,
            time.monotonic() - trace.begun, tokens,
        )  # fmt: skip


class _RequestTrace:
    """Wraps a request's `receive` and `send` to record its status and to add the X-Request-Id header."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        self.id = given if _ID.fullmatch(given) else secrets.token_hex(8)
        self.begun = time.monotonic()
        self.status, self.disconnected, self._complete = 0, False, False
        self._receive, self._send = receive, send

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._complete:
            self.disconnected = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["X-Request-Id"] = self.id
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = True
        await self._send(message)


def error_response(error: ApiError) -> JSONResponse:
    """Return the HTTP response of an error."""
    return JSONResponse(error.body, error.status, dict(error.headers))


def _check_headers(scope: Scope) -> None:
    headers = scope["headers"]
    if len(headers) > MAX_HEADERS:
        raise ApiError(431, f"{len(headers)} headers; the limit is {MAX_HEADERS}", code="headers_too_large")
    longest = max((len(name) + len(value) for name, value in headers), default=0)
    if longest > MAX_HEADER_BYTES:
        message = f"a header has {longest:,} bytes; the limit is {MAX_HEADER_BYTES:,}"
        raise ApiError(431, message, code="headers_too_large")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _path(scope: Scope) -> str:
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root) else path
