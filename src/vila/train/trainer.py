"""Training loop: read data, forward and backward per micro-batch, all-reduce, update, log, save, stop on signals."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch

from vila.core.errors import Interrupted, Preempted, TrainingError, VilaError
from vila.core.progress import SILENT, Events, task
from vila.data.collate import empty_batch
from vila.train.build_data import DataStream, StepData
from vila.train.checkpoint import Progress
from vila.train.fsdp import World, raise_on_lost_rank
from vila.train.metrics import (
    BadStepLog,
    MFUMeter,
    RankStepStats,
    count_metrics,
    loss_by_data_set,
    rank_step_stats,
    total_of,
)
from vila.train.optimizer import LRSchedule
from vila.train.resume import Checkpointer
from vila.train.train_state import TrainState

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
"""Signals that stop a run after the current step: Ctrl-C, `kill` and batch systems, Slurm's `--signal=USR1`."""
_PROGRESS_UNITS = 10_000
"""Resolution of the progress bar."""


class StopRequest:
    """number: the signal that asked the process to stop; 0 for none."""

    def __init__(self) -> None:
        self.number = 0


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Record SIGNALS while the body runs; a second Ctrl-C raises KeyboardInterrupt. Main thread only."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def record(number: int, frame: FrameType | None) -> None:
        if request.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.number = request.number or number

    before = {number: signal.signal(number, record) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class TrainerCallback:
    """Hooks of the training loop, called on every rank. The default hooks do nothing."""

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Called after every optimizer step. metrics: the step's record of `metrics.jsonl`, over all ranks."""

    def on_save(self, trainer: Trainer) -> None:
        """Called when a checkpoint was written, or handed to the thread that writes it."""

    def on_train_end(self, trainer: Trainer) -> None:
        """Called once, when the budget is used up or the data have ended; not after an interruption."""


@dataclass
class Trainer:
    """Training loop of one stage.

    state:     model, loss module and optimizer.
    data:      packed sequences of this rank.
    bad_steps: log and budget of steps that are skipped because their loss or gradient is not finite.
    mfu_meter: computes the MFU of a step; None if the peak FLOP/s of the device are not known.
    progress:  counts over all ranks, from the checkpoint if the run is resumed.
    """

    state: TrainState
    data: DataStream
    schedule: LRSchedule
    checkpointer: Checkpointer
    bad_steps: BadStepLog
    world: World
    mfu_meter: MFUMeter | None = None
    progress: Progress = field(default_factory=Progress)
    callbacks: list[TrainerCallback] = field(default_factory=list)
    events: Events = SILENT
    name: str = "training"

    def run(self) -> None:
        """Train until the budget is used up. Raises Interrupted after a signal, when the checkpoint is written."""
        try:
            with raise_on_lost_rank():
                self._run()
        finally:
            self.data.close()

    def _run(self) -> None:
        self.checkpointer.start_timer()
        with stop_on_signal() as stop, task(self.events, self.name, _PROGRESS_UNITS, "%"):
            self.events.advanced(self.name, self._progress_units())
            while self.schedule.budget_fraction(self.progress) < 1:
                units, started = self._progress_units(), time.monotonic()
                metrics, ranks = self.step(stop, is_save_overdue=self.checkpointer.is_overdue())
                if not metrics:
                    break
                self._add_timing(metrics, time.monotonic() - started)
                for callback in self.callbacks:
                    callback.on_step_end(self, metrics)
                self.events.advanced(self.name, self._progress_units() - units, **_displayed(metrics))
                signals = [stop.number] if self.world.is_single else [stats.stop_signal for stats in ranks]
                number = next(filter(None, signals), 0)
                if number or self.checkpointer.is_due(self.progress.step) or ranks[0].is_save_overdue:
                    self._save(wait=bool(number))
                if number:
                    error = Interrupted if number == signal.SIGINT else Preempted
                    with self._repeated_on_other_ranks():
                        raise error(
                            "training stopped",
                            file=self.name,
                            record=f"step {self.progress.step}",
                            hint="run the same command again to resume",
                        )
            for callback in self.callbacks:
                callback.on_train_end(self)

    def step(
        self, stop: StopRequest | None = None, *, is_save_overdue: bool = False
    ) -> tuple[dict[str, Any], list[RankStepStats]]:
        """Run one optimizer step over one packed sequence of every stream of all ranks.

        Returns the metrics of the step and the statistics of each rank. When the data have ended, the metrics are empty
        and the weights are not updated; the last step before that has fewer sequences.
        """
        data, ranks = self._read(stop, is_save_overdue)
        with self._repeated_on_other_ranks():
            num_bad = self.data.bad_samples.add([bad for stats in ranks for bad in stats.bad_samples])
        if not any(stats.samples for stats in ranks):
            self._count(ranks)
            return {}, ranks
        supervised = max(1, total_of(ranks, "supervised"))
        loss, *by_data_set = self._forward_backward(data, ranks, supervised)
        metrics = {
            "step": self.progress.step + 1,
            "tokens_seen": self.progress.tokens + total_of(ranks, "tokens"),
            "loss": loss / supervised,
            "loss_by_data_set": loss_by_data_set(ranks, self.data.data_sets, by_data_set),
            "lr": self.state.optimizer.groups[0].lr * self.schedule.multiplier(self.progress),
            "grad_norm": self.state.optimizer.grad_norm(),
            **count_metrics(ranks),
            "faults": num_bad,
        }
        self._update(metrics, data, ranks)
        return metrics, ranks

    def _read(self, stop: StopRequest | None, is_save_overdue: bool) -> tuple[StepData, list[RankStepStats]]:
        """Read this rank's data and exchange statistics.

        Raises the error of any rank that could not read its data or write its checkpoint, on all ranks.
        """
        data = StepData([], [], [])
        problem: VilaError | None = None
        try:
            self.checkpointer.writer.check()
            data = self.data.next_step()
        except VilaError as error:
            problem = error
        stats = rank_step_stats(data)
        stop_signal = stop.number if stop else 0
        stats = replace(stats, stop_signal=stop_signal, is_save_overdue=is_save_overdue, problem=problem)
        ranks = self.world.all_gather_object(stats)
        with self._repeated_on_other_ranks():
            if problem:
                raise problem
            for rank, other in enumerate(ranks):
                if other.problem:
                    other.problem.rank = rank
                    raise other.problem
        return data, ranks

    def _forward_backward(self, data: StepData, ranks: Sequence[RankStepStats], supervised: int) -> list[float]:
        """Accumulate the gradients of all micro-batches and all-reduce them.

        Returns the loss summed over the tokens of all ranks, and the same for each data set.
        """
        state, is_sharded = self.state, self.world.mesh is not None
        num_data_sets = len(self.data.data_sets)
        sums = torch.zeros(1 + num_data_sets, dtype=torch.float64, device=self.world.device)
        for index, (batch, sequences) in enumerate(zip(data.batches, data.micro_batches, strict=True)):
            if batch is None:
                # With sharded weights every rank takes part in every forward pass, even when its data have ended.
                if not (is_sharded and any(stats.has_samples[index] for stats in ranks)):
                    continue
                batch = empty_batch()
            # With a sharded tower or projector, ranks without images run it on a dummy image.
            dummy_vision = not batch.media and is_sharded and any(stats.has_images[index] for stats in ranks)
            loss, by_data_set = state.loss_module(
                batch,
                **(state.vision_inputs(batch) if batch.media or dummy_vision else {}),
                dummy_vision=dummy_vision,
                data_set_ids=self.data.data_set_ids(sequences, batch),
                num_data_sets=num_data_sets,
            )
            if loss.requires_grad:  # False for text when only the projector is trained
                (loss / supervised).backward()
                state.optimizer.accumulate()
            sums[0] += loss.detach()
            sums[1:] += by_data_set
        self.world.all_reduce(sums)
        if not is_sharded:
            self.world.all_reduce_many(state.optimizer.gradients())
        values: list[float] = sums.tolist()
        return values

    def _update(self, metrics: dict[str, Any], data: StepData, ranks: Sequence[RankStepStats]) -> None:
        """Update the weights, or skip the step if its loss or gradient is not finite."""
        is_bad = not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]))
        if is_bad:
            self.state.optimizer.zero_grad()
            own = [sample.id for sequence in data.sequences for sample in sequence]
            self._log_bad_step(metrics, [name for ids in self.world.all_gather_object(own) for name in ids])
        else:
            self.state.optimizer.step(self.schedule.multiplier(self.progress), metrics["grad_norm"])
        self.progress = replace(self.progress, step=metrics["step"], bad_steps=self.progress.bad_steps + is_bad)
        self._count(ranks)

    def _log_bad_step(self, metrics: dict[str, Any], ids: list[str]) -> None:
        """Log a skipped step. Raises TrainingError when `budget.max_bad_steps` is exceeded."""
        step, limit = metrics["step"], self.bad_steps.limit
        self.bad_steps.write(step=step, loss=str(metrics["loss"]), grad_norm=str(metrics["grad_norm"]), ids=ids)
        if self.progress.bad_steps < limit:
            return
        name = "loss" if not math.isfinite(metrics["loss"]) else "grad_norm"
        shown = ", ".join(map(repr, ids[:20])) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
        with self._repeated_on_other_ranks():
            raise TrainingError(
                f"the {name} is not finite; the samples of the step are {shown}",
                file=self.bad_steps.path,
                record=f"step {step}",
                field=name,
                value=metrics[name],
                hint=f"lower the learning rate, or skip more such steps than budget.max_bad_steps={limit}",
            )

    def _count(self, ranks: Sequence[RankStepStats]) -> None:
        """Add the samples of a step to the progress."""
        names = ("tokens", "samples", "supervised", "dropped", "truncated")
        counts = {name: getattr(self.progress, name) + total_of(ranks, name) for name in names}
        unreadable = self.progress.unreadable + sum(len(stats.bad_samples) for stats in ranks)
        self.progress = replace(self.progress, **counts, unreadable=unreadable)

    def _save(self, *, wait: bool) -> None:
        self.checkpointer.save(self.progress, self.state.optimizer, self.data.states)
        for callback in self.callbacks:
            callback.on_save(self)
        if wait:
            self.checkpointer.writer.wait()
        self.checkpointer.start_timer()

    def _add_timing(self, metrics: dict[str, Any], seconds: float) -> None:
        """Add throughput, training time, memory and MFU to the metrics of a step that took `seconds`."""
        self.progress = replace(self.progress, seconds=self.progress.seconds + seconds)
        metrics |= {"tokens_per_second": metrics["tokens"] / seconds, "seconds": self.progress.seconds}
        if self.world.device.type == "cuda":
            metrics["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.mfu_meter is not None:
            metrics["mfu"] = self.mfu_meter.mfu(metrics, seconds)

    @contextmanager
    def _repeated_on_other_ranks(self) -> Iterator[None]:
        """Mark errors that all ranks raise for the same reason, so that only rank 0 prints them."""
        try:
            yield
        except VilaError as error:
            error.is_repeated = not self.world.is_main
            raise

    def _progress_units(self) -> int:
        return min(_PROGRESS_UNITS, int(_PROGRESS_UNITS * self.schedule.budget_fraction(self.progress)))


def _displayed(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the metrics that the progress bar shows, by label."""
    labels = {"tokens_per_second": "tokens/s", "mfu": "MFU", "memory_gib": "GiB"}
    shown = ("step", "loss", "lr", *labels)
    return {labels.get(name, name): metrics[name] for name in shown if name in metrics}
