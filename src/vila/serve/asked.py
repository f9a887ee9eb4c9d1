"""One request on its way: from its parameters to the batcher, and the events of its answers back to the event loop."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vila.core.errors import ContextOverflowError, DeadlineError
from vila.core.types import Image, Message, Video
from vila.engine.request import Sampling, TokenEvent
from vila.media.limits import DEFAULT_LIMITS, MediaLimits
from vila.serve.schema import ChatRequest

if TYPE_CHECKING:
    from vila.engine.batcher import Batcher
    from vila.engine.ticket import Ticket

DEFAULT_TOKENS = 512
"""Most tokens of an answer when the client does not say; a prompt that leaves less room gets what is left."""


def samplings(request: ChatRequest, limit: int) -> list[Sampling]:
    """How each of the `n` answers is drawn. Answer 0 of a seed is that of the engine under this seed."""
    seed = secrets.randbits(63) if request.seed is None else request.seed % 2**63
    stop = request.stop or ()
    return [
        Sampling(
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


class Asked:
    """The answers to one request. Events arrive from the batcher's thread and are read in the event loop."""

    def __init__(self, batcher: Batcher, request: ChatRequest, until: float, client: str = "") -> None:
        """until: time of the monotonic clock by which every answer must be complete; client: who asks."""
        self.request, self.until, self.client = request, until, client
        self.tickets: list[Ticket] = []
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
        for choice, sampling in enumerate(samplings(self.request, limit)):
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
