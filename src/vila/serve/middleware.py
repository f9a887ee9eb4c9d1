"""ASGI middleware: assigns a request id, checks host, API key and headers, writes the access log; reading of bodies."""

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

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vila.core.errors import CancelledError
from vila.serve.admission import AllowedHosts
from vila.serve.connections import client_address
from vila.serve.errors import ApiError, internal_error, to_api_error, too_many_requests
from vila.serve.metrics import Metrics

_log = logging.getLogger("vila.serve")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CHAT_PATH = "/v1/chat/completions"
_KNOWN_PATHS = (_CHAT_PATH, "/v1/models", "/health", "/ready", "/metrics", "/openapi.json")
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

    async def read(self, headers: Headers, receive: Receive, client: str) -> bytes:
        """Read a body; the caller passes its length to `release` when the request ends.

        Raises ApiError: 413 if it is too large, 408 if it is too slow, 429 if too much memory is in use; and
        CancelledError if the client disconnects.
        """
        body, size, more = bytearray(), content_length(headers), True
        try:
            async with asyncio.timeout(self.timeout_s):
                while True:
                    if rejection := self._rejection(size, client):
                        if more:
                            await _drain(receive)
                        raise rejection
                    if not more:
                        return bytes(body)
                    async with asyncio.timeout(self.stall_s):
                        message = await receive()
                    if message["type"] == "http.disconnect":
                        raise CancelledError("the client closed the connection")
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    body += chunk
                    self.buffered[client] += len(chunk)
                    size = len(body)
        except BaseException as error:
            self.release(client, len(body))
            if isinstance(error, TimeoutError):
                problem = f"no data for {self.stall_s:g} s, or not complete within {self.timeout_s:g} s"
                raise ApiError(408, f"reading the body: {problem}", headers={"Connection": "close"}) from error
            raise

    def release(self, client: str, count: int) -> None:
        """Stop counting `count` bytes of a client."""
        self.buffered -= Counter({client: count})

    def _rejection(self, size: int, client: str) -> ApiError | None:
        if size > self.max_bytes:
            message = f"the body is larger than {self.max_bytes:,} bytes; send fewer or smaller images, or their URLs"
            return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
        if self.buffered[client] > self.max_total_bytes // 2 or self.buffered.total() > self.max_total_bytes:
            return too_many_requests("too many large requests in progress; retry later", 2)
        return None


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


def content_length(headers: Headers) -> int:
    """Return the value of the Content-Length header, which uvicorn has validated; 0 without one."""
    return int(headers.get("content-length", 0))


class RequestMiddleware:
    """Outermost ASGI middleware of the server.

    keys:      API keys for `/v1`; empty: no authentication.
    hosts:     allowed host names; None allows all.
    root_path: path prefix of a reverse proxy, which may or may not strip it.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, keys: Sequence[str], hosts: AllowedHosts | None, root_path: str
    ) -> None:
        self.app, self.metrics, self.hosts, self.root_path = app, metrics, hosts, root_path
        # Comparing digests of equal length does not leak the length of a key.
        self.keys = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the request and forward it, or respond with an error.

        Sets `request.state.request_id`, `begun` (monotonic time), `client` (name for the limits), and `exits`, an
        ExitStack that is closed when the response has ended.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, headers = scope["path"].removeprefix(self.root_path), Headers(scope=scope)
        trace = _RequestTrace(headers.get("x-request-id", ""), receive, send)
        exits = ExitStack()
        state = scope.setdefault("state", {})
        state |= {"request_id": trace.id, "begun": trace.begun, "exits": exits}
        self.metrics.open.inc()
        try:
            with exits:
                _check_headers(headers)
                if self.hosts is not None:
                    self.hosts.check(headers)
                state["client"] = client_address(scope.get("client"))
                if self.keys and path.startswith("/v1") and scope["method"] != "OPTIONS":
                    state["client"] = self._authenticate(headers)
                _check_bodyless(scope["method"], path, headers)
                scope = {**scope, "root_path": self.root_path, "path": self.root_path + path}
                await self.app(scope, trace.receive, trace.send)
        except Exception as error:  # noqa: BLE001 - outermost handler: the client gets an error object, the log the rest
            known = to_api_error(error)
            if known is None:
                _log.exception("%s failed", trace.id)
            if not trace.status:
                await (known or internal_error(trace.id)).response(scope, receive, trace.send)
        finally:
            self.metrics.open.dec()
            self._log_access(scope["method"], path, trace, state.get("usage"))

    def _authenticate(self, headers: Headers) -> str:
        """Return the client's name for the limits, the number of its API key. Raises ApiError (401)."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        # All keys are compared, so that the response time does not depend on which one matches.
        matches = [hmac.compare_digest(digest, own) for own in self.keys]
        if scheme.lower() != "bearer" or not any(matches):
            message = "missing or invalid API key; send the header 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return f"key {matches.index(True)}"

    def _log_access(self, method: str, path: str, trace: _RequestTrace, usage: dict[str, Any] | None) -> None:
        metric = path if path in _KNOWN_PATHS else "/v1/models" if path.startswith("/v1/models/") else "other"
        status = 499 if trace.disconnected else trace.status
        self.metrics.requests.labels(metric, str(status)).inc()
        tokens = f" {usage['prompt_tokens']}+{usage['completion_tokens']} tokens" if usage else ""
        _log.log(
            logging.DEBUG if path in ("/health", "/ready", "/metrics") else logging.INFO,
            "%s %s %s %d %.3f s%s", trace.id, method[:20], ascii(path[:200])[1:-1], status,
            time.monotonic() - trace.begun, tokens,
        )  # fmt: skip


class _RequestTrace:
    """Wraps a request's `receive` and `send` to record its status and to add the X-Request-Id header."""

    def __init__(self, given_id: str, receive: Receive, send: Send) -> None:
        self.id = given_id if _ID.fullmatch(given_id) else secrets.token_hex(8)
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


def _check_headers(headers: Headers) -> None:
    if len(headers) > MAX_HEADERS:
        raise ApiError(431, f"{len(headers)} headers; the limit is {MAX_HEADERS}", code="headers_too_large")
    longest = max((len(name) + len(value) for name, value in headers.items()), default=0)
    if longest > MAX_HEADER_BYTES:
        message = f"a header has {longest:,} bytes; the limit is {MAX_HEADER_BYTES:,}"
        raise ApiError(431, message, code="headers_too_large")


def _check_bodyless(method: str, path: str, headers: Headers) -> None:
    """Raise ApiError (400) for a request with a body whose route takes none."""
    if (path, method) == (_CHAT_PATH, "POST") or not (content_length(headers) or "transfer-encoding" in headers):
        return
    if path in _KNOWN_PATHS or method in ("GET", "HEAD", "OPTIONS"):
        raise ApiError(400, f"{method} {path[:200]} takes no body", code="unexpected_body")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
