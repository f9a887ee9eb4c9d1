"""Scheduler: admits requests, and runs chunked prefill, decoding and draft verification of all in one forward pass."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vila.core.errors import CancelledError, ClosedError, DeadlineError, NumericsError
from vila.engine.attention import ForwardBatch, TokenRange
from vila.engine.kv_cache import KVCachePool
from vila.engine.request import Request
from vila.engine.runner_torch import ModelRunner
from vila.engine.sampler import most_likely
from vila.engine.sampling_params import TokenEvent
from vila.engine.vision_cache import HashedImage

# S tokens  D model width  N positions with logits  V vocab

_log = logging.getLogger(__name__)

_TOWER_BATCH = 32
"""Maximum images per forward pass of the tower."""

_AVERAGED = 16
"""Number of answers over which the response time is averaged."""


@dataclass
class SchedulerCounts:
    """Counters since the start."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    cached_prompt_tokens: int = 0
    steps: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


class Scheduler:
    """The waiting and the running requests, and their joint steps."""

    def __init__(self, runner: ModelRunner, pool: KVCachePool, prefill_chunk: int) -> None:
        """prefill_chunk: maximum prompt tokens per step, including image placeholders."""
        self.runner, self.pool, self.prefill_chunk = runner, pool, prefill_chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """In order of admission."""
        self.counts = SchedulerCounts()
        self.seconds = 0.0
        """Moving average of the time from submission to the end of an answer."""

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def step(self) -> None:
        """Run one step: end cancelled requests, admit waiting ones, run the model, sample and send events."""
        now = time.monotonic()
        for request in (*self.waiting, *self.running):
            if error := request.ending_error(now):
                self.end(request, error)
        self._admit()
        prefills = [(request, count) for request, count in self._schedule_prefills() if self._embed(request)]
        decodes = sorted((r for r in self.running if r.is_decoding), key=lambda r: r.own_row.row)
        work = [(request, self._decode_range(request)) for request in decodes]
        # Single tokens first: they share one attention call.
        work.sort(key=lambda item: item[1].count > 1)
        work += [(request, self._prefill_range(request, count)) for request, count in prefills]
        if work:
            self._compute(work)

    def end(self, request: Request, outcome: TokenEvent | BaseException) -> None:
        """Remove a request and send its last event or error."""
        if request in self.running:
            self.running.remove(request)
            # A failed step may leave values that are not finite, which would spread even through masked attention.
            if isinstance(outcome, (TokenEvent, CancelledError, DeadlineError, ClosedError)):
                self.pool.release(request.own_row)
            else:
                self.pool.forget(request.own_row)
        elif request in self.waiting:
            self.waiting.remove(request)
        if isinstance(outcome, TokenEvent):
            self.counts.finished += 1
            self.seconds += (time.monotonic() - request.begun - self.seconds) / min(self.counts.finished, _AVERAGED)
        elif isinstance(outcome, (CancelledError, DeadlineError)):
            self.counts.cancelled += 1
        else:
            self.counts.failed += 1
        self._send(request, outcome)

    def fail(self, error: BaseException) -> None:
        """End all running requests with the error of a step, and clear the KV cache, whose content may be invalid."""
        for request in list(self.running):
            self.end(request, error)
        self.pool.forget_all()

    def _admit(self) -> None:
        """Admit waiting requests while KV rows are free, first those of the owner with the fewest running requests.

        A request whose prefix another one is about to compute waits for it without holding up the others.
        """
        while request := self._next():
            try:
                row = self.pool.allocate(request.keys, request.columns, request.max_shared)
            except Exception as error:
                self.end(request, error)
                raise
            if row is None and self.running:
                return
            if row is None:
                self.end(request, request.overflow_error(self.pool.max_length))
                continue
            self.waiting.remove(request)
            request.kv_row, request.done = row, len(row.content)
            request.handle.cached_tokens = request.done
            self.counts.prompt_tokens += len(request.keys)
            self.counts.cached_prompt_tokens += request.done
            self.running.append(request)

    def _next(self) -> Request | None:
        """Return the waiting request to admit next."""
        if not self.waiting or not self.pool.has_free_row:
            return None
        running = Counter(request.owner for request in self.running)
        for request in sorted(self.waiting, key=lambda request: running[request.owner]):
            if not self.pool.is_prefix_coming(request.keys, request.max_shared):
                return request
        return None

    def _decode_range(self, request: Request) -> TokenRange:
        """Return the last token of a request, and its draft tokens, which this step verifies."""
        if request.lookup is not None and len(self.running) == 1:
            # No logits are needed after the last token.
            request.draft = request.lookup.draft(request.sampling.max_new_tokens - request.taken - 1)
            request.answer.draft_tokens += len(request.draft)
        ids = [request.token, *request.draft]
        return TokenRange(request.own_row.row, request.done, ids, outputs=range(len(ids)))

    def _prefill_range(self, request: Request, count: int) -> TokenRange:
        assert request.embeds_SD is not None
        first, end = request.done - request.embedded_from, request.done + count
        if request.targets:
            outputs = [place - 1 - request.done for place in request.targets if request.done < place <= end]
        else:
            outputs = [count - 1] if end == len(request.keys) else []
        ids = request.prompt.ids[request.done : end]
        return TokenRange(request.own_row.row, request.done, ids, request.embeds_SD[first : first + count], outputs)

    def _compute(self, work: Sequence[tuple[Request, TokenRange]]) -> None:
        """Run one forward pass. If it fails, run each request alone, and end those that fail again.

        A pass writes only KV columns that no completed step has filled, so it can be repeated.
        """
        failure = None
        try:
            logits_NV = self.runner.forward(ForwardBatch([tokens for _, tokens in work]))
        except Exception as error:  # noqa: BLE001 - an error caused by one request must not end the others
            failure = _isolated(error)
        if failure is not None:
            if len(work) == 1:
                self._fail(work[0][0], failure)
                return
            _log.warning("a step of %d requests failed (%s); retrying each alone", len(work), failure)
            for item in work:
                self._compute([item])
            return
        self.counts.steps += 1
        for request, tokens in work:
            request.own_row.content += (
                tokens.ids if request.is_decoding else request.keys[request.done : request.done + tokens.count]
            )
            request.done += tokens.count
        self._take_logits(work, logits_NV)

    def _take_logits(self, work: Sequence[tuple[Request, TokenRange]], logits_NV: Tensor) -> None:
        """Sample tokens, or read the scores, from the logits of a step."""
        greedy, is_finite = most_likely(logits_NV)
        first = 0
        for request, tokens in work:
            places = slice(first, first + len(tokens.outputs))
            first = places.stop
            if request.done >= len(request.keys):
                request.embeds_SD, request.own_row.expected = None, ()
            if not all(is_finite[places]):
                problem = f"the model's logits are not finite after {request.done} tokens"
                self.end(request, NumericsError(problem, hint="check the weights and the dtype"))
                continue
            try:
                if request.targets:
                    event = _score(request, tokens, logits_NV[places])
                else:
                    event = self._sample(request, logits_NV[places], greedy[places])
            except Exception as error:  # noqa: BLE001 - an error caused by one request must not end the others
                _log.exception("a request failed")
                self.end(request, error)
                continue
            if event is not None:
                self.end(request, event)

    def _sample(self, request: Request, logits_NV: Tensor, greedy: Sequence[int]) -> TokenEvent | None:
        """Sample the next token, and one after each accepted draft token; return the last event of the answer.

        Every token is sampled from the model's own logits in order, so drafts do not change the answer.
        """
        if not greedy:
            return None
        draft, request.draft = request.draft, []
        for place, candidate in enumerate(greedy):
            token, report = request.sampler.sample(logits_NV[place : place + 1], candidate)
            event = request.take(token, report)
            self.counts.new_tokens += 1
            if request.lookup is not None:
                request.lookup.append(token)
            if event is not None and event.finish:
                break
            if event is not None:
                self._send(request, event)
            if place == len(draft) or draft[place] != token:
                break
        request.done -= len(draft) - place
        del request.own_row.content[request.done :]
        if request.lookup is not None:
            request.answer.accepted_tokens += place
            request.lookup.update(len(draft), place)
        return event if event is not None and event.finish else None

    def _schedule_prefills(self) -> list[tuple[Request, int]]:
        """Encode new images, and return how many tokens of which prompts to prefill in this step.

        An image costs as many tokens as its placeholders, because running answers wait for the tower too; without
        running answers it costs nothing. An image larger than a whole step is encoded in a step of its own.
        """
        budget, is_free = self.prefill_chunk, not any(request.is_decoding for request in self.running)
        new_images: dict[str, tuple[HashedImage, Request]] = {}
        scheduled = []
        for request in self.running:
            if request.is_decoding:
                continue
            for image, cost in self._uncached_images(request):
                if image.key in new_images:
                    continue
                if len(new_images) >= _TOWER_BATCH or (not is_free and cost > budget < self.prefill_chunk):
                    break
                new_images[image.key] = (image, request)
                budget -= 0 if is_free else cost
            if budget <= 0:
                break
            count = min(budget, len(request.keys) - request.done)
            scheduled.append((request, count))
            budget -= count
            if budget <= 0:
                break
        self._encode_images(list(new_images.values()))
        return [(request, count) for request, count in scheduled if request in self.running]

    def _encode_images(self, wanted: Sequence[tuple[HashedImage, Request]]) -> None:
        """Compute the tower features of images; only the request of an image that fails ends."""
        ready: list[tuple[HashedImage, Request, Tensor]] = []
        for image, request in wanted:
            try:
                ready.append((image, request, self._pixels(image, request)))
            except Exception as error:  # noqa: BLE001 - an error caused by one image must not end other requests
                self._fail(request, _isolated(error))
        self._encode(ready)

    def _encode(self, ready: Sequence[tuple[HashedImage, Request, Tensor]]) -> None:
        if not ready:
            return
        failure = None
        try:
            self.runner.encode([image for image, _, _ in ready], torch.stack([pixels for _, _, pixels in ready]))
        except Exception as error:  # noqa: BLE001 - an error caused by one image must not end other requests
            failure = _isolated(error)
        if failure is None:
            return
        if len(ready) == 1:
            self._fail(ready[0][1], failure)
            return
        _log.warning("the vision tower failed on %d images (%s); retrying each alone", len(ready), failure)
        for one in ready:
            self._encode([one])

    def _fail(self, request: Request, error: Exception) -> None:
        """End a request with an error, unless another of its images has already ended it."""
        if request in self.running:
            _log.error("a request failed (%s: %s)", type(error).__name__, error)
            self.end(request, error)

    def _uncached_images(self, request: Request) -> list[tuple[HashedImage, int]]:
        if request.embeds_SD is not None:
            return []
        placed = zip(request.prompt.runs, request.prompt.images, strict=True)
        wanted = {image: count for (start, count), image in placed if start + count > request.done}
        return [(image, wanted[image]) for image in self.runner.features.missing(list(wanted))]

    def _pixels(self, image: HashedImage, request: Request) -> Tensor:
        # An image that was cached at submission may have been evicted since.
        pixels = request.pixels.get(image.key)
        return image.preprocess() if pixels is None else pixels

    def _embed(self, request: Request) -> bool:
        """Embed a prompt once all of its images are encoded; return whether its embeddings are ready."""
        if request.embeds_SD is None and not self._uncached_images(request):
            try:
                request.embeds_SD, request.embedded_from = self.runner.embed(request.prompt, request.done)
            except Exception as error:  # noqa: BLE001 - an error caused by one prompt must not end other requests
                self._fail(request, _isolated(error))
        return request.embeds_SD is not None

    def _send(self, request: Request, event: TokenEvent | BaseException) -> None:
        try:
            request.handle.put(event)
        except Exception:  # noqa: BLE001 - an error in one owner's callback must not end other requests
            _log.exception("on_event failed; the request is cancelled")
            request.handle.cancelled = True


def _score(request: Request, tokens: TokenRange, logits_NV: Tensor) -> TokenEvent | None:
    """Add the log-probabilities of a chunk's targets; return the last event when the prompt is complete."""
    if tokens.outputs:
        targets = [request.targets[tokens.start + place + 1] for place in tokens.outputs]
        logprobs_NV = logits_NV.log_softmax(-1)
        request.scores += logprobs_NV[range(len(targets)), targets].tolist()
    return TokenEvent("", "stop") if request.done == len(request.keys) else None


def _isolated(error: Exception) -> Exception:
    """Return the error without its traceback, whose frames keep tensors alive; frees cached memory after an OOM.

    Raises errors of the whole device, after which no further work on it can succeed.
    """
    if isinstance(error, torch.AcceleratorError):
        raise error
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    _log.debug("a step failed", exc_info=error)
    return error.with_traceback(None)
