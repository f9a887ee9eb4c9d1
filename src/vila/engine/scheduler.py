"""Scheduler of the running batch: chunked prefill and decode steps of all requests in one forward pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vila.core.errors import CancelledError, ClosedError, DeadlineError, NumericsError
from vila.core.types import Image
from vila.engine.decode import TokenSampler
from vila.engine.kv_rows import KVRow, KVRows
from vila.engine.model_runner import ModelRunner
from vila.engine.ragged_attention import TokenRange
from vila.engine.request import TokenEvent, TokenLogprob
from vila.engine.request_handle import Request
from vila.engine.vision_cache import HashedImage

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
    """The running requests, in order of admission, and their joint steps."""

    def __init__(
        self, run: ModelRunner, rows: KVRows, chunk: int, to_pixels: Callable[[Sequence[Image]], Tensor]
    ) -> None:
        """chunk: maximum prompt tokens per step, including image placeholders."""
        self.run, self.rows, self.chunk, self.to_pixels = run, rows, chunk, to_pixels
        self.running: list[Request] = []
        self.counts = SchedulerCounts()
        self.seconds = 0.0
        """Moving average of the time from submission to the end of an answer."""

    def add(self, request: Request, row: KVRow) -> None:
        """Add a request with its KV row."""
        request.kv_row, request.done = row, len(row.content)
        request.handle.cached_tokens = request.done
        self.counts.prompt_tokens += len(request.keys)
        self.counts.cached_prompt_tokens += request.done
        self.running.append(request)

    def step(self) -> None:
        """Run one step: end cancelled requests, encode new images, run the model, sample and send events."""
        now = time.monotonic()
        for request in list(self.running):
            if error := request.ending_error(now):
                self.end(request, error)
        prefills = [(request, count) for request, count in self._schedule_prefills() if self._embed(request)]
        decodes = sorted((r for r in self.running if r.is_decoding), key=lambda r: r.own_row.row)
        if prefills or decodes:
            self._compute(decodes, prefills)

    def _compute(self, decodes: Sequence[Request], prefills: Sequence[tuple[Request, int]]) -> None:
        """Run one forward pass for these requests. If it fails, run each alone, and end those that fail again.

        A pass writes only KV columns that no completed step has filled, so it can be repeated.
        """
        ready = [number for number, (r, count) in enumerate(prefills) if r.done + count == len(r.keys)]
        failure = None
        try:
            logits_NV = self.run.forward(
                [(TokenRange(r.own_row.row, r.done, 1), r.token) for r in decodes],
                [self._prefill_chunk(request, count) for request, count in prefills],
                ready,
            )
        except Exception as error:  # noqa: BLE001 - an error caused by one request must not end the others
            failure = _isolated(error)
        if failure is not None:
            if len(decodes) + len(prefills) == 1:
                self._fail(decodes[0] if decodes else prefills[0][0], failure)
                return
            _log.warning(
                "a step of %d requests failed (%s); retrying each alone", len(decodes) + len(prefills), failure
            )
            for request in decodes:
                self._compute([request], [])
            for prefill in prefills:
                self._compute([], [prefill])
            return
        self.counts.steps += 1
        for request in decodes:
            request.own_row.content.append(request.token)
            request.done += 1
        for request, count in prefills:
            request.own_row.content += request.keys[request.done : request.done + count]
            request.done += count
        self._sample([*decodes, *(prefills[number][0] for number in ready)], logits_NV)

    def end(self, request: Request, outcome: TokenEvent | BaseException) -> None:
        """Remove a request from the batch and send its last event or error."""
        if request in self.running:
            self.running.remove(request)
            # A failed step may leave values that are not finite, which would spread even through masked attention.
            if isinstance(outcome, (TokenEvent, CancelledError, DeadlineError, ClosedError)):
                self.rows.release(request.own_row)
            else:
                self.rows.forget(request.own_row)
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
        failed = list(self.running)
        for request in failed:
            self.end(request, error)
        self.rows.forget_all()

    def _schedule_prefills(self) -> list[tuple[Request, int]]:
        """Encode new images, and return how many tokens of which prompts to prefill in this step.

        An image costs as many tokens as its placeholders, because running answers wait for the tower too; without
        running answers it costs nothing. An image larger than a whole step is encoded in a step of its own.
        """
        budget, is_free = self.chunk, not any(request.is_decoding for request in self.running)
        new_images: dict[str, tuple[HashedImage, Request]] = {}
        scheduled = []
        for request in self.running:
            if request.is_decoding:
                continue
            for image, cost in self._uncached_images(request):
                if image.key in new_images:
                    continue
                if len(new_images) >= _TOWER_BATCH or (not is_free and cost > budget < self.chunk):
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
            self.run.encode([image for image, _, _ in ready], torch.stack([pixels for _, _, pixels in ready]))
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
        return [(image, wanted[image]) for image in self.run.features.missing(list(wanted))]

    def _pixels(self, image: HashedImage, request: Request) -> Tensor:
        # An image that was cached at submission may have been evicted since.
        pixels = request.pixels.get(image.key)
        return self.to_pixels([image.image])[0] if pixels is None else pixels

    def _embed(self, request: Request) -> bool:
        """Embed a prompt once all of its images are encoded; return whether its embeddings are ready."""
        if request.embeds_SD is None and not self._uncached_images(request):
            try:
                request.embeds_SD, request.embedded_from = self.run.embed(request.prompt, request.done)
            except Exception as error:  # noqa: BLE001 - an error caused by one prompt must not end other requests
                self._fail(request, _isolated(error))
        return request.embeds_SD is not None

    def _prefill_chunk(self, request: Request, count: int) -> tuple[TokenRange, Tensor]:
        assert request.embeds_SD is not None
        first = request.done - request.embedded_from
        return TokenRange(request.own_row.row, request.done, count), request.embeds_SD[first : first + count]

    def _sample(self, requests: Sequence[Request], logits_NV: Tensor) -> None:
        """Sample a token for each request, in the order of the rows of the logits."""
        greedy_N = logits_NV.argmax(-1)
        is_finite = logits_NV.gather(1, greedy_N[:, None])[:, 0].isfinite().tolist()
        for index, (request, token, finite) in enumerate(zip(requests, greedy_N.tolist(), is_finite, strict=True)):
            request.embeds_SD = None
            request.own_row.expected = ()
            if not finite:
                problem = f"the model's logits are not finite after {request.done} tokens"
                self.end(request, NumericsError(problem, hint="check the weights and the dtype"))
                continue
            try:
                event = request.take(*self._sample_token(request, token, logits_NV[index : index + 1]))
            except Exception as error:  # noqa: BLE001 - an error caused by one request must not end the others
                _log.exception("a request failed")
                self.end(request, error)
                continue
            self.counts.new_tokens += 1
            if event is not None and event.finish:
                self.end(request, event)
            elif event is not None:
                self._send(request, event)

    def _sample_token(self, request: Request, greedy: int, logits_1V: Tensor) -> tuple[int, TokenLogprob | None]:
        sampling = request.sampling
        if sampling.temperature == 0 and sampling.repetition_penalty == 1 and not sampling.logprobs:
            return greedy, None
        if request.sampler is None:
            request.sampler = TokenSampler(sampling, [request.prompt], [0], logits_1V)
        ids_1, reports = request.sampler.sample(logits_1V)
        return int(ids_1), reports[0]

    def _send(self, request: Request, event: TokenEvent | BaseException) -> None:
        try:
            request.handle.put(event)
        except Exception:  # noqa: BLE001 - an error in one owner's callback must not end other requests
            _log.exception("on_event failed; the request is cancelled")
            request.handle.cancelled = True


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
