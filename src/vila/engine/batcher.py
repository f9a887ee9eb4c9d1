"""Continuous batching: requests join and leave a running batch at every step."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass

import torch

from vila.core.errors import ClosedError, ConfigError, ContextOverflowError, EngineDeadError, QueueFullError
from vila.engine.engine import Conversation, Engine
from vila.engine.kv_rows import KVRows, content_keys
from vila.engine.request import SamplingParams
from vila.engine.request_handle import OnEvent, Request, RequestHandle
from vila.engine.scheduler import Scheduler

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatcherStats:
    """Where a batcher stands, and what it has done since it was made.

    kv_tokens_used:       tokens of running requests in memory; kv_tokens_kept are those left by finished ones.
    prompt_tokens:        of all requests that were begun; cached_prompt_tokens of them were not computed again.
    finished:             requests that got their answer; the others were cancelled (or ran out of time), or failed.
    """

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_kept: int
    kv_tokens_total: int
    prompt_tokens: int
    new_tokens: int
    cached_prompt_tokens: int
    steps: int
    finished: int
    cancelled: int
    failed: int


class Batcher:
    """Answers requests of many threads with one engine, all of them together in one batch.

    An answer does not depend on its neighbours: it is that of `Engine.complete` for the conversation alone.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_num_seqs: int = 8,
        kv_tokens: int = 0,
        max_queue: int = 64,
        prefill_chunk: int = 256,
    ) -> None:
        """max_num_seqs: requests in the running batch; max_queue: requests that may wait.

        kv_tokens:     tokens whose keys and values are kept in memory; 0 is the context of every slot, as far as the
                       memory goes: 2 GiB on a CPU, half of what is free on CUDA.
        prefill_chunk: tokens of prompts that a step computes at most, which bounds how long running answers wait.
        Raises ConfigError for impossible numbers, and for a model whose attention cannot be batched so.
        """
        given = {"max_num_seqs": max_num_seqs, "max_queue": max_queue, "prefill_chunk": prefill_chunk}
        problems = [f"{name}={value!r}: a whole number from 1" for name, value in given.items() if value < 1]
        if kv_tokens < 0 or 0 < kv_tokens < 16:
            problems.append(f"kv_tokens={kv_tokens!r}: at least 16, or 0 for what the memory allows")
        if problems:
            raise ConfigError.collect("batcher", problems)
        self.engine, self.max_queue = engine, max_queue
        self._run = engine._model_runner(max_num_seqs, kv_tokens)
        self._slots = KVRows(self._run.pool, max_num_seqs)
        self._turn = Scheduler(self._run, self._slots, prefill_chunk, engine.processor.pixels)
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._accepting, self._closed = True, False
        self._busy = False
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Begin to work, in a thread of its own."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="vila-batcher", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop after the step that is running; requests that are not answered end with ClosedError."""
        with self._changed:
            self._accepting, self._closed = False, True
            self._changed.notify_all()
        if self._thread is None:
            self._end_all()
        elif self._thread is not threading.current_thread():
            self._thread.join()

    def drain(self, timeout: float) -> bool:
        """Take no new requests and finish those that are here; False when some are left after `timeout` seconds."""
        with self._changed:
            self._accepting = False
            return self._changed.wait_for(lambda: not (self._waiting or self._turn.running or self._busy), timeout)

    @property
    def is_alive(self) -> bool:
        """False once the worker thread has ended by an error: nothing is answered any more until a restart."""
        return self._failure is None

    def __enter__(self) -> Batcher:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def submit(
        self,
        messages: Conversation,
        sampling: SamplingParams | None = None,
        *,
        template: str = "",
        timeout: float | None = None,
        on_event: OnEvent = lambda event: None,
        owner: str = "",
    ) -> RequestHandle:
        """Queue a conversation. Its prompt and images are made ready in the caller's thread.

        timeout:  seconds from now within which the answer must be complete; it ends with DeadlineError otherwise.
        on_event: is called from the worker's thread for every piece of text, and once at the end: with an event that
                  has `finish`, or with what ended the request. It should return at once.
        owner:    whoever asks. Of the waiting requests those of the owner with the fewest running ones come first.
        Raises what `Engine.complete` raises, MediaError for a picture that cannot be read, ContextOverflowError for
        what exceeds the memory of the batcher, QueueFullError when too many wait, ClosedError when it is closed.
        """
        self._check_open()
        chosen = sampling or SamplingParams()
        job = self.engine._job(messages, chosen, template)
        unknown = self.engine._features.missing(job.prompt.pictures)
        request = Request(
            ticket=RequestHandle(len(job.prompt.ids), job.answer, job.dropped, on_event),
            prompt=job.prompt,
            keys=content_keys(job.prompt),
            sampling=chosen,
            answer=job.answer,
            pixels={picture.key: self.engine.processor.pixels([picture.image])[0] for picture in unknown},
            deadline=math.inf if timeout is None else time.monotonic() + timeout,
            owner=owner,
        )
        if not self._slots.fits_ever(request.columns):
            raise ContextOverflowError(
                f"the prompt has {len(request.keys)} tokens and the answer may have {chosen.max_new_tokens}, but the "
                f"memory for all requests holds {self._run.pool.tokens}; shorten them, or raise kv_tokens"
            )
        request.ticket.on_cancel = self._poke
        with self._changed:
            self._check_open()
            if len(self._waiting) >= self.max_queue:
                wait = min(60.0, max(1.0, self._turn.seconds * len(self._waiting) / self._slots.most))
                raise QueueFullError(f"{len(self._waiting)} requests wait already; ask again in {wait:.0f} s", wait)
            self._waiting.append(request)
            self._changed.notify_all()
        return request.ticket

    def stats(self) -> BatcherStats:
        """Where the batcher stands now."""
        with self._changed:
            counts = self._turn.counts
            return BatcherStats(
                running=len(self._turn.running),
                waiting=len(self._waiting),
                kv_tokens_used=self._slots.tokens_owned,
                kv_tokens_kept=self._slots.tokens_kept,
                kv_tokens_total=self._run.pool.tokens,
                **vars(counts),
            )

    def _check_open(self) -> None:
        if self._failure is not None:
            raise _dead(self._failure)
        if not self._accepting:
            raise ClosedError("the batcher takes no new requests: it is closed, or finishing those that it has")

    def _poke(self) -> None:
        with self._changed:
            self._changed.notify_all()

    @torch.inference_mode()
    def _work(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # noqa: BLE001 - the thread ends; waiting callers get the error
            _log.critical("the batcher's thread ended by an error", exc_info=error)
            self._failure = error
        with self._changed:
            self._accepting, self._closed, self._busy = False, True, False
        self._end_all()

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._turn.running)
                if self._closed:
                    return
                self._busy = True
            try:
                self._admit()
                self._turn.take()
            except torch.AcceleratorError:
                raise
            except Exception as error:  # noqa: BLE001 - the worker outlives whatever a step dies of; its owners hear of it
                _log.exception("a step failed; the requests that were running end")
                self._turn.fail(error)
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _admit(self) -> None:
        """Admit requests as long as there is room, and end those that are cancelled or late."""
        now = time.monotonic()
        with self._changed:
            unwanted = [(request, error) for request in self._waiting if (error := request.verdict(now))]
            for request, _ in unwanted:
                self._waiting.remove(request)
        for request, error in unwanted:
            self._turn.end(request, error)
        while chosen := self._next():
            try:
                slot = self._slots.place(chosen.keys, chosen.columns)
            except Exception as failure:
                with self._changed:
                    self._waiting.remove(chosen)
                self._turn.end(chosen, failure)
                raise
            if slot is None:
                return
            with self._changed:
                self._waiting.remove(chosen)
                self._turn.join(chosen, slot)

    def _next(self) -> Request | None:
        """The waiting request to admit next: the first one of the owner with the fewest running requests."""
        with self._changed:
            running = Counter(request.owner for request in self._turn.running)
            return min(self._waiting, key=lambda request: running[request.owner], default=None)

    def _end_all(self) -> None:
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        closed = ClosedError("the batcher was closed before the answer was complete")
        for request in (*waiting, *self._turn.running):
            self._turn.end(request, closed if self._failure is None else _dead(self._failure))
        self._poke()


def _dead(cause: BaseException) -> EngineDeadError:
    return EngineDeadError(f"the engine's thread ended by {type(cause).__name__}; restart the program")
