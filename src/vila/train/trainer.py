"""The loop: take rows, sum the loss over micro-batches and processes, update, tell, and save when it is time."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from vila.chat.tokenize import TokenizedSample
from vila.core.errors import Interrupted, Preempted, TrainingError, VilaError
from vila.core.progress import SILENT, Events, task
from vila.data.bad_samples import BadSample, BadSampleLog
from vila.data.collate import Batch, collate, empty_batch
from vila.data.packing import PackedSequence, PackingStreamState
from vila.model.modeling import VilaForConditionalGeneration
from vila.train.checkpoint import Progress
from vila.train.fsdp import World, raise_on_lost_rank
from vila.train.loss import LossModule
from vila.train.lr_schedule import lr_multiplier
from vila.train.mfu import MFUMeter
from vila.train.optimizer import MasterAdamW

# --- share
# Statistics of one process about its part of a step, which all processes exchange.


@dataclass(frozen=True, slots=True)
class RankStepStats:
    """Counts over the rows of one process.

    places:      tokens with padding.
    pairs:       positions of the LLM that see each other, or themselves.
    filled:      for each micro-batch, whether it holds a sample; at the end of the data some do not.
    shows:       for each micro-batch, whether it holds an image.
    by_data_set: tokens and supervised tokens of each data set.
    stop:        the signal that asked this process to stop, 0 for none.
    late:        the last checkpoint was long ago; what the main process says counts.
    problem:     why the rows could not be read, or the last checkpoint not be written.
    """

    tokens: int = 0
    places: int = 0
    pairs: int = 0
    samples: int = 0
    supervised: int = 0
    images: int = 0
    dropped: int = 0
    truncated: int = 0
    filled: tuple[bool, ...] = ()
    shows: tuple[bool, ...] = ()
    by_data_set: dict[str, tuple[int, int]] = field(default_factory=dict)
    faults: tuple[BadSample, ...] = ()
    stop: int = 0
    late: bool = False
    problem: VilaError | None = None


def rank_step_stats(rows: Sequence[PackedSequence], batches: Sequence[Batch | None]) -> RankStepStats:
    """The share of a process with these rows, collated to these batches; None for a micro-batch of empty rows."""
    by_data_set: dict[str, tuple[int, int]] = {}
    for row in rows:
        for sample in row:
            tokens, supervised = by_data_set.get(sample.dataset, (0, 0))
            learnt = int(sample.is_supervised.sum())
            by_data_set[sample.dataset] = tokens + len(sample), supervised + learnt
    return RankStepStats(
        tokens=sum(tokens for tokens, _ in by_data_set.values()),
        places=sum(batch.ids.numel() for batch in batches if batch),
        pairs=sum(int(sample.positions.sum()) + len(sample) for row in rows for sample in row),
        samples=sum(map(len, rows)),
        supervised=sum(supervised for _, supervised in by_data_set.values()),
        images=sum(len(batch.media) for batch in batches if batch),
        dropped=sum(row.dropped for row in rows),
        truncated=sum(row.truncated for row in rows),
        filled=tuple(batch is not None for batch in batches),
        shows=tuple(batch is not None and bool(batch.media) for batch in batches),
        by_data_set=by_data_set,
        faults=tuple(fault for row in rows for fault in row.bad_samples),
    )


# --- interrupt
# Turning signals into a request that the loop answers between two steps.


SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
"""Ctrl-C, what `kill` and batch systems send, and what they send some time before they do (Slurm: `--signal`)."""


class StopRequest:
    """number: the signal that asked the process to stop, 0 for none. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.number = 0


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Listen to SIGNALS while the body runs. Outside the main thread nothing is installed."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if request.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.number = request.number or number

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# K data sets


class Rows(Protocol):
    """What a step takes its rows from: one row of every lane of this process, read here or by workers."""

    @property
    def states(self) -> list[PackingStreamState]:
        """The state of every lane, as of the last step."""

    def step(self) -> list[PackedSequence]:
        """One row of every lane; empty ones from lanes whose data have ended."""

    def close(self) -> None:
        """Let go of workers."""


class TrainerCallback(Protocol):
    """Called by every process after every step; evaluation and answers during training are listeners.

    One that has a method `finish(trainer)` is also told of the end.
    """

    def __call__(self, trainer: Trainer, facts: dict[str, Any]) -> None:
        """facts: what `metrics.jsonl` holds for the step, over all processes."""


@dataclass
class Trainer:
    """One stage, ready to run.

    objective:    the model's loss; what is dealt to processes, when there are some.
    data_sets:    all their names.
    seen:         what the objective is given of a batch's pictures, or of a stand-in when the batch has none.
    micro:        rows of a forward pass.
    pin:          put batches into page-locked memory.
    spent:        share of the budget that a progress has used up, 0..1 and beyond.
    save:         writes a checkpoint of this trainer; told whether to wait until it is on the disk.
    save_every_s: seconds between checkpoints; `save_every_steps` adds to it, 0 for none.
    check_saves:  raises CheckpointError when a checkpoint that was begun could not be written.
    faults:       the list of samples that could not be read, and its budget.
    bad_steps:    steps that may be left out because their loss or gradient is not finite; `bad_step` is told of each.
    mfu_meter:    computes the MFU of a step; None if the peak of the device is not known.
    """

    model: VilaForConditionalGeneration
    objective: LossModule
    optimizer: MasterAdamW
    lanes: Rows
    data_sets: Sequence[str]
    seen: Callable[[Batch], dict[str, Tensor]]
    micro: int
    warmup_ratio: float
    spent: Callable[[Progress], float]
    save: Callable[[Trainer, bool], None]
    save_every_s: float
    save_every_steps: int
    world: World
    faults: BadSampleLog
    bad_steps: int = 0
    bad_step: Callable[[dict[str, Any]], None] = lambda facts: None
    check_saves: Callable[[], None] = lambda: None
    mfu_meter: MFUMeter | None = None
    progress: Progress = field(default_factory=Progress)
    listeners: list[TrainerCallback] = field(default_factory=list)
    events: Events = SILENT
    name: str = "training"
    pin: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.world.is_main

    def run(self) -> None:
        """Step until the budget is spent. Raises Interrupted, checkpoint written, when asked to stop."""
        try:
            with raise_on_lost_rank():
                self._run()
        finally:
            self.lanes.close()

    def _run(self) -> None:
        saved = time.monotonic()
        with stop_on_signal() as stop, task(self.events, self.name, 10_000, "%"):
            self.events.advanced(self.name, self._done())
            while self.spent(self.progress) < 1:
                shown, began = self._done(), time.monotonic()
                facts, shares = self.step(stop, late=began - saved >= self.save_every_s)
                if not facts:
                    break
                seconds = time.monotonic() - began
                self.progress = replace(self.progress, seconds=self.progress.seconds + seconds)
                facts |= {"tokens_per_second": facts["tokens"] / seconds, "seconds": self.progress.seconds}
                facts |= self._usage(facts, seconds)
                for listener in self.listeners:
                    listener(self, facts)
                self.events.advanced(self.name, self._done() - shown, **_shown(facts))
                asked = stop.number if self.world.is_single else next((share.stop for share in shares if share.stop), 0)
                due = self.save_every_steps and self.progress.step % self.save_every_steps == 0
                if asked or due or shares[0].late:
                    self.save(self, bool(asked))
                    saved = time.monotonic()
                if asked:
                    kind = Interrupted if asked == signal.SIGINT else Preempted
                    with self._same_in_all():
                        raise kind(f"{self.name}: stopped after step {self.progress.step}; run it again to go on")
            for listener in self.listeners:
                if finish := getattr(listener, "finish", None):
                    finish(self)

    def step(
        self, stop: StopRequest | None = None, *, late: bool = False
    ) -> tuple[dict[str, Any], list[RankStepStats]]:
        """One optimizer step over one row of every lane of all processes.

        late: the last checkpoint was long ago.
        Returns the facts of the step, and the statistics of each process. There are no facts, and there was no update,
        when the data have ended; the last step before that is made of what is left.
        """
        rows, batches, shares = self._read(stop, late)
        with self._same_in_all():
            faults = self.faults.add([fault for share in shares for fault in share.faults])
        if not any(share.samples for share in shares):
            self._count(shares)
            return {}, shares
        supervised = max(1, sum(share.supervised for share in shares))
        places = {name: number for number, name in enumerate(self.data_sets)}
        sums = torch.zeros(1 + len(places), dtype=torch.float64, device=self.world.device)
        for number, (batch, own) in enumerate(zip(batches, self._micro(rows), strict=True)):
            if batch is None:
                if not (self._dealt and any(share.filled[number] for share in shares)):
                    continue
                # Where weights are sharded all processes take part, those whose data have ended too.
                batch = empty_batch()
            # The same for processes without images, where the tower's or the projector's weights are sharded.
            dummy_vision = not batch.media and self._dealt and any(share.shows[number] for share in shares)
            loss, by_data_set = self.objective(
                batch,
                **(self.seen(batch) if batch.media or dummy_vision else {}),
                dummy_vision=dummy_vision,
                data_set_ids=self._data_set_ids(own, batch, places),
                num_data_sets=len(places),
            )
            if loss.requires_grad:  # text teaches nothing to a projector that learns alone
                (loss / supervised).backward()
                self.optimizer.accumulate()
            sums[0] += loss.detach()
            sums[1:] += by_data_set
        self.world.all_reduce(sums)
        if not self._dealt:
            self.world.all_reduce_many(self.optimizer.gradients())
        loss, *by_name = sums.tolist()
        facts = self._facts(shares, loss / supervised, by_name) | {"faults": faults}
        self._update(facts, rows, shares)
        return facts, shares

    def _read(
        self, stop: StopRequest | None, late: bool
    ) -> tuple[list[PackedSequence], list[Batch | None], list[RankStepStats]]:
        """The rows and batches of this process, and what all processes tell of theirs.

        Raises the error of whichever process could not read its rows, or not save: none goes on alone.
        """
        rows: list[PackedSequence] = []
        batches: list[Batch | None] = []
        problem: VilaError | None = None
        try:
            self.check_saves()
            rows = self.lanes.step()
            batches = [collate(own, pin=self.pin) if own else None for own in self._micro(rows)]
        except VilaError as error:
            problem = error
        mine = rank_step_stats(rows, batches)
        mine = replace(mine, stop=stop.number if stop else 0, late=late, problem=problem)
        shares = self.world.all_gather_object(mine)
        with self._same_in_all():
            if problem:
                raise problem
            for rank, share in enumerate(shares):
                if share.problem:
                    share.problem.rank = rank
                    raise share.problem
        return rows, batches, shares

    def _micro(self, rows: Sequence[PackedSequence]) -> list[list[PackedSequence]]:
        """The rows of each micro-batch, empty ones left out: as many micro-batches in every process and step."""
        return [[row for row in rows[start : start + self.micro] if row] for start in range(0, len(rows), self.micro)]

    @property
    def _dealt(self) -> bool:
        return self.world.mesh is not None

    def _data_set_ids(self, rows: Sequence[PackedSequence], batch: Batch, places: dict[str, int]) -> Tensor:
        """The number of the data set of every token, [B, S]; 0 at padding."""
        out = torch.zeros_like(batch.ids)
        for number, row in enumerate(rows):
            start = 0
            for sample in row:
                out[number, start : start + len(sample)] = places[sample.dataset]
                start += len(sample)
        return out

    def _facts(self, shares: Sequence[RankStepStats], loss: float, by_data_set: Sequence[float]) -> dict[str, Any]:
        factor = lr_multiplier(self.spent(self.progress), self.warmup_ratio)
        supervised: dict[str, int] = {}
        tokens: dict[str, int] = {}
        for share in shares:
            for name, (seen, learnt) in share.by_data_set.items():
                tokens[name] = tokens.get(name, 0) + seen
                supervised[name] = supervised.get(name, 0) + learnt
        total = sum(share.tokens for share in shares)
        return {
            "step": self.progress.step + 1,
            "tokens_seen": self.progress.tokens + total,
            "loss": loss,
            "loss_by_data_set": {
                name: value / supervised[name]
                for name, value in zip(self.data_sets, by_data_set, strict=True)
                if supervised.get(name)
            },
            "lr": self.optimizer.groups[0].lr * factor,
            "grad_norm": self.optimizer.grad_norm(),
            "tokens": total,
            "supervised": sum(share.supervised for share in shares),
            "fill": total / sum(share.places for share in shares),
            "images": sum(share.images for share in shares),
            "pairs": sum(share.pairs for share in shares),
            "tokens_by_data_set": dict(sorted(tokens.items())),
            "dropped": sum(share.dropped for share in shares),
            "truncated": sum(share.truncated for share in shares),
        }

    def _update(self, facts: dict[str, Any], rows: Sequence[PackedSequence], shares: Sequence[RankStepStats]) -> None:
        """Change the weights, or leave the step out when its loss or gradient is not finite."""
        bad = not (math.isfinite(facts["loss"]) and math.isfinite(facts["grad_norm"]))
        if bad:
            self.optimizer.zero_grad()
            ids = [one for share in self.world.all_gather_object(_ids(rows)) for one in share]
            told = {"step": facts["step"], "loss": str(facts["loss"]), "grad_norm": str(facts["grad_norm"]), "ids": ids}
            self.bad_step(told)
            if self.progress.bad_steps >= self.bad_steps:
                what = "loss" if not math.isfinite(facts["loss"]) else "gradient"
                value = facts["loss"] if what == "loss" else facts["grad_norm"]
                with self._same_in_all():
                    raise TrainingError(
                        f"{self.name}: the {what} of step {facts['step']} is {value}; its samples are {_listed(ids)}. "
                        f"budget.max_bad_steps={self.bad_steps} such steps may be left out; all are in bad_steps.jsonl"
                    )
        else:
            factor = lr_multiplier(self.spent(self.progress), self.warmup_ratio)
            self.optimizer.step(factor, facts["grad_norm"])
        self.progress = replace(self.progress, step=facts["step"], bad_steps=self.progress.bad_steps + bad)
        self._count(shares)

    def _count(self, shares: Sequence[RankStepStats]) -> None:
        """Add the samples of a step to the progress."""
        was = self.progress
        self.progress = replace(
            was,
            tokens=was.tokens + sum(share.tokens for share in shares),
            samples=was.samples + sum(share.samples for share in shares),
            supervised=was.supervised + sum(share.supervised for share in shares),
            dropped=was.dropped + sum(share.dropped for share in shares),
            truncated=was.truncated + sum(share.truncated for share in shares),
            unreadable=was.unreadable + sum(len(share.faults) for share in shares),
        )

    @contextmanager
    def _same_in_all(self) -> Iterator[None]:
        """Inside, every process raises an error of the same cause; the main process prints it."""
        try:
            yield
        except VilaError as error:
            error.is_repeated = not self.is_main
            raise

    def _usage(self, facts: dict[str, Any], seconds: float) -> dict[str, float]:
        out = {}
        if self.world.device.type == "cuda":
            out["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.mfu_meter is not None:
            out["mfu"] = self.mfu_meter.mfu(facts, seconds)
        return out

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Inside, the model answers as it does without other processes; all of them enter, and ask the same."""
        root = self.objective
        if isinstance(root, FSDPModule):
            root.unshard()
        try:
            yield
        finally:
            if isinstance(root, FSDPModule):
                root.reshard()

    def _done(self) -> int:
        return min(10_000, int(10_000 * self.spent(self.progress)))


def _shown(facts: dict[str, Any]) -> dict[str, float]:
    names = {"step": "step", "loss": "loss", "lr": "lr", "tokens/s": "tokens_per_second", "MFU": "mfu"}
    names["GiB"] = "memory_gib"
    return {label: facts[name] for label, name in names.items() if name in facts}


def _ids(rows: Sequence[Sequence[TokenizedSample]]) -> list[str]:
    return [sample.id for row in rows for sample in row]


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:20])) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
