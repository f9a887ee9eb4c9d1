"""Mixture of data sets: an endless, deterministic sequence of samples with exact proportions.

The order is a pure function of seed, epoch and position (a keyed permutation), so no index array is held in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from vila.core.errors import DataError
from vila.core.types import Sample
from vila.core.vision_spec import ImageMode, VisionSpec
from vila.data.bad_samples import RecordLocation

_ROUNDS = 4


def _mix(value: int, key: int) -> int:
    # The finaliser of SplitMix64: full avalanche over 64 bits.
    value = (value + key) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


class Permutation:
    """A pseudo-random permutation of range(size): a Feistel network over the next power of four, with cycle walking."""

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self.size = size
        self._half_bits = max(1, ((max(size, 2) - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        texts = [f"{seed}/{epoch}/{number}".encode() for number in range(_ROUNDS)]
        self._keys = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") for text in texts]

    def __getitem__(self, position: int) -> int:
        """Return the index at `position`. Raises IndexError outside range(size)."""
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
    """Random access to the samples of one data set. Holds no tensors and is picklable, for worker processes."""

    @property
    def files(self) -> list[Path]:
        """Files that samples are read from; empty for a source without files."""

    @property
    def unread(self) -> Mapping[str, int]:
        """Media that the format does not read: names of keys, columns and members, with the number of records that
        have them, of those read in this process."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def location(self, index: int) -> RecordLocation:
        """Return the file of a sample and the number of its record there; both are the same in every epoch."""


@dataclass(frozen=True, slots=True)
class MixtureDataset:
    """One data set of a mixture.

    repeat:     passes over the data set in one epoch; a fraction takes a different random subset in every epoch.
    weight:     fraction of an epoch, relative to the other weights; `repeat` is ignored then. See `Mixture`.
    template:   name of its chat template, "" for that of the stage.
    image_mode: how its images are made square, None for the mode of the stage.
    """

    name: str
    source: Source
    repeat: float = 1.0
    weight: float | None = None
    template: str = ""
    image_mode: ImageMode | None = None

    def vision_spec(self, spec: VisionSpec) -> VisionSpec:
        """Return the spec of the stage with the image mode of the data set, if it has one."""
        return replace(spec, image_mode=self.image_mode) if self.image_mode else spec


class Mixture:
    """Endless sequence of the samples of several data sets; each epoch has its own order.

    An epoch has `repeat` passes over each data set. With weights it is as long as all data sets together and divided by
    weight, so a small data set with a large weight is repeated and a large one is shown in part. A pass over a data set
    ends before the next one begins, across epochs too.
    """

    def __init__(self, datasets: Sequence[MixtureDataset], seed: int) -> None:
        """Raises DataError if no samples remain, if a weighted data set is empty, or if only some have weights."""
        self.datasets = tuple(datasets)
        self.seed = seed
        self.samples_per_epoch = _samples_per_epoch(self.datasets)
        self.epoch_length = sum(self.samples_per_epoch)
        if not self.epoch_length:
            raise DataError(f"the mixture of {', '.join(dataset.name for dataset in datasets)} has no samples")

    def locate(self, position: int) -> tuple[int, int]:
        """Return the index of the data set, and the index in its source, of a global position."""
        epoch, offset = divmod(position, self.epoch_length)
        offset = _order(self.epoch_length, self.seed, epoch)[offset]
        for number, count in enumerate(self.samples_per_epoch):
            if offset < count:
                size = len(self.datasets[number].source)
                # Passes over a data set continue across epochs; each pass has its own permutation.
                passes, index = divmod(epoch * count + offset, size)
                return number, _order(size, self.seed + 7919 * (number + 1), passes)[index]
            offset -= count
        raise AssertionError("the permutation stays inside the epoch")

    def __getitem__(self, position: int) -> tuple[MixtureDataset, Sample]:
        """Read the sample at a global position; return its data set and the sample."""
        number, index = self.locate(position)
        return self.datasets[number], self.datasets[number].source[index]

    def location(self, position: int) -> RecordLocation:
        """Return the file and record of the sample at a global position, without reading it."""
        number, index = self.locate(position)
        return self.datasets[number].source.location(index)

    def describe(self, position: int) -> str:
        """Return `data set 'pages', sample 16 (position 123)` for error messages, without reading the sample."""
        number, index = self.locate(position)
        return f"data set {self.datasets[number].name!r}, sample {index} (position {position})"


_order = lru_cache(maxsize=256)(Permutation)


def _samples_per_epoch(datasets: Sequence[MixtureDataset]) -> tuple[int, ...]:
    weights = [dataset.weight for dataset in datasets]
    if all(weight is None for weight in weights):
        return tuple(round(len(dataset.source) * dataset.repeat) for dataset in datasets)
    if without := [dataset.name for dataset in datasets if dataset.weight is None]:
        raise DataError("some data sets have no weight", value=without, hint="give a weight to all data sets or none")
    if empty := [dataset.name for dataset in datasets if not len(dataset.source)]:
        raise DataError("an empty data set cannot have a weight", value=empty, hint="remove it from the mixture")
    length, total = sum(len(dataset.source) for dataset in datasets), sum(weight or 0 for weight in weights)
    exact = [length * (weight or 0) / total for weight in weights]
    counts = [int(count) for count in exact]
    # The largest remainders are rounded up, so that the counts add up to the epoch.
    for number in sorted(range(len(datasets)), key=lambda n: counts[n] - exact[n])[: length - sum(counts)]:
        counts[number] += 1
    return tuple(counts)
