"""Statistics of one process about its part of a step, which all processes exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vila.chat.tokenize import IGNORE
from vila.core.errors import VilaError
from vila.data.batch import Batch
from vila.data.faults import Fault
from vila.data.pack import Row


@dataclass(frozen=True, slots=True)
class Share:
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
    faults: tuple[Fault, ...] = ()
    stop: int = 0
    late: bool = False
    problem: VilaError | None = None


def share_of(rows: Sequence[Row], batches: Sequence[Batch | None], data_set: Callable[[int], str]) -> Share:
    """The share of a process with these rows, collated to these batches; None for a micro-batch of empty rows."""
    by_data_set: dict[str, tuple[int, int]] = {}
    for row in rows:
        for position, sample in zip(row.positions, row, strict=True):
            tokens, supervised = by_data_set.get(name := data_set(position), (0, 0))
            learnt = int((sample.labels != IGNORE).sum())
            by_data_set[name] = tokens + len(sample), supervised + learnt
    return Share(
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
        faults=tuple(fault for row in rows for fault in row.faults),
    )
