"""A request on its way through the batcher: what its owner holds, and what the worker knows about it."""

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
    """What there is to do when a request is cancelled that nobody works on."""


class RequestHandle:
    """What the owner of a request holds: to cancel it, and to read the whole answer at its end."""

    def __init__(self, prompt_tokens: int, answer: Answer, dropped: int, on_event: OnEvent) -> None:
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        """Tokens of the prompt that an earlier request had computed; known once the answer begins."""
        self.cancelled = False
        self._answer, self._dropped, self._on_event = answer, dropped, on_event
        self._events: SimpleQueue[TokenEvent | BaseException] = SimpleQueue()
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self.on_cancel: Callable[[], None] = _nothing

    def cancel(self) -> None:
        """Give the request up: it ends with CancelledError at the next step, unless it has ended already."""
        self.cancelled = True
        self.on_cancel()

    @property
    def done(self) -> bool:
        """Whether the request has ended, one way or the other."""
        return self._ended.is_set()

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Those of the tokens so far, when the sampling asked for them."""
        return list(self._answer.logprobs)

    def generation(self, timeout: float | None = None) -> Generation:
        """The whole answer; waits for its end. Raises what ended the request, and TimeoutError after `timeout`."""
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the answer is not complete after {timeout} s")
        if self._error is not None:
            raise self._error
        return self._answer.generation(self.prompt_tokens, self._dropped)

    def events(self) -> Iterator[TokenEvent]:
        """The pieces of the answer, as they come. Raises what ended the request."""
        while True:
            event = self._events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if event.finish:
                return

    def tell(self, event: TokenEvent | BaseException) -> None:
        """Hand an event to the owner; the last one ends the request."""
        if isinstance(event, BaseException):
            self._error = event
        self._events.put(event)
        if isinstance(event, BaseException) or event.finish:
            self.on_cancel = _nothing
            self._ended.set()
        self._on_event(event)


@dataclass(eq=False)
class Request:
    """A request as the worker sees it.

    keys:   what stands at each place of the prompt, comparable between requests.
    pixels: of images that no earlier request brought, by their key.
    owner:  whoever asks, for a fair order.
    done:   tokens of the prompt and the answer that stand in the row's columns.
    """

    ticket: RequestHandle
    prompt: Prompt
    keys: list[int]
    sampling: SamplingParams
    answer: Answer
    pixels: Mapping[str, Tensor]
    deadline: float
    owner: str = ""
    begun: float = field(default_factory=time.monotonic)
    slot: KVRow | None = None
    embeds_SD: Tensor | None = None
    embedded_from: int = 0
    done: int = 0
    token: int = -1
    taken: int = 0
    shown: int = 0
    sampler: TokenSampler | None = None

    @property
    def columns(self) -> int:
        """Columns that the prompt and its longest answer take; an answer's last token is not read again."""
        return len(self.keys) + self.sampling.max_new_tokens - 1

    @property
    def growing(self) -> bool:
        """Whether the prompt is computed, so that each step gives a token."""
        return self.token >= 0

    @property
    def own_slot(self) -> KVRow:
        """The row of a running request."""
        assert self.slot is not None
        return self.slot

    def verdict(self, now: float) -> VilaError | None:
        """Why the request is to end before its time, if it is."""
        if self.ticket.cancelled:
            return CancelledError("the request was cancelled")
        if now >= self.deadline:
            return DeadlineError(f"no complete answer within {self.deadline - self.begun:.3g} s; {self.taken} tokens")
        return None

    def take(self, token: int, logprob: TokenLogprob | None) -> TokenEvent | None:
        """Add a token to the answer; the event that the owner is to see, with `finish` when it was the last one."""
        answer = self.answer
        going = answer.take(token, logprob)
        self.token = token
        self.taken += 1
        if not going or self.taken >= self.sampling.max_new_tokens:
            return TokenEvent(answer.text[self.shown :], answer.finish or "length")
        text = answer.certain_text
        if len(text) <= self.shown:
            return None
        event = TokenEvent(text[self.shown :])
        self.shown = len(text)
        return event
