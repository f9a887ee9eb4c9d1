"""The chat completions endpoint: submits a request to the batcher and formats whole or streamed OpenAI responses."""

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
from vila.engine.request import SamplingParams, TokenEvent, TokenLogprob
from vila.media.limits import DEFAULT_LIMITS, MediaLimits
from vila.serve.errors import internal_error, to_api_error
from vila.serve.messages import Limits, Threads, read_messages
from vila.serve.metrics import Metrics
from vila.serve.models import Models, ServedModel
from vila.serve.schema import ChatRequest

if TYPE_CHECKING:
    from vila.engine.batcher import Batcher
    from vila.engine.request_handle import RequestHandle

_log = logging.getLogger("vila.serve")
T = TypeVar("T")

DEFAULT_MAX_TOKENS = 512
"""Maximum number of new tokens of a request without max_tokens; less if the prompt leaves less of the context."""
_PARTIAL_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def sampling_params(request: ChatRequest, max_tokens: int) -> list[SamplingParams]:
    """Return the parameters of each of the `n` answers. Answer 0 uses the request's seed unchanged."""
    seed = secrets.randbits(63) if request.seed is None else request.seed % 2**63
    stop = request.stop or ()
    return [
        SamplingParams(
            max_new_tokens=max_tokens,
            temperature=request.temperature or 0.0,
            top_k=max(0, request.top_k or 0),
            top_p=1.0 if request.top_p is None else request.top_p,
            min_p=request.min_p or 0.0,
            repetition_penalty=request.repetition_penalty or 1.0,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            logprobs=max(1, request.top_logprobs or 0) if request.logprobs else 0,
            seed=_choice_seed(seed, choice),
        )
        for choice in range(request.n or 1)
    ]


def _choice_seed(seed: int, choice: int) -> int:
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{choice}".encode()).digest()[:8], "big") >> 1


class GenerationRequest:
    """The answers to one chat request. Events arrive from the batcher's thread and are read in the event loop."""

    def __init__(self, batcher: Batcher, request: ChatRequest, deadline: float, client: str = "") -> None:
        """deadline: time of the monotonic clock by which all answers must be complete; client: for fair scheduling."""
        self.request, self.deadline, self.client = request, deadline, client
        self.handles: list[RequestHandle] = []
        self._batcher = batcher
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, TokenEvent | BaseException]] = asyncio.Queue()
        self._cancelled = False
        self._has_text = False

    def submit(self, messages: Sequence[Message], media: MediaLimits = DEFAULT_LIMITS) -> None:
        """Submit all answers to the batcher, or none. Runs in a worker thread, because it decodes images and videos.

        media: limits of each video.
        Raises what `Batcher.submit` raises, and DeadlineError if preparation took too long.
        """
        try:
            processor = self._batcher.engine.processor
            self._check_media(messages)
            self._check_text(messages)
            # Videos are decoded once for all n answers.
            messages = processor.expand_videos(
                messages,
                processor.find_template().media_gap,
                shrink=processor.spec,
                limits=media,
                cancelled=self.is_cancelled,
            )
            max_tokens = self.request.limit or min(DEFAULT_MAX_TOKENS, self._context)
            try:
                self._submit(messages, max_tokens)
            except ContextOverflowError:
                if self.request.limit is not None:
                    raise
                remaining = self._context - len(processor.prompt(messages).ids)
                if not 1 <= remaining < max_tokens:
                    raise
                self._submit(messages, remaining)
        except BaseException:
            self.cancel()
            raise
        if self._cancelled:
            self.cancel()

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._batcher.engine.processor.tokenizer

    def is_cancelled(self) -> bool:
        """Return whether the request was cancelled."""
        return self._cancelled

    def cancel(self) -> None:
        """Cancel all unfinished answers and the preparation of the request."""
        self._cancelled = True
        for handle in list(self.handles):
            handle.cancel()

    async def events(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        """Yield (choice, event) until all answers are complete. Raises the error that ended one of them."""
        unfinished = len(self.handles)
        while unfinished:
            choice, event = await self._events.get()
            if isinstance(event, BaseException):
                raise event
            unfinished -= event.finish is not None
            yield choice, event

    def _submit(self, messages: Sequence[Message], max_tokens: int) -> None:
        for choice, params in enumerate(sampling_params(self.request, max_tokens)):
            if self._cancelled:
                return
            remaining = self.deadline - time.monotonic()
            if remaining <= 0:
                raise DeadlineError("the request could not be prepared in time")
            handle = self._batcher.submit(
                messages, params, timeout=remaining, on_event=partial(self._on_event, choice), owner=self.client
            )
            self.handles.append(handle)

    @property
    def _context(self) -> int:
        return self._batcher.engine.model.config.context_length

    def _check_media(self, messages: Sequence[Message]) -> None:
        # Before anything is decoded: the frames of many videos would fill the memory.
        spec = self._batcher.engine.processor.spec
        frames = sum(
            (part.num_frames or spec.num_video_frames) if isinstance(part, Video) else isinstance(part, Image)
            for message in messages
            for part in message.parts
        )
        if frames * spec.tokens_per_image >= self._context:
            raise ContextOverflowError(
                f"{frames} images and video frames take {frames * spec.tokens_per_image} tokens, but the model's "
                f"context length is {self._context}; send fewer images, or videos with a smaller num_frames"
            )

    def _check_text(self, messages: Sequence[Message]) -> None:
        # Before tokenization, which takes seconds for megabytes of text and holds the GIL.
        length = sum(len(message.text) for message in messages)
        min_tokens = length // self._batcher.engine.processor.span_tokenizer.longest_token
        if min_tokens >= self._context:
            raise ContextOverflowError(
                f"the text has {length:,} characters, thus at least {min_tokens:,} tokens, but the model's context "
                f"length is {self._context:,}"
            )

    def _on_event(self, choice: int, event: TokenEvent | BaseException) -> None:
        # An answer that is not streamed needs its first event, which is timed, and its last one only.
        if self._has_text and not self.request.stream and isinstance(event, TokenEvent) and event.finish is None:
            return
        self._has_text = True
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))


@dataclass
class StreamTrimmer:
    """Strips whitespace around a streamed text: the outputs joined equal the stripped text."""

    _pending: str = ""
    _has_text: bool = False

    def push(self, text: str) -> str:
        """Add a piece of text; return what can be sent."""
        text = self._pending + text
        text = text if self._has_text else text.lstrip()
        out = text.rstrip()
        self._pending = text[len(out) :]
        self._has_text = self._has_text or bool(out)
        return out


@dataclass
class LogprobFormatter:
    """Formats the log-probabilities of one answer, with each token's text as it follows the token before it.

    decode: token ids to text. A token that is not a whole character has a replacement character and no bytes.
    top:    alternatives per token.
    """

    decode: Callable[[Sequence[int]], str]
    top: int
    _previous: list[int] = field(default_factory=list)

    def push(self, reports: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        """Format the next tokens of the answer."""
        out = []
        for report in reports:
            alternatives = [self._token(token, logprob) for token, logprob in report.top[: self.top]]
            out.append({**self._token(report.id, report.logprob), "top_logprobs": alternatives})
            self._previous = [report.id]
        return out

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        prefix = self.decode(self._previous) if self._previous else ""
        text = self.decode([*self._previous, token])[len(prefix) :] or self.decode([token])
        is_whole = _PARTIAL_CHARACTER not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if is_whole else None}


@dataclass(frozen=True)
class CompletionFormat:
    """Builds the JSON objects of one response: a chat.completion, or its chunks."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return a response that is not streamed."""
        return self._object("chat.completion", choices=choices, usage=usage)

    def chunk(
        self,
        choice: int,
        delta: Mapping[str, Any],
        *,
        finish: str | None = None,
        logprobs: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Return a chunk of one answer."""
        part = {"index": choice, "delta": delta, "logprobs": _logprobs(logprobs), "finish_reason": finish}
        return self._object("chat.completion.chunk", choices=[part])

    def usage_chunk(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return the last chunk, with the usage."""
        return self._object("chat.completion.chunk", choices=[], usage=usage)

    def _object(self, name: str, **fields: Any) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, **fields}


def _logprobs(logprobs: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    return None if logprobs is None else {"content": logprobs, "refusal": None}


def usage_object(handles: Sequence[RequestHandle]) -> dict[str, Any]:
    """Return the token counts of a finished request: its prompt once, and all answers."""
    prompt = handles[0].prompt_tokens
    new = sum(len(handle.generation(0).ids) for handle in handles)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": handles[0].cached_tokens},
    }


@dataclass
class Service:
    """Answers chat requests with the models of a server.

    log_prompts: whether to log the text of requests.
    """

    models: Models
    limits: Limits = field(default_factory=Limits)
    log_prompts: bool = False

    def __post_init__(self) -> None:
        self.threads = Threads()
        self.metrics = Metrics(self.models)

    async def answer(self, request: ChatRequest, http: Request) -> Response:
        """Return the response to a request. On an error, which it raises, the request is cancelled."""
        deadline = time.monotonic() + self.limits.request_s
        model = self.models.find(request.model)
        batcher = self.models.batcher(model)
        client, count = http.state.client, request.n or 1
        model.concurrency.acquire(client, count)
        http.state.exits.callback(model.concurrency.release, client, count)
        generation = GenerationRequest(batcher, request, deadline, client)
        if self.log_prompts:
            turns = json.dumps([[turn.role, turn.text] for turn in request.messages])
            _log.info("%s %s", http.state.request_id, turns)
        try:
            await _cancel_on_disconnect(self._prepare(generation), http)
            timer = _LatencyTimer(self.metrics, model, http.state.begun)
            if request.stream:
                return _EventStreamResponse(_EventStream(generation, timer, http))
            body = await _cancel_on_disconnect(_complete(generation, timer), http)
        except BaseException:
            generation.cancel()
            raise
        http.state.usage = body["usage"]
        return JSONResponse(body)

    async def _prepare(self, generation: GenerationRequest) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout_at(loop.time() + generation.deadline - time.monotonic()):
            messages = await read_messages(generation.request, self.limits, self.threads, generation.is_cancelled)
            submit = partial(generation.submit, messages, self.limits.media)
            await loop.run_in_executor(self.threads.for_preparing(messages), submit)


@dataclass
class _LatencyTimer:
    """Records the latency metrics of one request."""

    metrics: Metrics
    model: ServedModel
    begun: float
    first: float = 0.0

    def on_text(self) -> None:
        if not self.first:
            self.first = time.monotonic()
            self.metrics.first_token.labels(self.model.name).observe(self.first - self.begun)

    def on_end(self, tokens: int) -> None:
        now = time.monotonic()
        self.metrics.request.labels(self.model.name).observe(now - self.begun)
        if tokens > 1:
            self.metrics.per_token.labels(self.model.name).observe((now - self.first) / (tokens - 1))


async def _complete(generation: GenerationRequest, timer: _LatencyTimer) -> dict[str, Any]:
    async for _ in generation.events():
        timer.on_text()
    usage = usage_object(generation.handles)
    timer.on_end(usage["completion_tokens"])
    choices = []
    for index, handle in enumerate(generation.handles):
        answer = handle.generation(0)
        formatter = _logprob_formatter(generation)
        choices.append(
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": _logprobs(formatter.push(answer.logprobs) if formatter else None),
                "finish_reason": answer.finish,
            }
        )
    return CompletionFormat(timer.model.name).completion(choices, usage)


class _EventStream:
    """The server-sent events of a streamed response."""

    def __init__(self, generation: GenerationRequest, timer: _LatencyTimer, http: Request) -> None:
        self.generation, self.timer, self.http = generation, timer, http
        self.format = CompletionFormat(timer.model.name)
        options = generation.request.stream_options
        self.with_usage = bool(options and options.include_usage)

    async def lines(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._chunks():
                yield _event({**chunk, "usage": None} if self.with_usage and "usage" not in chunk else chunk)
            yield b"data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001 - the status is already sent, so the error becomes an event
            known = to_api_error(error)
            if known is None:
                _log.exception("%s failed while streaming", self.http.state.request_id)
            yield _event((known or internal_error(self.http.state.request_id)).body)

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        handles = self.generation.handles
        for choice in range(len(handles)):
            yield self.format.chunk(choice, {"role": "assistant", "content": ""})
        trimmers = [StreamTrimmer() for _ in handles]
        formatters = [_logprob_formatter(self.generation) for _ in handles]
        num_sent = [0] * len(handles)
        async for choice, event in self.generation.events():
            self.timer.on_text()
            text, logprobs = trimmers[choice].push(event.text), None
            if formatter := formatters[choice]:
                new = handles[choice].logprobs[num_sent[choice] :]
                num_sent[choice] += len(new)
                logprobs = formatter.push(new)
            if text or logprobs:
                yield self.format.chunk(choice, {"content": text}, logprobs=logprobs)
            if event.finish:
                yield self.format.chunk(choice, {}, finish=event.finish)
        usage = usage_object(handles)
        self.timer.on_end(usage["completion_tokens"])
        self.http.state.usage = usage
        if self.with_usage:
            yield self.format.usage_chunk(usage)


class _EventStreamResponse(StreamingResponse):
    """Sends an event stream and cancels its generation when the response ends in any way."""

    def __init__(self, stream: _EventStream) -> None:
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


def _logprob_formatter(generation: GenerationRequest) -> LogprobFormatter | None:
    if not generation.request.logprobs:
        return None
    decode = decoder_of(generation.tokenizer, skip_special_tokens=False)
    return LogprobFormatter(decode, generation.request.top_logprobs or 0)


async def _cancel_on_disconnect(work: Awaitable[T], http: Request) -> T:
    """Return the result of `work`; cancel it and raise vila's CancelledError if the client disconnects."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(http))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise CancelledError("the client closed the connection")
        return task.result()
    except TimeoutError as error:
        if isinstance(error, DeadlineError):
            raise
        raise DeadlineError("the request could not be prepared in time") from error
    finally:
        for pending in (task, disconnect):
            pending.cancel()


async def _wait_for_disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
