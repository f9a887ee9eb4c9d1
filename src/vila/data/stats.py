"""Statistics of a mixture before training: number of samples, estimated tokens and images, presence of images."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from typing import Final, TypeVar

from vila.chat.tokenize import TokenizedSample
from vila.core.errors import ConfigError, VilaError
from vila.core.types import Sample
from vila.data.dataset import Subset
from vila.data.mixture import Mixture, MixtureDataset

Number = TypeVar("Number", int, float)
MAX_CHECKED: Final = 2000
"""Samples of each data set among which `require_images` looks for an image."""


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """Statistics of one data set in one epoch of a mixture.

    samples:        exact number.
    tokens, images: estimated from `num_measured` samples; image placeholders count as tokens.
    token_share:    fraction of the tokens of the mixture.
    lengths:        of the measured samples, in tokens.
    """

    name: str
    samples: int
    tokens: int
    images: int
    token_share: float
    num_measured: int
    lengths: tuple[int, ...] = ()


def dataset_stats(
    mixture: Mixture, tokenize: Callable[[MixtureDataset, Sample], TokenizedSample] | None, sample: int = 64
) -> list[DatasetStats]:
    """Estimate the data sets of a mixture from at most `sample` samples of each, always the same ones.

    tokenize: `SampleReader.tokenize`; None counts images alone. Overlong samples are neither cut nor dropped, and no
    image is opened.
    """
    measured = [_measure(dataset, tokenize, sample) for dataset in mixture.datasets]
    mean = [sum(lengths) / (len(lengths) or 1) for lengths, _ in measured]
    total = sum(count * length for count, length in zip(mixture.samples_per_epoch, mean, strict=True))
    return [
        DatasetStats(
            dataset.name,
            count,
            round(count * length),
            round(count * images / (len(lengths) or 1)),
            count * length / (total or 1),
            len(lengths),
            tuple(lengths),
        )
        for dataset, count, length, (lengths, images) in zip(
            mixture.datasets, mixture.samples_per_epoch, mean, measured, strict=True
        )
    ]


def _measure(
    dataset: MixtureDataset, tokenize: Callable[[MixtureDataset, Sample], TokenizedSample] | None, sample: int
) -> tuple[list[int], int]:
    """Return the number of tokens of each of up to `sample` samples, and the number of their images."""
    subset = Subset(dataset.source, sample)
    lengths, images = [], 0
    for index in range(len(subset)):
        one = subset[index]
        tokens = tokenize(dataset, one) if tokenize else None
        lengths.append(len(tokens) if tokens else 0)
        images += len((tokens or one).media)
    return lengths, images


def require_images(mixture: Mixture, reason: str) -> None:
    """Raise ConfigError if no sample among up to MAX_CHECKED of each data set has an image or a video.

    reason: why the run needs images. An unreadable record may have one, so it passes the check.
    """
    checked = 0
    for dataset in mixture.datasets:
        subset = Subset(dataset.source, MAX_CHECKED)
        for index in range(len(subset)):
            try:
                if subset[index].media:
                    return
            except VilaError:
                return
        checked += len(subset)
    problem = f"none of {checked:,} samples has an image or a video, and {reason}"
    hint = "add a data set with images, or train the LLM too: stage.tune=[projector,llm]"
    raise ConfigError(problem, field="data.mixture", hint=hint)


_BINS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def min_median_max(counts: Mapping[Number, int]) -> list[Number]:
    """Return smallest, median (the lower of two) and largest of values that are counted by value; [] without values.

    >>> min_median_max({5: 1, 1: 2, 9: 1})
    [1, 1, 9]
    """
    if not counts:
        return []
    values = sorted(counts)
    middle = (sum(counts.values()) + 1) // 2
    reached = accumulate(counts[value] for value in values)
    median = next(value for value, count in zip(values, reached, strict=True) if count >= middle)
    return [values[0], median, values[-1]]


def histogram(counts: Mapping[int, int]) -> dict[str, int]:
    """Return the number of values in each bin, by its upper bound; bounds double from 32, and empty bins are left out.

    >>> histogram({10: 1, 40: 2, 9000: 1})
    {'32': 1, '64': 2, 'more': 1}
    """
    found: Counter[str] = Counter()
    for value, count in counts.items():
        found[next((str(bound) for bound in _BINS if value <= bound), "more")] += count
    return {name: found[name] for name in (*map(str, _BINS), "more") if found[name]}


_INITIAL_CELLS = 1024


class NameSet:
    """Set of names, kept as 64-bit hashes in an open-addressing table: 12 to 24 bytes a name, and 8 KiB.

    Two names share a hash once in 2^64: of a hundred million names, one is wrongly found with a chance of 1 in 3,700.
    """

    def __init__(self) -> None:
        self._cells = array("Q", bytes(8 * _INITIAL_CELLS))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, name: str) -> bool:
        key = _hash(name)
        return self._cells[_find(self._cells, key)] == key

    @property
    def nbytes(self) -> int:
        """Memory of the table in bytes."""
        return len(self._cells) * self._cells.itemsize

    def add(self, name: str) -> bool:
        """Add a name; return whether it is new."""
        key = _hash(name)
        cell = _find(self._cells, key)
        if self._cells[cell]:
            return False
        self._cells[cell] = key
        self._count += 1
        if 3 * self._count > 2 * len(self._cells):
            larger = array("Q", bytes(2 * self.nbytes))
            for one in self._cells:
                if one:
                    larger[_find(larger, one)] = one
            self._cells = larger
        return True


def _hash(name: str) -> int:
    # 0 marks an empty cell.
    return int.from_bytes(blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(), "big") or 1


def _find(cells: array[int], key: int) -> int:
    """Return the index of `key`, or of the empty cell where it belongs."""
    mask = len(cells) - 1
    cell = key & mask
    while cells[cell] and cells[cell] != key:
        cell = (cell + 1) & mask
    return cell
