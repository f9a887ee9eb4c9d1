"""Continuous batching: requests join and leave the running batch at every step."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from dataclasses import dataclass

import torch

from vila.core.errors import ClosedError, ConfigError, EngineDeadError, QueueFullError
from vila.engine.engine import Conversation, Engine
from vila.engine.request import OnEvent, Request, RequestHandle
from vila.engine.sampling_params import SamplingParams

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatcherStats:
    """Current state of a batcher, and counters since its creation.

    kv_tokens_used:   KV cache tokens of running requests; kv_tokens_cached: of finished ones, kept as prefix cache.
    prompt_tokens:    prompt tokens of all started requests; cached_prompt_tokens of them came from the prefix cache.
    finished:         answered requests; others were cancelled (including timeouts) or failed.
    """

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_cached: int
    kv_tokens_total: int
    prompt_tokens: int
    new_tokens: int
    cached_prompt_tokens: int
    steps: int
    finished: int
    cancelled: int
    failed: int


class Batcher:
    """Answers the requests of many threads in one running batch of an engine.

    An answer does not depend on the other requests: it equals that of `Engine.complete` for the conversation alone.
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

        kv_tokens:     capacity of the KV cache in tokens; 0: the context length times max_num_seqs, limited to 2 GiB on
                       a CPU and to half of the free memory on CUDA.
        prefill_chunk: maximum prompt tokens per step, which bounds the delay of running answers.
        Raises ConfigError for invalid values, and for a model whose attention does not support continuous batching.
        """
        given = {"max_num_seqs": max_num_seqs, "max_queue": max_queue, "prefill_chunk": prefill_chunk}
        problems = [f"{name}={value!r}: expected an integer from 1" for name, value in given.items() if value < 1]
        if kv_tokens < 0 or 0 < kv_tokens < 16:
            problems.append(f"kv_tokens={kv_tokens!r}: expected at least 16, or 0 for the default")
        if problems:
            raise ConfigError.collect("batcher", problems)
        self.engine, self.max_queue = engine, max_queue
        self._scheduler = engine.new_scheduler(max_num_seqs, kv_tokens, prefill_chunk)
        self._pool = self._scheduler.pool
        self._submitted: deque[Request] = deque()
        """Requests that the worker thread has not passed to the scheduler yet."""
        self._changed = threading.Condition()
        self._accepting, self._closed = True, False
        self._busy = False
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Start the worker thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="vila-batcher", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop after the current step; unfinished requests end with ClosedError."""
        with self._changed:
            self._accepting, self._closed = False, True
            self._changed.notify_all()
        if self._thread is None:
            self._end_all()
        elif self._thread is not threading.current_thread():
            self._thread.join()

    def drain(self, timeout: float) -> bool:
        """Reject new requests and finish the others; return False if some are unfinished after `timeout` seconds."""
        with self._changed:
            self._accepting = False
            return self._changed.wait_for(lambda: not (self._has_work or self._busy), timeout)

    @property
    def is_alive(self) -> bool:
        """False once the worker thread has ended by an error; the process has to be restarted then."""
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
        on_event: OnEvent | None = None,
        owner: str = "",
    ) -> RequestHandle:
        """Queue a conversation. Its prompt and images are prepared in the caller's thread.

        timeout:  seconds until the request ends with DeadlineError.
        on_event: called from the worker thread for every piece of text, and at the end with an event that has `finish`
                  or with the error. It must not block.
        owner:    client name for fair scheduling: the owner with the fewest running requests is served first.
        Raises what `Engine.complete` raises, MediaError for an unreadable image, ContextOverflowError for a request
        larger than the KV cache, QueueFullError, and ClosedError if the batcher is closed.
        """
        self._check_open()
        features = self._scheduler.runner.features
        request = self.engine.new_request(messages, sampling or SamplingParams(), template, features, on_event=on_event)
        request.deadline = math.inf if timeout is None else time.monotonic() + timeout
        request.owner = owner
        if request.columns > self._pool.max_length:
            raise request.overflow_error(self._pool.max_length)
        request.handle.on_cancel = self._notify
        with self._changed:
            self._check_open()
            if self._num_waiting >= self.max_queue:
                wait = min(60.0, max(1.0, self._scheduler.seconds * self._num_waiting / len(self._pool.rows)))
                raise QueueFullError(f"{self._num_waiting} requests are queued; retry in {wait:.0f} s", wait)
            self._submitted.append(request)
            self._changed.notify_all()
        return request.handle

    def stats(self) -> BatcherStats:
        """Return the current statistics."""
        with self._changed:
            counts = self._scheduler.counts
            return BatcherStats(
                running=len(self._scheduler.running),
                waiting=self._num_waiting,
                kv_tokens_used=self._pool.tokens_owned,
                kv_tokens_cached=self._pool.tokens_cached,
                kv_tokens_total=self._pool.tokens,
                **vars(counts),
            )

    @property
    def _num_waiting(self) -> int:
        return len(self._submitted) + len(self._scheduler.waiting)

    @property
    def _has_work(self) -> bool:
        return bool(self._num_waiting or self._scheduler.running)

    def _check_open(self) -> None:
        if self._failure is not None:
            raise _dead(self._failure)
        if not self._accepting:
            raise ClosedError("the batcher accepts no new requests: it is closed or draining")

    def _notify(self) -> None:
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
                self._changed.wait_for(lambda: self._closed or self._has_work)
                if self._closed:
                    return
                self._busy = True
            try:
                self._step()
            except torch.AcceleratorError:
                raise
            except Exception as error:  # noqa: BLE001 - the worker survives any error of a step; the requests end with it
                _log.exception("a step failed; all running requests end")
                self._scheduler.fail(error)
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _step(self) -> None:
        with self._changed:
            while self._submitted:
                self._scheduler.add(self._submitted.popleft())
        self._scheduler.step()

    def _end_all(self) -> None:
        with self._changed:
            while self._submitted:
                self._scheduler.add(self._submitted.popleft())
        closed = ClosedError("the batcher was closed before the answer was complete")
        for request in (*self._scheduler.waiting, *self._scheduler.running):
            self._scheduler.end(request, closed if self._failure is None else _dead(self._failure))
        self._notify()


def _dead(cause: BaseException) -> EngineDeadError:
    return EngineDeadError(f"the engine's thread ended by {type(cause).__name__}", hint="restart the process")
