"""Content of a mixture before a run begins: samples, an estimate of tokens and images, and whether it has images."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from typing import Final

from vila.chat.tokenize import TokenizedSample
from vila.core.errors import ConfigError, VilaError
from vila.core.types import Sample
from vila.data.dataset import Subset
from vila.data.mixture import Mixture, MixtureDataset

MAX_LOOKED_AT: Final = 2000
"""Samples of each data set in which `require_images` looks for an image."""


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """One data set in one epoch.

    samples:        exact.
    tokens, images: estimated from `surveyed` samples of it; image tokens are counted.
    token_share:    0..1 of the tokens of the mixture.
    lengths:        of the surveyed samples, in tokens.
    """

    name: str
    samples: int
    tokens: int
    images: int
    token_share: float
    surveyed: int
    lengths: tuple[int, ...] = ()


def dataset_stats(
    mixture: Mixture, tokenise: Callable[[MixtureDataset, Sample], TokenizedSample], sample: int = 64
) -> list[DatasetStats]:
    """Estimate the shares of the data sets in one epoch from at most `sample` tokenised samples of each.

    tokenise: `SampleReader.tokenise`. The samples are fixed, so that an estimate can be repeated. Nothing is cut or
    dropped here, and no image is opened.
    """
    facts = [
        (part, count, *_counts(part, tokenise, sample))
        for part, count in zip(mixture.datasets, mixture.samples_per_epoch, strict=True)
    ]
    mean = {part.name: sum(lengths) / (len(lengths) or 1) for part, _, lengths, _ in facts}
    total = sum(count * mean[part.name] for part, count, _, _ in facts)
    return [
        DatasetStats(
            part.name,
            count,
            round(count * mean[part.name]),
            round(count * images / (len(lengths) or 1)),
            count * mean[part.name] / (total or 1),
            len(lengths),
            tuple(lengths),
        )
        for part, count, lengths, images in facts
    ]


def require_images(mixture: Mixture, reason: str) -> None:
    """Raise ConfigError if no sample among up to MAX_LOOKED_AT of each data set has an image or a video.

    reason: why the run needs images. A record that cannot be read may hold one, so then nothing is refused.
    """
    looked_at = 0
    for part in mixture.datasets:
        some = Subset(part.source, MAX_LOOKED_AT)
        for index in range(len(some)):
            try:
                if some[index].media:
                    return
            except VilaError:
                return
        looked_at += len(some)
    raise ConfigError(
        f"none of {looked_at:,} samples has an image or a video, and {reason}",
        field="data.mixture",
        hint="give a data set with images, or train the LLM too: stage.tune=[projector,llm]",
    )


def _counts(
    part: MixtureDataset, tokenise: Callable[[MixtureDataset, Sample], TokenizedSample], sample: int
) -> tuple[list[int], int]:
    """Return the tokens of each of some samples, and how many images they have."""
    some = Subset(part.source, sample)
    lengths, images = [], 0
    for index in range(len(some)):
        one = tokenise(part, some[index])
        lengths.append(len(one))
        images += len(one.media)
    return lengths, images


# --- data_tally
# Whole numbers counted by value, and names seen before: what is kept of millions of samples in little memory.


_BINS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_FIRST_SLOTS = 1024


class NameSet:
    """Which names came before, as 8-byte hashes in one table: 12 to 24 bytes a name, and 8 KiB, however long it is.

    Two names share a hash once in 2^64; of a hundred million names that is a chance of 1 in 3,700 for one wrong answer.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * _FIRST_SLOTS))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, name: str) -> bool:
        key = _key(name)
        return self._slots[_place(self._slots, key)] == key

    @property
    def nbytes(self) -> int:
        """Memory of the table."""
        return len(self._slots) * self._slots.itemsize

    def add(self, name: str) -> bool:
        """Note a name; whether it is new."""
        key = _key(name)
        place = _place(self._slots, key)
        if self._slots[place]:
            return False
        self._slots[place] = key
        self._count += 1
        if 3 * self._count > 2 * len(self._slots):
            wider = array("Q", bytes(2 * self.nbytes))
            for one in self._slots:
                if one:
                    wider[_place(wider, one)] = one
            self._slots = wider
        return True


def _key(name: str) -> int:
    # 0 marks an empty slot.
    return int.from_bytes(blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(), "big") or 1


def _place(slots: array[int], key: int) -> int:
    """Where `key` is, or the empty slot that it belongs to."""
    mask = len(slots) - 1
    place = key & mask
    while slots[place] and slots[place] != key:
        place = (place + 1) & mask
    return place


def min_median_max(counts: Mapping[int, int]) -> list[int]:
    """Smallest, median (the lower of two) and largest of values counted by value; nothing of nothing.

    >>> min_median_max({5: 1, 1: 2, 9: 1})
    [1, 1, 9]
    """
    if not counts:
        return []
    values = sorted(counts)
    middle = (sum(counts.values()) + 1) // 2
    reached = accumulate(counts[value] for value in values)
    median = next(value for value, so_far in zip(values, reached, strict=True) if so_far >= middle)
    return [values[0], median, values[-1]]


def histogram(counts: Mapping[int, int]) -> dict[str, int]:
    """How many values are at most each bound and over the bound before; bounds double from 32.

    >>> histogram({10: 1, 40: 2, 9000: 1})
    {'32': 1, '64': 2, 'more': 1}
    """
    found: Counter[str] = Counter()
    for value, count in counts.items():
        found[next((str(bound) for bound in _BINS if value <= bound), "more")] += count
    return {name: found[name] for name in (*map(str, _BINS), "more") if found[name]}
