"""A request in progress: the answer so far, the state for the scheduler, and the handle for the caller."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue

from torch import Tensor

from vila.chat.detokenize import Detokenizer, TextStream
from vila.core.errors import CancelledError, ContextOverflowError, DeadlineError, VilaError
from vila.engine.kv_cache import KVRow
from vila.engine.prompt_lookup import PromptLookup
from vila.engine.sampler import Sampler
from vila.engine.sampling_params import FinishReason, Generation, SamplingParams, TokenEvent, TokenLogprob
from vila.engine.vision_cache import Prompt

# S tokens  D model width


@dataclass
class Answer:
    """Collects tokens until a stop token or a stop string ends the answer.

    stop_ids:   tokens that end the answer and are not part of it.
    stop_texts: strings that end it, also across token boundaries.
    draft_tokens, accepted_tokens: statistics of prompt lookup.
    """

    detokenizer: Detokenizer
    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    draft_tokens: int = 0
    accepted_tokens: int = 0
    _cut: int | None = None
    _num_detokenized: int = 0

    def __post_init__(self) -> None:
        self._stream = TextStream(self.detokenizer)
        self._longest_stop = max(map(len, self.stop_texts), default=0)

    def take(self, token: int, logprob: TokenLogprob | None = None) -> bool:
        """Add a token; return False if the answer has ended."""
        if token in self.stop_ids:
            self.finish = "stop"
            return False
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if self.stop_texts:
            self._find_stop_strings()
        return self.finish is None

    def _find_stop_strings(self) -> None:
        # Settled text was searched before, but a stop string may begin near its end.
        start = max(0, len(self._stream.settled) - self._longest_stop + 1)
        self._detokenize()
        text = self._stream.settled[start:] + self._stream.unsettled
        places = [place for stop in self.stop_texts if (place := text.find(stop)) >= 0]
        if places:
            self._cut, self.finish = start + min(places), "stop"

    def _detokenize(self) -> None:
        for token in self.ids[self._num_detokenized :]:
            self._stream.take(token)
        self._num_detokenized = len(self.ids)

    @property
    def text(self) -> str:
        """The whole text so far, without a final stop string."""
        return self.detokenizer.decode(self.ids)[: self._cut]

    @property
    def final_text(self) -> str:
        """Text that later tokens cannot change: without partial characters and possible beginnings of stop strings."""
        if self.finish is not None:
            return self.text
        self._detokenize()
        text = self._stream.settled
        held = max((_overlap(text, stop) for stop in self.stop_texts), default=0)
        return text[: len(text) - held]

    def generation(self, prompt_tokens: int, dropped_messages: int = 0) -> Generation:
        """Return the finished answer; without a stop condition its finish reason is `length`."""
        return Generation(
            self.text.strip(),
            tuple(self.ids),
            self.finish or "length",
            prompt_tokens,
            tuple(self.logprobs),
            dropped_messages,
            self.draft_tokens,
            self.accepted_tokens,
        )


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


OnEvent = Callable[[TokenEvent | BaseException], None]


def _nothing() -> None:
    """Default of `on_cancel`."""


class RequestHandle:
    """Handle of a submitted request: cancels it and reads its answer."""

    def __init__(
        self, prompt_tokens: int, answer: Answer, dropped: int, on_event: OnEvent | None = None, *, streams: bool = True
    ) -> None:
        """on_event: called with every event; streams: whether text is sent before the answer is complete."""
        self.prompt_tokens, self.streams = prompt_tokens, streams
        self.cached_tokens = 0
        """Prompt tokens found in the prefix cache; set when the request is admitted."""
        self.cancelled = False
        self._answer, self._dropped, self._on_event = answer, dropped, on_event
        self._events: SimpleQueue[TokenEvent | BaseException] = SimpleQueue()
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self.on_cancel: Callable[[], None] = _nothing

    def cancel(self) -> None:
        """Cancel the request: it ends with CancelledError at the next step, unless it has already ended."""
        self.cancelled = True
        self.on_cancel()

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._ended.is_set()

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Log-probabilities of the tokens so far, if requested."""
        return list(self._answer.logprobs)

    def generation(self, timeout: float | None = None) -> Generation:
        """Wait for the answer and return it. Raises the request's error, or TimeoutError after `timeout` seconds."""
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the answer is not complete after {timeout} s")
        if self._error is not None:
            raise self._error
        return self._answer.generation(self.prompt_tokens, self._dropped)

    def events(self) -> Iterator[TokenEvent]:
        """Yield the pieces of the answer, and wait for them. Raises the request's error."""
        while True:
            event = self._events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if event.finish:
                return

    def new_events(self) -> Iterator[TokenEvent]:
        """Yield the pieces since the last call, without waiting. Raises the request's error."""
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, BaseException):
                raise event
            yield event

    def put(self, event: TokenEvent | BaseException) -> None:
        """Pass an event to the owner; the last one ends the request."""
        if isinstance(event, BaseException):
            self._error = event
        self._events.put(event)
        if isinstance(event, BaseException) or event.finish:
            self.on_cancel = _nothing
            self._ended.set()
        if self._on_event is not None:
            self._on_event(event)


@dataclass(eq=False)
class Request:
    """State of a request in the scheduler.

    keys:     content key of each prompt position, comparable between requests; see `content_keys`.
    targets:  for scoring: prompt position -> token id whose log-probability is wanted there. Such a request ends after
              prefill, and its answer is `scores`, in order of the positions.
    pixels:   preprocessed images by key; others are preprocessed when they are needed.
    owner:    client name for fair scheduling.
    kv_row:   the KV row while the request is running.
    embeds_SD: embeddings of the prompt from position `embedded_from`, during prefill.
    done:     tokens of the prompt and the answer whose keys and values are in the KV row.
    token:    last sampled token, -1 during prefill.
    taken:    number of sampled tokens.
    shown:    characters of the answer sent to the owner.
    lookup:   draft tokens of prompt lookup, if the request uses it.
    """

    handle: RequestHandle
    prompt: Prompt
    keys: list[int]
    sampling: SamplingParams
    answer: Answer
    sampler: Sampler
    targets: Mapping[int, int] = field(default_factory=dict)
    pixels: Mapping[str, Tensor] = field(default_factory=dict)
    deadline: float = math.inf
    owner: str = ""
    begun: float = field(default_factory=time.monotonic)
    kv_row: KVRow | None = None
    embeds_SD: Tensor | None = None
    embedded_from: int = 0
    done: int = 0
    token: int = -1
    taken: int = 0
    shown: int = 0
    draft: list[int] = field(default_factory=list)
    lookup: PromptLookup | None = None
    scores: list[float] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """Tokens that the KV row must hold: the prompt and the longest answer without its last token."""
        return len(self.keys) + (0 if self.targets else self.sampling.max_new_tokens - 1)

    @property
    def max_shared(self) -> int | None:
        """Maximum length of a reused prefix: a score needs the logits before its token. None: no limit."""
        return min(self.targets) - 1 if self.targets else None

    @property
    def is_decoding(self) -> bool:
        """Whether prefill is complete, so that each step samples a token."""
        return self.token >= 0

    @property
    def own_row(self) -> KVRow:
        """The KV row of a running request."""
        assert self.kv_row is not None
        return self.kv_row

    def ending_error(self, now: float) -> VilaError | None:
        """Return the error of a cancelled or timed-out request, None for others."""
        if self.handle.cancelled:
            return CancelledError("the request was cancelled")
        if now >= self.deadline:
            return DeadlineError(
                f"the answer was not complete within {self.deadline - self.begun:.3g} s ({self.taken} tokens)"
            )
        return None

    def overflow_error(self, max_length: int) -> ContextOverflowError:
        """Return the error of a request that is longer than the KV cache, which holds `max_length` tokens."""
        return ContextOverflowError(
            f"the prompt has {len(self.keys)} tokens and the answer up to {self.sampling.max_new_tokens}, but the KV "
            f"cache holds {max_length}",
            hint="shorten them, or raise kv_tokens",
        )

    def take(self, token: int, logprob: TokenLogprob | None) -> TokenEvent | None:
        """Add a token to the answer; return the event for the owner, with `finish` for the last token."""
        answer = self.answer
        is_open = answer.take(token, logprob)
        self.token = token
        self.taken += 1
        if not is_open or self.taken >= self.sampling.max_new_tokens:
            return TokenEvent(answer.text[self.shown :], answer.finish or "length")
        if not self.handle.streams:
            return None
        text = answer.final_text
        if len(text) <= self.shown:
            return None
        event = TokenEvent(text[self.shown :])
        self.shown = len(text)
        return event
