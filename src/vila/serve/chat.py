"""The chat endpoint: from a checked request to a whole answer, or to one that is streamed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from vila.core.errors import CancelledError, ContextOverflowError, DeadlineError
from vila.core.types import Image, Message, Video
from vila.engine.detokenize import decoder_of
from vila.engine.request import Generation, SamplingParams, TokenEvent, TokenLogprob
from vila.media.limits import DEFAULT_LIMITS, MediaLimits
from vila.serve.errors import internal_error, to_api_error
from vila.serve.media import Limits, Threads, read_messages
from vila.serve.metrics import Metrics
from vila.serve.models import Models, ServedModel
from vila.serve.schema import ChatRequest

if TYPE_CHECKING:
    from vila.engine.batcher import Batcher
    from vila.engine.request_handle import RequestHandle


# --- generation
# One request on its way: from its parameters to the batcher, and the events of its answers back to the event loop.


DEFAULT_TOKENS = 512
"""Most tokens of an answer when the client does not say; a prompt that leaves less room gets what is left."""


def sampling_params(request: ChatRequest, limit: int) -> list[SamplingParams]:
    """How each of the `n` answers is drawn. Answer 0 of a seed is that of the engine under this seed."""
    seed = secrets.randbits(63) if request.seed is None else request.seed % 2**63
    stop = request.stop or ()
    return [
        SamplingParams(
            max_new_tokens=limit,
            temperature=request.temperature or 0.0,
            top_k=max(0, request.top_k or 0),
            top_p=1.0 if request.top_p is None else request.top_p,
            min_p=request.min_p or 0.0,
            repetition_penalty=request.repetition_penalty or 1.0,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            logprobs=max(1, request.top_logprobs or 0) if request.logprobs else 0,
            seed=_seed(seed, choice),
        )
        for choice in range(request.n or 1)
    ]


def _seed(seed: int, choice: int) -> int:
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{choice}".encode()).digest()[:8], "big") >> 1


class GenerationRequest:
    """The answers to one request. Events arrive from the batcher's thread and are read in the event loop."""

    def __init__(self, batcher: Batcher, request: ChatRequest, until: float, client: str = "") -> None:
        """until: time of the monotonic clock by which every answer must be complete; client: who asks."""
        self.request, self.until, self.client = request, until, client
        self.tickets: list[RequestHandle] = []
        self._batcher = batcher
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, TokenEvent | BaseException]] = asyncio.Queue()
        self._unwanted = False
        self._begun = False

    def submit(self, messages: Sequence[Message], media: MediaLimits = DEFAULT_LIMITS) -> None:
        """Hand all answers to the batcher, or none. Called in a thread, because it decodes images and videos.

        media: limits on each video.
        Raises what the batcher raises, and DeadlineError when making ready took all the time.
        """
        try:
            processor = self._batcher.engine.processor
            self._check_media(messages)
            self._check_text(messages)
            # Videos are decoded once, however many answers there are.
            messages = processor.expand_videos(
                messages,
                processor.find_template().media_gap,
                shrink=processor.spec,
                limits=media,
                cancelled=self.is_unwanted,
            )
            limit = self._limit()
            try:
                self._submit(messages, limit)
            except ContextOverflowError:
                room = self._room(messages) if self.request.limit is None else 0
                if not 1 <= room < limit:
                    raise
                self._submit(messages, room)
        except BaseException:
            self.cancel()
            raise
        if self._unwanted:
            self.cancel()

    @property
    def tokenizer(self) -> Any:
        """That of the model."""
        return self._batcher.engine.processor.tokenizer

    def is_unwanted(self) -> bool:
        """Whether the request was given up: nobody waits for its answers any more."""
        return self._unwanted

    def cancel(self) -> None:
        """Give up what is not answered yet, and what is still being made ready."""
        self._unwanted = True
        for ticket in list(self.tickets):
            ticket.cancel()

    async def events(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        """The number of an answer and a piece of it, until all have ended. Raises what ended one of them."""
        left = len(self.tickets)
        while left:
            choice, event = await self._events.get()
            if isinstance(event, BaseException):
                raise event
            left -= event.finish is not None
            yield choice, event

    def _submit(self, messages: Sequence[Message], limit: int) -> None:
        for choice, sampling in enumerate(sampling_params(self.request, limit)):
            if self._unwanted:
                return
            left = self.until - time.monotonic()
            if left <= 0:
                raise DeadlineError("the request was not made ready in time")
            ticket = self._batcher.submit(
                messages, sampling, timeout=left, on_event=partial(self._tell, choice), owner=self.client
            )
            self.tickets.append(ticket)

    @property
    def _context(self) -> int:
        return self._batcher.engine.model.config.context_length

    def _check_media(self, messages: Sequence[Message]) -> None:
        # Before anything is decoded: the frames of many clips would fill the memory.
        spec = self._batcher.engine.processor.spec
        frames = sum(
            (part.num_frames or spec.num_video_frames) if isinstance(part, Video) else isinstance(part, Image)
            for message in messages
            for part in message.parts
        )
        if frames * spec.tokens_per_image >= self._context:
            raise ContextOverflowError(
                f"{frames} pictures and frames take {frames * spec.tokens_per_image} tokens, but the model's context "
                f"holds {self._context}; send fewer, or clips with a smaller num_frames"
            )

    def _check_text(self, messages: Sequence[Message]) -> None:
        # Before it is tokenized, which takes seconds for megabytes and lets nothing else run.
        length = sum(len(message.text) for message in messages)
        fewest = length // self._batcher.engine.processor.span_tokenizer.longest_token
        if fewest >= self._context:
            raise ContextOverflowError(
                f"the text has {length:,} characters, which are {fewest:,} tokens or more, but the model's context "
                f"holds {self._context:,}; send less"
            )

    def _limit(self) -> int:
        return self.request.limit or min(DEFAULT_TOKENS, self._context)

    def _room(self, messages: Sequence[Message]) -> int:
        return self._context - len(self._batcher.engine.processor.prompt(messages).ids)

    def _tell(self, choice: int, event: TokenEvent | BaseException) -> None:
        # An answer that is not streamed wakes the event loop for its first piece, which is timed, and for its end.
        if self._begun and not self.request.stream and isinstance(event, TokenEvent) and event.finish is None:
            return
        self._begun = True
        # After the loop has ended there is nobody left to tell.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))


# --- answers
# Answers as the chat protocol writes them: a whole completion, or chunks of one.


Decode = Callable[[Sequence[int]], str]
_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass
class StreamTrimmer:
    """Pieces of a text without the white space around the whole: joined they are the text that is not streamed."""

    _held: str = ""
    _begun: bool = False

    def take(self, text: str) -> str:
        """What may be shown now."""
        text = self._held + text
        text = text if self._begun else text.lstrip()
        piece = text.rstrip()
        self._held = text[len(piece) :]
        self._begun = self._begun or bool(piece)
        return piece


@dataclass
class LogprobFormatter:
    """Log-probabilities of one answer, with each token's text as it stands behind the one before it.

    decode: of the tokenizer. A token that is no whole character has a replacement character and no bytes.
    """

    decode: Decode
    top: int
    _before: list[int] = field(default_factory=list)

    def take(self, reports: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        """The next tokens of the answer."""
        out = []
        for report in reports:
            likeliest = [self._token(token, logprob) for token, logprob in report.top[: self.top]]
            out.append({**self._token(report.id, report.logprob), "top_logprobs": likeliest})
            self._before = [report.id]
        return out

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.decode([*self._before, token])[len(self.decode(self._before)) :] if self._before else ""
        text = text or self.decode([token])
        whole = _HALF_CHARACTER not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


@dataclass(frozen=True)
class CompletionFormat:
    """What all parts of one response share."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any]) -> dict[str, Any]:
        """A response that is not streamed."""
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    def chunk(
        self,
        choice: int,
        delta: Mapping[str, Any],
        *,
        finish: str | None = None,
        logprobs: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """A piece of an answer."""
        piece = {"index": choice, "delta": delta, "logprobs": reported(logprobs), "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [piece]}

    def last(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The chunk that holds the usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def choice_object(index: int, answer: Generation, logprobs: list[dict[str, Any]] | None) -> dict[str, Any]:
    """One answer of a whole response."""
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    return {"index": index, "message": message, "logprobs": reported(logprobs), "finish_reason": answer.finish}


def reported(logprobs: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    """Log-probabilities in their envelope."""
    return None if logprobs is None else {"content": logprobs, "refusal": None}


def usage_object(tickets: Sequence[RequestHandle]) -> dict[str, Any]:
    """Tokens of a request whose answers are complete: its prompt once, and all answers."""
    prompt = tickets[0].prompt_tokens
    new = sum(len(ticket.generation(0).ids) for ticket in tickets)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": tickets[0].cached_tokens},
    }


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
        model.concurrency.acquire(client, count)
        http.state.exits.callback(model.concurrency.release, client, count)
        generation = GenerationRequest(batcher, request, until, client)
        if self.log_prompts:
            _log.info("%s %s", http.state.request_id, json.dumps([[turn.role, turn.text] for turn in request.messages]))
        try:
            await _unless_gone(self._begin(generation), http)
            timing = _Timing(self.metrics, model, http.state.begun)
            if request.stream:
                return _EventStream(_Stream(generation, timing, http))
            body = await _unless_gone(_whole(generation, timing), http)
        except BaseException:
            generation.cancel()
            raise
        http.state.tokens = body["usage"]
        return JSONResponse(body)

    async def _begin(self, generation: GenerationRequest) -> None:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + generation.until - time.monotonic()):
            messages = await read_messages(generation.request, self.limits, self.threads, generation.is_unwanted)
            submit = partial(generation.submit, messages, self.limits.media)
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


async def _whole(generation: GenerationRequest, timing: _Timing) -> dict[str, Any]:
    async for _ in generation.events():
        timing.piece()
    usage = usage_object(generation.tickets)
    timing.end(usage["completion_tokens"])
    choices = []
    for index, ticket in enumerate(generation.tickets):
        answer = ticket.generation(0)
        reports = _reports(generation)
        choices.append(choice_object(index, answer, reports.take(answer.logprobs) if reports else None))
    return CompletionFormat(timing.model.name).whole(choices, usage)


class _Stream:
    """A streamed response: server-sent events, one for each piece of text."""

    def __init__(self, generation: GenerationRequest, timing: _Timing, http: Request) -> None:
        self.generation, self.timing, self.http = generation, timing, http
        self.head = CompletionFormat(timing.model.name)
        options = generation.request.stream_options
        self.with_usage = bool(options and options.include_usage)

    async def lines(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._chunks():
                yield _event({**chunk, "usage": None} if self.with_usage and "usage" not in chunk else chunk)
            yield b"data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001 - the status is sent already, so the stream itself has to say it
            known = to_api_error(error)
            if known is None:
                _log.exception("%s failed while it was streamed", self.http.state.request_id)
            yield _event((known or internal_error(self.http.state.request_id)).body)

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        count = len(self.generation.tickets)
        for choice in range(count):
            yield self.head.chunk(choice, {"role": "assistant", "content": ""})
        trims = [StreamTrimmer() for _ in range(count)]
        reports = [_reports(self.generation) for _ in range(count)]
        seen = [0] * count
        async for choice, event in self.generation.events():
            self.timing.piece()
            piece, logprobs = trims[choice].take(event.text), None
            if teller := reports[choice]:
                new = self.generation.tickets[choice].logprobs[seen[choice] :]
                seen[choice] += len(new)
                logprobs = teller.take(new)
            if piece or logprobs:
                yield self.head.chunk(choice, {"content": piece}, logprobs=logprobs)
            if event.finish:
                yield self.head.chunk(choice, {}, finish=event.finish)
        usage = usage_object(self.generation.tickets)
        self.timing.end(usage["completion_tokens"])
        self.http.state.tokens = usage
        if self.with_usage:
            yield self.head.last(usage)


class _EventStream(StreamingResponse):
    """The response that sends them. However it ends, nothing is computed for it afterwards."""

    def __init__(self, stream: _Stream) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(stream.lines(), media_type="text/event-stream", headers=headers)
        self._generation = stream.generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


def _event(data: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _reports(generation: GenerationRequest) -> LogprobFormatter | None:
    if not generation.request.logprobs:
        return None
    return LogprobFormatter(
        decoder_of(generation.tokenizer, skip_special_tokens=False), generation.request.top_logprobs or 0
    )


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
