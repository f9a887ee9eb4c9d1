"""Several data sets as one endless sequence of samples with exact proportions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vila.core.errors import DataError
from vila.core.types import Sample
from vila.data.order import Permutation


class Source(Protocol):
    """What a dataset format opens: random access to samples, no tensors."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True, slots=True)
class Part:
    """One data set of a mixture.

    repeat:   how often one epoch shows it; a fraction takes another random share in every epoch.
    template: name of its template, or "" for the stage's.
    """

    name: str
    source: Source
    repeat: float = 1.0
    template: str = ""

    @property
    def per_epoch(self) -> int:
        """Samples that one epoch takes."""
        return round(len(self.source) * self.repeat)


class Mixture:
    """The union of its parts; position p of the global sequence is sample p modulo the epoch, in the epoch's order."""

    def __init__(self, parts: Sequence[Part], seed: int) -> None:
        """Raises DataError when nothing is left to show."""
        self.parts = tuple(parts)
        self.seed = seed
        self.epoch_length = sum(part.per_epoch for part in self.parts)
        if not self.epoch_length:
            raise DataError(f"the mixture of {', '.join(part.name for part in parts)} has no samples")
        self._epoch = -1
        self._order = Permutation(self.epoch_length, seed, 0)

    def locate(self, position: int) -> tuple[Part, int]:
        """Part and index in its source of global position `position`; a pure function of the seed and the position."""
        epoch, place = divmod(position, self.epoch_length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, Permutation(self.epoch_length, self.seed, epoch)
        place = self._order[place]
        for number, part in enumerate(self.parts):
            if place < part.per_epoch:
                size = len(part.source)
                # Passes over the part go on from where the epoch before stopped; each pass is its own permutation.
                turn, index = divmod(epoch * part.per_epoch + place, size)
                return part, Permutation(size, self.seed + 7919 * (number + 1), turn)[index]
            place -= part.per_epoch
        raise AssertionError("the permutation stays inside the epoch")

    def __getitem__(self, position: int) -> tuple[Part, Sample]:
        """Part and sample at a global position."""
        part, index = self.locate(position)
        return part, part.source[index]
