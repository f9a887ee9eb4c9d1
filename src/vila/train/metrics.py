"""Metrics of a training run: `metrics.jsonl`, statistics of a step over all ranks, model FLOPs utilisation (MFU)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vila.config.schema import Recipe
from vila.core.errors import DataError, VilaError
from vila.core.files import write_text
from vila.core.reading import read_jsonl
from vila.data.bad_samples import BadSample
from vila.model.config import VilaConfig
from vila.plan.devices import peak_tflops
from vila.plan.flops import TrainableParts, step_flops
from vila.plan.model_shape import ModelShape, shape_of
from vila.train.build_data import StepData
from vila.train.fsdp import World

_HINT = "delete the line, or delete the file to resume without it"


class MetricsLog:
    """JSONL file with one record per step, opened for appending."""

    def __init__(self, path: Path, step: int) -> None:
        """Drop the records after `step` and an incomplete last line. Raises DataError as `read_metrics`."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [record for record in read_metrics(path) if record["step"] <= step]
        self.last_step: int = max((record["step"] for record in records), default=0)
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))

    def write(self, **record: Any) -> None:
        """Append a record and flush it."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


class BadStepLog:
    """`bad_steps.jsonl`: steps that were skipped because their loss or gradient was not finite.

    limit: number of such steps that a run may skip.
    """

    def __init__(self, path: Path, limit: int, step: int, *, write: bool) -> None:
        """Drop the records after `step`. write: False on ranks other than 0, which write nothing."""
        self.path, self.limit, self._is_writer = path, limit, write
        if write and path.is_file():
            MetricsLog(path, step)

    def write(self, *, step: int, **record: Any) -> None:
        """Append the record of a skipped step."""
        if self._is_writer:
            MetricsLog(self.path, step - 1).write(step=step, **record)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a log; empty if the file does not exist. An incomplete last line is ignored.

    Raises DataError naming file, line and field for a line that is not an object with a `step`.
    """
    if not path.is_file():
        return []
    records = []
    for number, record in read_jsonl(path, DataError, appended=True):
        check_record(record, path, number)
        records.append(record)
    return records


def check_record(record: Any, path: Path, line: int, key: str = "step") -> None:
    """Raise DataError unless a record of a log is an object with a non-negative integer at `key`."""
    count = record.get(key) if isinstance(record, dict) else None
    if type(count) is not int or not 0 <= count < 2**62:
        raise DataError(
            file=path,
            record=f"line {line}",
            field=key if isinstance(record, dict) else None,
            value=count if isinstance(record, dict) else record,
            expected="an integer >= 0" if isinstance(record, dict) else "an object ({...})",
            hint=_HINT,
        )


# Model FLOPs utilisation (MFU) of a training step, as defined by PaLM (arXiv 2204.02311, appendix B).


@dataclass(frozen=True, slots=True)
class MFUMeter:
    """Computes the MFU of steps.

    peak_tflops:   peak of one device, in 1e12 FLOP/s.
    feature_cache: image features are cached, so the tower costs nothing.
    """

    shape: ModelShape
    trainable: TrainableParts
    num_devices: int
    peak_tflops: float
    feature_cache: bool = False

    def mfu(self, metrics: Mapping[str, Any], seconds: float) -> float:
        """Return the MFU (0..1) of a step from its metrics and its duration."""
        flops = step_flops(
            self.shape,
            self.trainable,
            tokens=metrics["tokens"],
            pairs=metrics["pairs"],
            supervised=metrics["supervised"],
            images=0 if self.feature_cache else metrics["images"],
        )
        return flops.total / (seconds * self.num_devices * self.peak_tflops * 1e12)


def build_mfu_meter(recipe: Recipe, config: VilaConfig, world: World) -> MFUMeter | None:
    """Return the meter for a run; None if the peak FLOP/s of the device are not known.

    The peak is `monitor.peak_tflops`, or the dense bfloat16 peak of a known GPU.
    """
    peak: float | None = recipe.monitor.peak_tflops
    if not peak and world.device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(world.device))
    if not peak:
        return None
    return MFUMeter(
        shape_of(config),
        TrainableParts.of(recipe.stage),
        num_devices=world.process.world_size,
        peak_tflops=peak,
        feature_cache=recipe.compute.feature_cache,
    )


# Statistics of a training step: the counts that ranks exchange, and the record of `metrics.jsonl` made from them.


@dataclass(frozen=True, slots=True)
class RankStepStats:
    """Counts over the packed sequences of one rank in one step.

    padded_tokens:   tokens with padding.
    attention_pairs: pairs of positions in the LLM of which one attends to the other, a position itself included.
    has_samples:     per micro-batch, whether it has a sample; at the end of the data some have none.
    has_images:      per micro-batch, whether it has an image.
    by_data_set:     tokens and supervised tokens of each data set.
    stop_signal:     number of the signal that asked this process to stop, 0 for none.
    is_save_overdue: the last checkpoint is older than the interval; rank 0 decides for all.
    problem:         why the data could not be read, or why the last checkpoint could not be written.
    """

    tokens: int = 0
    padded_tokens: int = 0
    attention_pairs: int = 0
    samples: int = 0
    supervised: int = 0
    images: int = 0
    dropped: int = 0
    truncated: int = 0
    has_samples: tuple[bool, ...] = ()
    has_images: tuple[bool, ...] = ()
    by_data_set: dict[str, tuple[int, int]] = field(default_factory=dict)
    bad_samples: tuple[BadSample, ...] = ()
    stop_signal: int = 0
    is_save_overdue: bool = False
    problem: VilaError | None = None


def rank_step_stats(data: StepData) -> RankStepStats:
    """Count the tokens, samples and images of a rank's step."""
    by_data_set: dict[str, tuple[int, int]] = {}
    for sequence in data.sequences:
        for sample in sequence:
            tokens, supervised = by_data_set.get(sample.dataset, (0, 0))
            by_data_set[sample.dataset] = tokens + len(sample), supervised + int(sample.is_supervised.sum())
    batches = [batch for batch in data.batches if batch]
    return RankStepStats(
        tokens=sum(tokens for tokens, _ in by_data_set.values()),
        padded_tokens=sum(batch.ids.numel() for batch in batches),
        attention_pairs=sum(int(one.positions.sum()) + len(one) for sequence in data.sequences for one in sequence),
        samples=sum(map(len, data.sequences)),
        supervised=sum(supervised for _, supervised in by_data_set.values()),
        images=sum(len(batch.media) for batch in batches),
        dropped=sum(sequence.dropped for sequence in data.sequences),
        truncated=sum(sequence.truncated for sequence in data.sequences),
        has_samples=tuple(batch is not None for batch in data.batches),
        has_images=tuple(batch is not None and bool(batch.media) for batch in data.batches),
        by_data_set=by_data_set,
        bad_samples=tuple(bad for sequence in data.sequences for bad in sequence.bad_samples),
    )


def count_metrics(ranks: Sequence[RankStepStats]) -> dict[str, Any]:
    """Return the counts of a step over all ranks, under the keys of `metrics.jsonl`."""
    tokens: Counter[str] = Counter()
    for stats in ranks:
        tokens.update({name: count for name, (count, _) in stats.by_data_set.items()})
    total = total_of(ranks, "tokens")
    return {
        "tokens": total,
        "supervised": total_of(ranks, "supervised"),
        "fill": total / total_of(ranks, "padded_tokens"),
        "images": total_of(ranks, "images"),
        "pairs": total_of(ranks, "attention_pairs"),
        "tokens_by_data_set": dict(sorted(tokens.items())),
        "dropped": total_of(ranks, "dropped"),
        "truncated": total_of(ranks, "truncated"),
    }


def loss_by_data_set(ranks: Sequence[RankStepStats], names: Sequence[str], losses: Sequence[float]) -> dict[str, float]:
    """Return the mean loss per supervised token of each data set.

    losses: summed over all ranks, in the order of `names`.
    """
    supervised: Counter[str] = Counter()
    for stats in ranks:
        supervised.update({name: count for name, (_, count) in stats.by_data_set.items()})
    return {name: loss / supervised[name] for name, loss in zip(names, losses, strict=True) if supervised[name]}


def total_of(ranks: Sequence[RankStepStats], name: str) -> int:
    """Return the sum of one count over all ranks."""
    return sum(getattr(stats, name) for stats in ranks)
