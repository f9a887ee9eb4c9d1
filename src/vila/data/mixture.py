"""Several data sets as one endless sequence of samples with exact proportions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from vila.core.errors import DataError
from vila.core.types import Sample
from vila.core.vision_spec import ImageMode
from vila.data.bad_samples import RecordLocation

# --- order
# The order of samples as a pure function of (seed, epoch, position); no index array is ever held.


_ROUNDS = 4


def _round_key(seed: int, epoch: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{epoch}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mix(value: int, key: int) -> int:
    # The finaliser of SplitMix64: full avalanche over 64 bits.
    value = (value + key) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


class Permutation:
    """A pseudo-random bijection of range(size): a Feistel network over the next power of four, walked until inside."""

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self.size = size
        self._half_bits = max(1, ((max(size, 2) - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        self._keys = [_round_key(seed, epoch, number) for number in range(_ROUNDS)]

    def __getitem__(self, position: int) -> int:
        """Image of `position`. Raises IndexError outside range(size)."""
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} is outside range({self.size})")
        value = position
        while True:
            left, right = value >> self._half_bits, value & self._mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right, key) & self._mask)
            value = (left << self._half_bits) | right
            # Cycle walking: on average fewer than four steps, since the domain is at most four times the size.
            if value < self.size:
                return value


class Source(Protocol):
    """Random access to the samples of a data set, no tensors. Picklable, so that workers can have it.

    Sources of files have a property `files`, a list of paths; views of another source have it as `source`.
    """

    @property
    def unread(self) -> Mapping[str, int]:
        """Names of keys, columns and members that hold media which no sample has, with the number of records that were
        read in this process and have them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def location(self, index: int) -> RecordLocation:
        """Return the file of a sample and the number of its record there, which stay what they are in every epoch."""


@dataclass(frozen=True, slots=True)
class MixtureDataset:
    """One data set of a mixture.

    repeat:     how often one epoch shows it; a fraction takes another random share in every epoch.
    weight:     its share of an epoch, relative to the other weights; then `repeat` is 1. See `Mixture`.
    template:   name of its template, or "" for the stage's.
    image_mode: how its pictures become square, None for the stage's way.
    """

    name: str
    source: Source
    repeat: float = 1.0
    weight: float | None = None
    template: str = ""
    image_mode: ImageMode | None = None


class Mixture:
    """The union of its datasets; position p of the global sequence is sample p modulo the epoch, in the epoch's order.

    An epoch holds each dataset `repeat` times. With weights it is as long as all datasets together and is divided among
    them by weight, so a small dataset with a large weight is shown more than once and a large dataset not whole; every
    pass over a dataset ends before the next begins, through all epochs.
    """

    def __init__(self, datasets: Sequence[MixtureDataset], seed: int) -> None:
        """Raises DataError when nothing is left to show, when a data set with a weight is empty, or when only some
        datasets have weights."""
        self.datasets = tuple(datasets)
        self.seed = seed
        self.samples_per_epoch = _samples_per_epoch(self.datasets)
        self.epoch_length = sum(self.samples_per_epoch)
        if not self.epoch_length:
            raise DataError(f"the mixture of {', '.join(dataset.name for dataset in datasets)} has no samples")

    def locate(self, position: int) -> tuple[int, int]:
        """Number of the dataset and index in its source of global position `position`; a pure function of the seed."""
        epoch, place = divmod(position, self.epoch_length)
        place = _order(self.epoch_length, self.seed, epoch)[place]
        for number, count in enumerate(self.samples_per_epoch):
            if place < count:
                size = len(self.datasets[number].source)
                # Passes over the dataset go on from where the epoch before stopped; each pass is its own permutation.
                turn, index = divmod(epoch * count + place, size)
                return number, _order(size, self.seed + 7919 * (number + 1), turn)[index]
            place -= count
        raise AssertionError("the permutation stays inside the epoch")

    def __getitem__(self, position: int) -> tuple[MixtureDataset, Sample]:
        """MixtureDataset and sample at a global position."""
        number, index = self.locate(position)
        return self.datasets[number], self.datasets[number].source[index]

    def location(self, position: int) -> RecordLocation:
        """Return the file and record of the sample at a global position; it is not read."""
        number, index = self.locate(position)
        return self.datasets[number].source.location(index)

    def describe(self, position: int) -> str:
        """Return `data set 'pages', sample 16 (position 123)`, for messages; the sample is not read."""
        number, index = self.locate(position)
        return f"data set {self.datasets[number].name!r}, sample {index} (position {position})"


_order = lru_cache(maxsize=256)(Permutation)


def _samples_per_epoch(datasets: Sequence[MixtureDataset]) -> tuple[int, ...]:
    weights = [dataset.weight for dataset in datasets]
    if all(weight is None for weight in weights):
        return tuple(round(len(dataset.source) * dataset.repeat) for dataset in datasets)
    without = [dataset.name for dataset in datasets if dataset.weight is None]
    if without:
        raise DataError(f"data sets {', '.join(map(repr, without))} have no weight, others have; give all or none one")
    empty = [dataset.name for dataset in datasets if not len(dataset.source)]
    if empty:
        raise DataError(f"data sets {', '.join(map(repr, empty))} are empty and cannot have a weight; remove them")
    length, total = sum(len(dataset.source) for dataset in datasets), sum(weight or 0 for weight in weights)
    exact = [length * (weight or 0) / total for weight in weights]
    counts = [int(share) for share in exact]
    # The largest remainders are rounded up, so that the counts add up to the epoch.
    for number in sorted(range(len(datasets)), key=lambda n: counts[n] - exact[n])[: length - sum(counts)]:
        counts[number] += 1
    return tuple(counts)
