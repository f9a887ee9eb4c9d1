"""Reading the body of a request: not more than so much, not longer than so long, not too many at a time."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

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
    total:   of all bodies of requests that are being answered.
    seconds: that a whole body may take.
    """

    most: int
    total: int
    seconds: float
    held: int = 0

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """The body; whoever is done with it calls `release` with its length.

        Raises ApiError: 413 when it is too large, 408 when it is too slow, 429 when memory is short. What is refused is
        read on for a moment and thrown away, because a client that is still sending does not see the answer.
        """
        announced = _content_length(scope)
        body = bytearray()
        try:
            async with asyncio.timeout(self.seconds):
                if announced > self.most:
                    await _throw_away(receive)
                    raise self._refusal()
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise CancelledError("the client closed the connection")
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    body += piece
                    self.held += len(piece)
                    if len(body) > self.most or self.held > self.total:
                        if more:
                            await _throw_away(receive)
                        raise self._refusal() if len(body) > self.most else _BUSY
                    if not more:
                        return bytes(body)
        except TimeoutError as error:
            self.release(len(body))
            raise ApiError(
                408, f"the body was not complete within {self.seconds:g} s", headers={"Connection": "close"}
            ) from error
        except BaseException:
            self.release(len(body))
            raise

    def release(self, count: int) -> None:
        """Forget about so many bytes."""
        self.held -= count

    def _refusal(self) -> ApiError:
        message = f"the body is larger than {self.most:,} bytes; send fewer or smaller pictures, or their addresses"
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


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and len(value) < 20:
            return int(value)
    return 0
