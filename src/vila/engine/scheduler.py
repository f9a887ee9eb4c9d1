"""One step of a running batch: pieces of prompts and a token for every answer, in one pass of the model."""

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
"""Pictures that go through the tower at a time while no answer waits for them."""

_LATELY = 16
"""Answers over which their time is averaged."""


@dataclass
class SchedulerCounts:
    """What has been done so far."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    cached_prompt_tokens: int = 0
    steps: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


class Scheduler:
    """The running requests, in the order in which they joined, and the steps that they take together."""

    def __init__(
        self, run: ModelRunner, slots: KVRows, chunk: int, to_pixels: Callable[[Sequence[Image]], Tensor]
    ) -> None:
        """chunk: tokens of prompts, slots of pictures included, that a step computes at most."""
        self.run, self.slots, self.chunk, self.to_pixels = run, slots, chunk, to_pixels
        self.running: list[Request] = []
        self.counts = SchedulerCounts()
        self.seconds = 0.0
        """How long an answer took lately, from its submission to its end."""

    def join(self, request: Request, slot: KVRow) -> None:
        """Take up a request that was given a row."""
        request.slot, request.done = slot, len(slot.content)
        request.ticket.cached_tokens = request.done
        self.counts.prompt_tokens += len(request.keys)
        self.counts.cached_prompt_tokens += request.done
        self.running.append(request)

    def take(self) -> None:
        """One step: end what is unwanted, look at pictures, run the model once, and tell the owners."""
        now = time.monotonic()
        for request in list(self.running):
            if error := request.verdict(now):
                self.end(request, error)
        reading = [(request, count) for request, count in self._look() if self._embed(request)]
        growing = sorted((r for r in self.running if r.growing), key=lambda r: r.own_slot.row)
        if reading or growing:
            self._compute(growing, reading)

    def _compute(self, growing: Sequence[Request], reading: Sequence[tuple[Request, int]]) -> None:
        """Run the model once for these requests; if that fails, once for each, and end those that fail alone.

        A pass writes only columns that no finished step has filled, so that it can be run again.
        """
        ready = [number for number, (r, count) in enumerate(reading) if r.done + count == len(r.keys)]
        failure = None
        try:
            logits_NV = self.run.forward(
                [(TokenRange(r.own_slot.row, r.done, 1), r.token) for r in growing],
                [self._piece(request, count) for request, count in reading],
                ready,
            )
        except Exception as error:  # noqa: BLE001 - whatever the pass of one request dies of must not end its neighbours
            failure = _isolated(error)
        if failure is not None:
            if len(growing) + len(reading) == 1:
                self._fail(growing[0] if growing else reading[0][0], failure)
                return
            _log.warning("a step of %d requests failed (%s); each is tried alone", len(growing) + len(reading), failure)
            for request in growing:
                self._compute([request], [])
            for grant in reading:
                self._compute([], [grant])
            return
        self.counts.steps += 1
        for request in growing:
            request.own_slot.content.append(request.token)
            request.done += 1
        for request, count in reading:
            request.own_slot.content += request.keys[request.done : request.done + count]
            request.done += count
        self._grow([*growing, *(reading[number][0] for number in ready)], logits_NV)

    def end(self, request: Request, outcome: TokenEvent | BaseException) -> None:
        """Let a request go and tell its owner how it ended."""
        if request in self.running:
            self.running.remove(request)
            # What a failed step left in the row may not be finite, and even masked it would spoil its neighbours.
            if isinstance(outcome, (TokenEvent, CancelledError, DeadlineError, ClosedError)):
                self.slots.release(request.own_slot)
            else:
                self.slots.forget(request.own_slot)
        if isinstance(outcome, TokenEvent):
            self.counts.finished += 1
            self.seconds += (time.monotonic() - request.begun - self.seconds) / min(self.counts.finished, _LATELY)
        elif isinstance(outcome, (CancelledError, DeadlineError)):
            self.counts.cancelled += 1
        else:
            self.counts.failed += 1
        self._tell(request, outcome)

    def fail(self, error: BaseException) -> None:
        """End all running requests with what a step died of. Nothing that is in memory is trusted any more."""
        failed = list(self.running)
        for request in failed:
            self.end(request, error)
        self.slots.forget_all()

    def _look(self) -> list[tuple[Request, int]]:
        """Send new pictures through the tower; how many tokens of which prompts may be computed in this step.

        A picture counts as many tokens as it has slots, because answers wait for the tower as well; while there are
        none it is free. What does not fit is left to the next step, except for a picture larger than any step.
        """
        left, free = self.chunk, not any(request.growing for request in self.running)
        seen: dict[str, tuple[HashedImage, Request]] = {}
        grants = []
        for request in self.running:
            if request.growing:
                continue
            for picture, cost in self._unseen(request):
                if picture.key in seen:
                    continue
                if len(seen) >= _TOWER_BATCH or (not free and cost > left < self.chunk):
                    break
                seen[picture.key] = (picture, request)
                left -= 0 if free else cost
            if left <= 0:
                break
            count = min(left, len(request.keys) - request.done)
            grants.append((request, count))
            left -= count
            if left <= 0:
                break
        self._see(list(seen.values()))
        return [(request, count) for request, count in grants if request in self.running]

    def _see(self, wanted: Sequence[tuple[HashedImage, Request]]) -> None:
        """Compute the tower's features of images; a request whose image cannot be read or computed ends alone."""
        ready: list[tuple[HashedImage, Request, Tensor]] = []
        for picture, request in wanted:
            try:
                ready.append((picture, request, self._pixels(picture, request)))
            except Exception as error:  # noqa: BLE001 - one request's image must not end its neighbours
                self._fail(request, _isolated(error))
        self._encode(ready)

    def _encode(self, ready: Sequence[tuple[HashedImage, Request, Tensor]]) -> None:
        if not ready:
            return
        failure = None
        try:
            self.run.see([picture for picture, _, _ in ready], torch.stack([pixels for _, _, pixels in ready]))
        except Exception as error:  # noqa: BLE001 - one request's image must not end its neighbours
            failure = _isolated(error)
        if failure is None:
            return
        if len(ready) == 1:
            self._fail(ready[0][1], failure)
            return
        _log.warning("the vision tower failed on %d images (%s); each is tried alone", len(ready), failure)
        for one in ready:
            self._encode([one])

    def _fail(self, request: Request, error: Exception) -> None:
        """End a request with what it alone died of, unless it has ended by another of its images."""
        if request in self.running:
            _log.error("a request failed (%s: %s)", type(error).__name__, error)
            self.end(request, error)

    def _unseen(self, request: Request) -> list[tuple[HashedImage, int]]:
        if request.embeds_SD is not None:
            return []
        placed = zip(request.prompt.runs, request.prompt.pictures, strict=True)
        wanted = {picture: count for (start, count), picture in placed if start + count > request.done}
        return [(picture, wanted[picture]) for picture in self.run.features.missing(list(wanted))]

    def _pixels(self, picture: HashedImage, request: Request) -> Tensor:
        # A picture that was known when it was handed in may have been forgotten since.
        pixels = request.pixels.get(picture.key)
        return self.to_pixels([picture.image])[0] if pixels is None else pixels

    def _embed(self, request: Request) -> bool:
        """Whether the embeddings of a prompt are there; they are made once all of its images were encoded."""
        if request.embeds_SD is None and not self._unseen(request):
            try:
                request.embeds_SD, request.embedded_from = self.run.embed(request.prompt, request.done)
            except Exception as error:  # noqa: BLE001 - one request's prompt must not end its neighbours
                self._fail(request, _isolated(error))
        return request.embeds_SD is not None

    def _piece(self, request: Request, count: int) -> tuple[TokenRange, Tensor]:
        assert request.embeds_SD is not None
        first = request.done - request.embedded_from
        return TokenRange(request.own_slot.row, request.done, count), request.embeds_SD[first : first + count]

    def _grow(self, requests: Sequence[Request], logits_NV: Tensor) -> None:
        """A token for each request, in the order of the rows of logits."""
        likeliest_N = logits_NV.argmax(-1)
        heights = logits_NV.gather(1, likeliest_N[:, None])[:, 0].isfinite().tolist()
        for index, (request, token, sound) in enumerate(zip(requests, likeliest_N.tolist(), heights, strict=True)):
            request.embeds_SD = None
            request.own_slot.expected = ()
            if not sound:
                message = (
                    f"the model's logits are not finite after {request.done} tokens; see the weights and the dtype"
                )
                self.end(request, NumericsError(message))
                continue
            try:
                event = request.take(*self._choose(request, token, logits_NV[index : index + 1]))
            except Exception as error:  # noqa: BLE001 - what one request dies of must not end its neighbours
                _log.exception("a request failed")
                self.end(request, error)
                continue
            self.counts.new_tokens += 1
            if event is not None and event.finish:
                self.end(request, event)
            elif event is not None:
                self._tell(request, event)

    def _choose(self, request: Request, likeliest: int, logits_1V: Tensor) -> tuple[int, TokenLogprob | None]:
        sampling = request.sampling
        if sampling.temperature == 0 and sampling.repetition_penalty == 1 and not sampling.logprobs:
            return likeliest, None
        if request.sampler is None:
            request.sampler = TokenSampler(sampling, [request.prompt], [0], logits_1V)
        ids_1, reports = request.sampler.choose(logits_1V)
        return int(ids_1), reports[0]

    def _tell(self, request: Request, event: TokenEvent | BaseException) -> None:
        try:
            request.ticket.tell(event)
        except Exception:  # noqa: BLE001 - the owner's own fault, which must not stop the others
            _log.exception("on_event failed; the request is given up")
            request.ticket.cancelled = True


def _isolated(error: Exception) -> Exception:
    """The error without its traceback, whose frames would keep tensors alive; frees cached memory after an OOM.

    Raises it if it concerns the device as a whole: after such an error no further work on it can succeed.
    """
    if isinstance(error, torch.AcceleratorError):
        raise error
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    _log.debug("a step failed", exc_info=error)
    return error.with_traceback(None)
