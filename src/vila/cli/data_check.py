"""`vila data check`: every sample of some data sets read once, and what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import TYPE_CHECKING, Any

from vila.cli.data_sets import DataSets
from vila.core.errors import DataError, MediaError, VilaError
from vila.core.events import SILENT, Events, task
from vila.core.types import Image, Sample

if TYPE_CHECKING:
    from vila.data.mixture import Part

_BINS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass
class Findings:
    """What one data set holds.

    lengths:    of the samples that are whole, in `DataSets.unit`; `supervised`: how much of them in all.
    sizes:      (width, height) of every distinct picture.
    faults:     the first messages; `fault_count` counts all.
    duplicates: ids that came before, each with how often.
    """

    name: str
    samples: int = 0
    lengths: list[int] = field(default_factory=list)
    supervised: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0
    duplicates: Counter[str] = field(default_factory=Counter)

    @property
    def supervised_share(self) -> float:
        """0..1 of the lengths."""
        return self.supervised / (sum(self.lengths) or 1)

    def as_json(self) -> dict[str, Any]:
        """Plain data, without the single lengths and sizes."""
        return {
            "name": self.name,
            "samples": self.samples,
            "faults": self.fault_count,
            "first_faults": self.faults,
            "duplicate_ids": len(self.duplicates),
            "images": len(self.sizes),
            "width": spread([width for width, _ in self.sizes]),
            "height": spread([height for _, height in self.sizes]),
            "length": spread(self.lengths),
            "histogram": histogram(self.lengths),
            "supervised_share": round(self.supervised_share, 4),
        }


def check_data(data: DataSets, *, sample: int, max_shown: int, events: Events = SILENT) -> list[Findings]:
    """The findings of each data set, from all of its samples or a fixed `sample` of them (0: all).

    Every distinct picture is decoded. A fault is a record that cannot become a sample, a sample that does not fit its
    template or the recipe's rows, or a picture that cannot be read.
    """
    return [_check_part(data, part, sample, max_shown, events) for part in data.mixture.parts]


def _check_part(data: DataSets, part: Part, sample: int, max_shown: int, events: Events) -> Findings:
    from vila.data.view import Subset

    found = Findings(part.name)
    source = Subset(part.source, sample) if sample else part.source
    ids: set[str] = set()
    pictures: set[Image] = set()
    name = f"check {part.name}"
    with task(events, name, len(source), "samples"):
        for index in range(len(source)):
            found.samples += 1
            try:
                one = source[index]
                if one.id in ids:
                    found.duplicates[one.id] += 1
                ids.add(one.id)
                found.sizes += _new_sizes(one, pictures)
                length, supervised = data.measure(part, one)
                if data.reader and data.max_length and length > data.max_length:
                    raise DataError(
                        f"sample {one.id!r} has {length} tokens, rows hold {data.max_length}; raise data.max_length "
                        "or set data.overlong=drop"
                    )
                found.lengths.append(length)
                found.supervised += supervised
            except VilaError as error:
                found.fault_count += 1
                if len(found.faults) < max_shown:
                    found.faults.append(str(error))
            events.advanced(name)
    return found


def _new_sizes(sample: Sample, known: set[Image]) -> list[tuple[int, int]]:
    """Sizes of the pictures that were not seen before. Raises VilaError naming sample and picture."""
    from vila.media.image import open_image

    sizes = []
    for item in sample.media:
        if isinstance(item, Image) and item not in known:
            known.add(item)
            try:
                sizes.append(open_image(item).size)
            except VilaError as error:
                raise MediaError(f"sample {sample.id!r}: {error}") from error
    return sizes


def spread(values: Sequence[int]) -> list[int]:
    """Smallest, median and largest; nothing of nothing."""
    return [min(values), median_low(values), max(values)] if values else []


def histogram(lengths: Sequence[int]) -> dict[str, int]:
    """How many lengths are at most each bound and over the bound before; bounds double from 32.

    >>> histogram([10, 40, 64, 9000])
    {'32': 1, '64': 2, 'more': 1}
    """
    counts = Counter(next((str(bound) for bound in _BINS if length <= bound), "more") for length in lengths)
    return {name: counts[name] for name in (*map(str, _BINS), "more") if counts[name]}
