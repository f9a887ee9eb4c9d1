"""Statistics of a training step: the counts that ranks exchange, and the record of `metrics.jsonl` made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vila.core.errors import VilaError
from vila.data.bad_samples import BadSample
from vila.train.data_stream import StepData


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
    tokens: dict[str, int] = {}
    for stats in ranks:
        for name, (count, _) in stats.by_data_set.items():
            tokens[name] = tokens.get(name, 0) + count
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
    supervised: dict[str, int] = {}
    for stats in ranks:
        for name, (_, count) in stats.by_data_set.items():
            supervised[name] = supervised.get(name, 0) + count
    return {name: loss / supervised[name] for name, loss in zip(names, losses, strict=True) if supervised.get(name)}


def total_of(ranks: Sequence[RankStepStats], name: str) -> int:
    """Return the sum of one count over all ranks."""
    return sum(getattr(stats, name) for stats in ranks)
