"""Reading the body of a request within limits on its size, its time, and the memory of all bodies together."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.types import Message, Receive, Scope

from vila.core.errors import CancelledError
from vila.serve.errors import ApiError, busy

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
