"""The chat completions endpoint: submits a request to the batcher and formats whole or streamed OpenAI responses."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from vila.chat.detokenize import decoder_of
from vila.core.errors import CancelledError, ContextOverflowError, DeadlineError
from vila.core.types import Image, Message, Video
from vila.engine.sampling_params import SamplingParams, TokenEvent, TokenLogprob
from vila.media.limits import DEFAULT_LIMITS, MediaLimits
from vila.serve.errors import internal_error, to_api_error
from vila.serve.messages import Limits, Threads, read_messages
from vila.serve.metrics import Metrics
from vila.serve.models import Models
from vila.serve.schema import ChatRequest

if TYPE_CHECKING:
    from vila.engine.batcher import Batcher
    from vila.engine.request import RequestHandle

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
            seed=seed if choice == 0 else int.from_bytes(sha256(f"{seed}/{choice}".encode()).digest()[:8]) >> 1,
        )
        for choice in range(request.n or 1)
    ]


class GenerationRequest:
    """The answers to one chat request. Events arrive from the batcher's thread and are read in the event loop."""

    def __init__(self, batcher: Batcher, request: ChatRequest, deadline: float, client: str = "") -> None:
        """deadline: time of the monotonic clock by which all answers must be complete; client: for fair scheduling."""
        self.request, self.deadline, self.client = request, deadline, client
        self.processor = batcher.engine.processor
        self.handles: list[RequestHandle] = []
        self._batcher = batcher
        self._context = batcher.engine.model.config.context_length
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
            self._check_length(messages)
            # Videos are decoded once for all n answers.
            messages = self.processor.expand_videos(
                messages,
                self.processor.find_template().media_gap,
                shrink=self.processor.spec,
                limits=media,
                cancelled=self.is_cancelled,
            )
            max_tokens = self.request.limit or min(DEFAULT_MAX_TOKENS, self._context)
            try:
                self._submit(messages, max_tokens)
            except ContextOverflowError:
                if self.request.limit is not None:
                    raise
                remaining = self._context - len(self.processor.prompt(messages).ids)
                if not 1 <= remaining < max_tokens:
                    raise
                self._submit(messages, remaining)
        finally:
            if self._cancelled:
                self.cancel()

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
                raise _not_prepared()
            handle = self._batcher.submit(
                messages, params, timeout=remaining, on_event=partial(self._on_event, choice), owner=self.client
            )
            self.handles.append(handle)

    def _check_length(self, messages: Sequence[Message]) -> None:
        """Raise ContextOverflowError before anything is decoded or tokenized: the frames of many videos would fill the
        memory, and tokenizing megabytes of text takes seconds and holds the GIL.
        """
        spec = self.processor.spec
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
        length = sum(len(message.text) for message in messages)
        min_tokens = length // self.processor.span_tokenizer.longest_token
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


def _not_prepared() -> DeadlineError:
    return DeadlineError("the request could not be prepared in time")


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


class ChatCompletion:
    """The response to one request, as one JSON object or as server-sent events; records latencies and usage."""

    def __init__(self, generation: GenerationRequest, model: str, metrics: Metrics, http: Request) -> None:
        self._generation, self._model, self._metrics, self._http = generation, model, metrics, http
        self._id, self._created = f"chatcmpl-{secrets.token_hex(16)}", int(time.time())
        self._first = 0.0
        self._formatters: list[LogprobFormatter] = []
        if generation.request.logprobs:
            decode = decoder_of(generation.processor.tokenizer, skip_special_tokens=False)
            top = generation.request.top_logprobs or 0
            self._formatters = [LogprobFormatter(decode, top) for _ in generation.handles]

    async def whole(self) -> dict[str, Any]:
        """Wait for all answers and return the chat.completion object."""
        async for _ in self._events():
            pass
        choices = []
        for index, handle in enumerate(self._generation.handles):
            answer = handle.generation(0)
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": answer.text, "refusal": None},
                    "logprobs": self._logprobs(index, answer.logprobs),
                    "finish_reason": answer.finish,
                }
            )
        return self._object("chat.completion", choices=choices, usage=self._usage())

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the server-sent events. An error becomes the last one, because the status is already sent."""
        options = self._generation.request.stream_options
        with_usage = bool(options and options.include_usage)
        try:
            async for chunk in self._chunks():
                yield _event({**chunk, "usage": None} if with_usage else chunk)
            usage = self._usage()
            if with_usage:
                yield _event(self._object("chat.completion.chunk", choices=[], usage=usage))
            yield b"data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001 - outermost handler of the stream
            known = to_api_error(error)
            if known is None:
                _log.exception("%s failed while streaming", self._http.state.request_id)
            yield _event((known or internal_error(self._http.state.request_id)).body)

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        handles = self._generation.handles
        for choice in range(len(handles)):
            yield self._chunk(choice, {"role": "assistant", "content": ""})
        trimmers = [StreamTrimmer() for _ in handles]
        num_sent = [0] * len(handles)
        async for choice, event in self._events():
            text = trimmers[choice].push(event.text)
            new = handles[choice].logprobs[num_sent[choice] :] if self._formatters else ()
            num_sent[choice] += len(new)
            if text or new:
                yield self._chunk(choice, {"content": text}, logprobs=self._logprobs(choice, new))
            if event.finish:
                yield self._chunk(choice, {}, finish=event.finish)

    async def _events(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        async for choice, event in self._generation.events():
            if not self._first:
                self._first = time.monotonic()
                self._metrics.first_token.labels(self._model).observe(self._first - self._http.state.begun)
            yield choice, event

    def _usage(self) -> dict[str, Any]:
        """Return the token counts, the prompt once and all answers; also for the log and the metrics."""
        handles, now = self._generation.handles, time.monotonic()
        prompt, new = handles[0].prompt_tokens, sum(len(handle.generation(0).ids) for handle in handles)
        self._metrics.request.labels(self._model).observe(now - self._http.state.begun)
        if new > 1:
            self._metrics.per_token.labels(self._model).observe((now - self._first) / (new - 1))
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": handles[0].cached_tokens},
        }
        self._http.state.usage = usage
        return usage

    def _logprobs(self, choice: int, reports: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": self._formatters[choice].push(reports), "refusal": None} if self._formatters else None

    def _chunk(
        self, choice: int, delta: dict[str, str], *, finish: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        part = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._object("chat.completion.chunk", choices=[part])

    def _object(self, name: str, **fields: Any) -> dict[str, Any]:
        return {"id": self._id, "object": name, "created": self._created, "model": self._model, **fields}


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


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
        """Return the response to a request, which is cancelled when `http.state.exits` is closed."""
        deadline = time.monotonic() + self.limits.request_s
        model = self.models.find(request.model)
        batcher = self.models.batcher(model)
        client, count = http.state.client, request.n or 1
        model.concurrency.acquire(client, count)
        http.state.exits.callback(model.concurrency.release, client, count)
        generation = GenerationRequest(batcher, request, deadline, client)
        http.state.exits.callback(generation.cancel)
        if self.log_prompts:
            turns = json.dumps([[turn.role, turn.text] for turn in request.messages])
            _log.info("%s %s", http.state.request_id, turns)
        return await _cancel_on_disconnect(self._respond(generation, model.name, http), http)

    async def _respond(self, generation: GenerationRequest, model: str, http: Request) -> Response:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(loop.time() + generation.deadline - time.monotonic()):
                messages = await read_messages(generation.request, self.limits, self.threads, generation.is_cancelled)
                submit = partial(generation.submit, messages, self.limits.media)
                await loop.run_in_executor(self.threads.for_preparing(messages), submit)
        except TimeoutError as error:
            raise error if isinstance(error, DeadlineError) else _not_prepared() from error
        completion = ChatCompletion(generation, model, self.metrics, http)
        if not generation.request.stream:
            return JSONResponse(await completion.whole())
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(completion.stream(), media_type="text/event-stream", headers=headers)


async def _cancel_on_disconnect(work: Awaitable[T], http: Request) -> T:
    """Return the result of `work`; cancel it and raise vila's CancelledError if the client disconnects."""

    async def wait_for_disconnect() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, disconnect = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise CancelledError("the client closed the connection")
        return task.result()
    finally:
        task.cancel()
        disconnect.cancel()
