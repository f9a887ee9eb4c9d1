"""The chat endpoint: from a checked request to a whole answer, or to one that is streamed."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from vila.core.errors import CancelledError, DeadlineError
from vila.engine.detokenize import decoder_of
from vila.serve.answers import Completion, TokenReports, Trim, choice_of, usage_of
from vila.serve.asked import Asked
from vila.serve.errors import as_api_error, internal
from vila.serve.metrics import Metrics
from vila.serve.models import Models, ServedModel
from vila.serve.received import Limits, Threads, read_messages
from vila.serve.schema import ChatRequest

_log = logging.getLogger("vila.serve")
T = TypeVar("T")


@dataclass
class Service:
    """What answers requests."""

    models: Models
    limits: Limits = field(default_factory=Limits)
    log_prompts: bool = False

    def __post_init__(self) -> None:
        self.threads = Threads()
        self.metrics = Metrics(self.models)

    async def answer(self, request: ChatRequest, http: Request) -> Response:
        """The response to a request. Raises ApiError and the errors of ours; the request is given up then."""
        until = time.monotonic() + self.limits.request_s
        model = self.models.find(request.model)
        batcher = self.models.batcher(model)
        client, count = http.state.client, request.n or 1
        model.room.enter(client, count)
        http.state.exits.callback(model.room.leave, client, count)
        asked = Asked(batcher, request, until, client)
        if self.log_prompts:
            _log.info("%s %s", http.state.request_id, json.dumps([[turn.role, turn.text] for turn in request.messages]))
        try:
            await _unless_gone(self._begin(asked), http)
            timing = _Timing(self.metrics, model, http.state.begun)
            if request.stream:
                return _EventStream(_Stream(asked, timing, http))
            body = await _unless_gone(_whole(asked, timing), http)
        except BaseException:
            asked.cancel()
            raise
        http.state.tokens = body["usage"]
        return JSONResponse(body)

    async def _begin(self, asked: Asked) -> None:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + asked.until - time.monotonic()):
            messages = await read_messages(asked.request, self.limits, self.threads, asked.is_unwanted)
            submit = partial(asked.submit, messages, self.limits.media)
            await asyncio.get_running_loop().run_in_executor(self.threads.preparing(messages), submit)


@dataclass
class _Timing:
    """When the pieces of a request's answers came."""

    metrics: Metrics
    model: ServedModel
    begun: float
    first: float = 0.0

    def piece(self) -> None:
        if not self.first:
            self.first = time.monotonic()
            self.metrics.first.labels(self.model.name).observe(self.first - self.begun)

    def end(self, tokens: int) -> None:
        now = time.monotonic()
        self.metrics.whole.labels(self.model.name).observe(now - self.begun)
        if tokens > 1:
            self.metrics.token.labels(self.model.name).observe((now - self.first) / (tokens - 1))


async def _whole(asked: Asked, timing: _Timing) -> dict[str, Any]:
    async for _ in asked.events():
        timing.piece()
    usage = usage_of(asked.tickets)
    timing.end(usage["completion_tokens"])
    choices = []
    for index, ticket in enumerate(asked.tickets):
        answer = ticket.generation(0)
        reports = _reports(asked)
        choices.append(choice_of(index, answer, reports.take(answer.logprobs) if reports else None))
    return Completion(timing.model.name).whole(choices, usage)


class _Stream:
    """A streamed response: server-sent events, one for each piece of text."""

    def __init__(self, asked: Asked, timing: _Timing, http: Request) -> None:
        self.asked, self.timing, self.http = asked, timing, http
        self.head = Completion(timing.model.name)
        options = asked.request.stream_options
        self.with_usage = bool(options and options.include_usage)

    async def lines(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._chunks():
                yield _event({**chunk, "usage": None} if self.with_usage and "usage" not in chunk else chunk)
            yield b"data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001 - the status is sent already, so the stream itself has to say it
            known = as_api_error(error)
            if known is None:
                _log.exception("%s failed while it was streamed", self.http.state.request_id)
            yield _event((known or internal(self.http.state.request_id)).body)

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        count = len(self.asked.tickets)
        for choice in range(count):
            yield self.head.chunk(choice, {"role": "assistant", "content": ""})
        trims = [Trim() for _ in range(count)]
        reports = [_reports(self.asked) for _ in range(count)]
        seen = [0] * count
        async for choice, event in self.asked.events():
            self.timing.piece()
            piece, logprobs = trims[choice].take(event.text), None
            if teller := reports[choice]:
                new = self.asked.tickets[choice].logprobs[seen[choice] :]
                seen[choice] += len(new)
                logprobs = teller.take(new)
            if piece or logprobs:
                yield self.head.chunk(choice, {"content": piece}, logprobs=logprobs)
            if event.finish:
                yield self.head.chunk(choice, {}, finish=event.finish)
        usage = usage_of(self.asked.tickets)
        self.timing.end(usage["completion_tokens"])
        self.http.state.tokens = usage
        if self.with_usage:
            yield self.head.last(usage)


class _EventStream(StreamingResponse):
    """The response that sends them. However it ends, nothing is computed for it afterwards."""

    def __init__(self, stream: _Stream) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(stream.lines(), media_type="text/event-stream", headers=headers)
        self._asked = stream.asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._asked.cancel()


def _event(data: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _reports(asked: Asked) -> TokenReports | None:
    if not asked.request.logprobs:
        return None
    return TokenReports(decoder_of(asked.tokenizer, skip_special_tokens=False), asked.request.top_logprobs or 0)


async def _unless_gone(work: Awaitable[T], http: Request) -> T:
    """The result of `work`, which is given up when the client closes the connection. Raises CancelledError of ours."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise CancelledError("the client closed the connection")
        return doing.result()
    except TimeoutError as error:
        if isinstance(error, DeadlineError):
            raise
        raise DeadlineError("the request was not made ready in time") from error
    finally:
        for task in (doing, leaving):
            task.cancel()


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
