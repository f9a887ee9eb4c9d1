"""A request of the batcher: the handle for its owner, and the state for the worker thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue

from torch import Tensor

from vila.core.errors import CancelledError, DeadlineError, VilaError
from vila.engine.answer import Answer
from vila.engine.decode import TokenSampler
from vila.engine.kv_rows import KVRow
from vila.engine.request import Generation, SamplingParams, TokenEvent, TokenLogprob
from vila.engine.vision_cache import Prompt

OnEvent = Callable[[TokenEvent | BaseException], None]


def _nothing() -> None:
    """Default of `on_cancel`."""


class RequestHandle:
    """Handle of a submitted request: cancels it and reads its answer."""

    def __init__(self, prompt_tokens: int, answer: Answer, dropped: int, on_event: OnEvent) -> None:
        self.prompt_tokens = prompt_tokens
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
        """Yield the pieces of the answer. Raises the request's error."""
        while True:
            event = self._events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if event.finish:
                return

    def put(self, event: TokenEvent | BaseException) -> None:
        """Pass an event to the owner; the last one ends the request."""
        if isinstance(event, BaseException):
            self._error = event
        self._events.put(event)
        if isinstance(event, BaseException) or event.finish:
            self.on_cancel = _nothing
            self._ended.set()
        self._on_event(event)


@dataclass(eq=False)
class Request:
    """State of a request in the worker thread.

    keys:   content key of each prompt position, comparable between requests; see `content_keys`.
    pixels: preprocessed images that were not in the vision cache at submission, by key.
    owner:  client name for fair scheduling.
    kv_row: the KV row while the request is running.
    done:   tokens of the prompt and the answer whose keys and values are in the KV row.
    token:  last sampled token, -1 during prefill.
    taken:  number of sampled tokens.
    shown:  characters of the answer sent to the owner.
    """

    handle: RequestHandle
    prompt: Prompt
    keys: list[int]
    sampling: SamplingParams
    answer: Answer
    pixels: Mapping[str, Tensor]
    deadline: float
    owner: str = ""
    begun: float = field(default_factory=time.monotonic)
    kv_row: KVRow | None = None
    embeds_SD: Tensor | None = None
    embedded_from: int = 0
    done: int = 0
    token: int = -1
    taken: int = 0
    shown: int = 0
    sampler: TokenSampler | None = None

    @property
    def columns(self) -> int:
        """Tokens that the KV row must hold: the prompt and the longest answer without its last token."""
        return len(self.keys) + self.sampling.max_new_tokens - 1

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

    def take(self, token: int, logprob: TokenLogprob | None) -> TokenEvent | None:
        """Add a token to the answer; return the event for the owner, with `finish` for the last token."""
        answer = self.answer
        going = answer.take(token, logprob)
        self.token = token
        self.taken += 1
        if not going or self.taken >= self.sampling.max_new_tokens:
            return TokenEvent(answer.text[self.shown :], answer.finish or "length")
        text = answer.final_text
        if len(text) <= self.shown:
            return None
        event = TokenEvent(text[self.shown :])
        self.shown = len(text)
        return event
