"""The loop: take rows, sum the loss over micro-batches, update, tell, and save when it is time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from vila.chat.tokenize import TokenizedSample
from vila.core.errors import Interrupted, TrainingError
from vila.core.events import SILENT, Events, task
from vila.data.batch import Batch, collate
from vila.data.pack import LaneState, Row
from vila.model.vila import VilaForConditionalGeneration
from vila.train.checkpoint import Progress
from vila.train.interrupt import stop_on_signal
from vila.train.loss import summed_loss
from vila.train.optim import MasterAdamW, rate_factor

Features = Callable[[Batch], Tensor]


class Rows(Protocol):
    """What a step takes its rows from: one row of every lane, read in this process or by workers."""

    dropped: int
    truncated: int

    @property
    def states(self) -> list[LaneState]:
        """The state of every lane, as of the last step."""

    def step(self) -> list[Row]:
        """One row of every lane."""

    def close(self) -> None:
        """Let go of workers."""


class StepListener(Protocol):
    """Called after every step; evaluation and sample generations during training are listeners."""

    def __call__(self, trainer: Trainer, facts: dict[str, Any]) -> None:
        """facts: what `metrics.jsonl` holds for the step."""


@dataclass
class Trainer:
    """One stage, ready to run.

    lanes:        the rows of a step.
    data_set:     the name of the data set that a global position belongs to.
    features:     tower features [N, P, C] of the pictures of a batch that has some.
    pin:          put batches into page-locked memory.
    spent:        share of the budget that a progress has used up, 0..1 and beyond.
    save:         writes a checkpoint of this trainer.
    save_every_s: seconds between checkpoints; `save_every_steps` adds to it, 0 for none.
    """

    model: VilaForConditionalGeneration
    optimizer: MasterAdamW
    lanes: Rows
    data_set: Callable[[int], str]
    features: Features
    micro: int
    warmup_ratio: float
    spent: Callable[[Progress], float]
    save: Callable[[Trainer], None]
    save_every_s: float
    save_every_steps: int
    progress: Progress = field(default_factory=Progress)
    listeners: list[StepListener] = field(default_factory=list)
    events: Events = SILENT
    name: str = "training"
    pin: bool = False

    def run(self) -> None:
        """Step until the budget is spent. Raises Interrupted, checkpoint written, when asked to stop."""
        try:
            self._run()
        finally:
            self.lanes.close()

    def _run(self) -> None:
        began = saved = time.monotonic()
        before = self.progress.seconds
        with stop_on_signal() as stop, task(self.events, self.name, 100, "%"):
            self.events.advanced(self.name, self._percent())
            while self.spent(self.progress) < 1:
                shown = self._percent()
                started = time.monotonic()
                facts = self.step()
                now = time.monotonic()
                self.progress = replace(self.progress, seconds=before + now - began)
                facts |= {"tokens_per_second": facts["tokens"] / (now - started), "seconds": self.progress.seconds}
                for listener in self.listeners:
                    listener(self, facts)
                self.events.advanced(self.name, self._percent() - shown, **_shown(facts))
                due = self.save_every_steps and self.progress.step % self.save_every_steps == 0
                if stop.asked or due or now - saved >= self.save_every_s:
                    self.save(self)
                    saved = time.monotonic()
                if stop.asked:
                    raise Interrupted(f"{self.name}: stopped after step {self.progress.step}; run it again to go on")

    def step(self) -> dict[str, Any]:
        """One optimizer step over one row of every lane. Returns the facts of the step."""
        rows = self.lanes.step()
        batches = [collate(rows[i : i + self.micro], pin=self.pin) for i in range(0, len(rows), self.micro)]
        supervised = sum(batch.num_supervised for batch in batches)
        tokens = sum(batch.num_tokens for batch in batches)
        loss = sum(self._backward(batch, supervised) for batch in batches)
        if not math.isfinite(loss):
            raise TrainingError(
                f"{self.name}: the loss of step {self.progress.step + 1} is {loss}; its samples are {_ids(rows)}"
            )
        factor = rate_factor(self.spent(self.progress), self.warmup_ratio)
        norm = self.optimizer.step(factor)
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            tokens=self.progress.tokens + tokens,
            samples=self.progress.samples + sum(map(len, rows)),
            supervised=self.progress.supervised + supervised,
        )
        return {
            "step": self.progress.step,
            "tokens_seen": self.progress.tokens,
            "loss": loss,
            "lr": self.optimizer.groups[0].lr * factor,
            "grad_norm": norm,
            "tokens": tokens,
            "supervised": supervised,
            "fill": tokens / sum(batch.ids.numel() for batch in batches),
            "tokens_by_data_set": self._tokens_by_data_set(rows),
            "dropped": sum(row.dropped for row in rows),
            "truncated": sum(row.truncated for row in rows),
            "faults": sum(len(row.faults) for row in rows),
        }

    def _tokens_by_data_set(self, rows: Sequence[Row]) -> dict[str, int]:
        tokens: dict[str, int] = {}
        for row in rows:
            for position, sample in zip(row.positions, row.packed, strict=True):
                name = self.data_set(position)
                tokens[name] = tokens.get(name, 0) + len(sample)
        return dict(sorted(tokens.items()))

    def _backward(self, batch: Batch, supervised: int) -> float:
        loss = summed_loss(self.model, batch, self.features(batch) if batch.media else None) / supervised
        loss.backward()
        self.optimizer.accumulate()
        return loss.item()

    def _percent(self) -> int:
        return min(100, int(100 * self.spent(self.progress)))


def _shown(facts: dict[str, Any]) -> dict[str, float]:
    return {"loss": facts["loss"], "tokens/s": facts["tokens_per_second"]}


def _ids(rows: Sequence[Sequence[TokenizedSample]]) -> str:
    ids = [sample.id for row in rows for sample in row]
    return ", ".join(map(repr, ids[:20])) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
