"""`vila data check`: reads every sample of some data sets once, in memory that does not grow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.cli.data_sets import DataSets
from vila.core.errors import DataError, MediaError, VilaError
from vila.core.progress import SILENT, Events, task
from vila.core.types import Image, MediaRef, Sample, Video
from vila.data.stats import NameSet, histogram, min_median_max
from vila.prepare.licences import licences_of

if TYPE_CHECKING:
    from vila.core.types import Sample
    from vila.data.mixture import MixtureDataset
    from vila.data.preview import ImagePreview, LengthPreview
    from vila.data.stats import DatasetStats
    from vila.prepare.licences import DataLicence


@dataclass
class Findings:
    """Content of one data set. Names and messages are kept up to a limit, numbers count all.

    lengths:          of the samples without a fault, in `DataSets.unit`, counted by value.
    supervised:       sum of their supervised parts.
    widths, heights:  of the distinct images that can be read, in pixels, counted by value.
    fault_count:      samples with a fault; `faults`: the first messages.
    images, clips:    distinct ones, readable or not.
    missing_count:    distinct image and video files that do not exist; `missing`: the first ones.
    duplicate_count:  ids that occur more than once; `duplicates`: the first ones.
    unread:           records by the name of a key, column or member that holds media which no sample has.
    preview:          what the tower sees of the images; None without a model.
    rows:             samples that are longer than the recipe's rows; None without recipe and model.
    """

    name: str
    samples: int = 0
    images: int = 0
    clips: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    supervised: int = 0
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0
    missing: list[str] = field(default_factory=list)
    missing_count: int = 0
    duplicates: list[str] = field(default_factory=list)
    duplicate_count: int = 0
    unread: Mapping[str, int] = field(default_factory=dict)
    preview: ImagePreview | None = None
    rows: LengthPreview | None = None

    @property
    def supervised_share(self) -> float:
        """0..1 of the lengths."""
        return self.supervised / (sum(length * count for length, count in self.lengths.items()) or 1)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "samples": self.samples,
            "faults": self.fault_count,
            "first_faults": self.faults,
            "duplicate_ids": self.duplicate_count,
            "first_duplicate_ids": self.duplicates,
            "images": self.images,
            "clips": self.clips,
            "missing_files": self.missing_count,
            "first_missing_files": self.missing,
            "width": min_median_max(self.widths),
            "height": min_median_max(self.heights),
            "length": min_median_max(self.lengths),
            "histogram": histogram(self.lengths),
            "supervised_share": round(self.supervised_share, 4),
            "unread_media": dict(self.unread),
            "tower": self.preview.as_json() if self.preview else None,
            "rows": self.rows.as_json() if self.rows else None,
        }


def check_data(data: DataSets, *, sample: int, max_shown: int, events: Events = SILENT) -> list[Findings]:
    """Check each data set: all of its samples, or a fixed `sample` of them (0: all).

    Every distinct image is decoded, and the first frame of every video. A fault is a record that cannot become a
    sample, a sample that does not fit its template or the recipe's rows, or a medium that is missing or cannot be read.
    max_shown: messages, missing files and ids that are kept of each data set.
    """
    return [_Check(data, part, max_shown).run(sample, events) for part in data.mixture.datasets]


class _Check:
    """One data set being checked."""

    def __init__(self, data: DataSets, part: MixtureDataset, max_shown: int) -> None:
        self.data, self.part, self.max_shown = data, part, max_shown
        self.found = Findings(part.name, preview=data.image_preview(part), rows=data.length_preview())
        self._ids, self._repeated, self._media, self._bad = NameSet(), NameSet(), NameSet(), NameSet()

    def run(self, sample: int, events: Events) -> Findings:
        from vila.data.dataset import Subset

        source = Subset(self.part.source, sample) if sample else self.part.source
        name = f"check {self.part.name}"
        with task(events, name, len(source), "samples"):
            for index in range(len(source)):
                self.found.samples += 1
                try:
                    self._sample(source[index])
                except VilaError as error:
                    self.found.fault_count += 1
                    self._keep(self.found.faults, str(error))
                events.advanced(name)
        self.found.unread = dict(self.part.source.unread)
        return self.found

    def _sample(self, sample: Sample) -> None:
        if not self._ids.add(sample.id) and self._repeated.add(sample.id):
            self.found.duplicate_count += 1
            self._keep(self.found.duplicates, sample.id)
        problems = [problem for item in sample.media if (problem := self._medium(item))]
        if problems:
            raise MediaError("; ".join(problems), record=f"sample {sample.id!r}")
        length, supervised = self.data.measure(self.part, sample)
        self._row(sample, length)
        self.found.lengths[length] += 1
        self.found.supervised += supervised

    def _row(self, sample: Sample, length: int) -> None:
        """Count a sample that is longer than a row. Raises DataError if the recipe does not allow it."""
        rows = self.found.rows
        if rows is None:
            return
        kept = None
        if length > rows.max_length and rows.overlong != "error":
            kept = self.data.shortened(self.part, sample, rows.max_length) if rows.overlong == "truncate" else 0
        rows.add(length, kept)
        if length > rows.max_length and rows.overlong == "error":
            raise DataError(
                f"{length} tokens, rows hold {rows.max_length}",
                record=f"sample {sample.id!r}",
                field="data.max_length",
                hint=f"raise data.max_length (from {rows.origin or 'the default'}) or set data.overlong=drop",
            )

    def _medium(self, item: Image | Video) -> str:
        """Return why an image or video cannot be read. A good one is opened once; a bad one counts for every sample."""
        place = _place(item)
        is_new = self._media.add(place)
        if not is_new and place not in self._bad:
            return ""
        self.found.images += is_new and isinstance(item, Image)
        self.found.clips += is_new and isinstance(item, Video)
        try:
            width, height = _opened_size(item)
        except VilaError as error:
            if self._bad.add(place) and isinstance(item.source, Path) and not item.source.exists():
                self.found.missing_count += 1
                self._keep(self.found.missing, place)
            return str(error)
        if isinstance(item, Image):
            self.found.widths[width] += 1
            self.found.heights[height] += 1
            if self.found.preview:
                self.found.preview.add(width, height)
        return ""

    def _keep(self, shown: list[str], text: str) -> None:
        if len(shown) < self.max_shown:
            shown.append(text)


def _opened_size(item: Image | Video) -> tuple[int, int]:
    """Return width and height of an image, which is decoded, or of a video, whose first frame is."""
    from vila.media.image import open_image
    from vila.media.video import open_frames

    return open_image(item).size if isinstance(item, Image) else open_frames(item, 1)[0].size


def _place(item: Image | Video) -> str:
    """Return the identity of a medium of a data file: its path, or its place in a larger file."""
    source = item.source
    if isinstance(source, (str, Path)):
        return str(source)
    return source.name if isinstance(source, MediaRef) else Image(source).key()


# --- data_stats
# `vila data stats`: how much each data set brings to an epoch, and under which licence it is.


@dataclass(frozen=True, slots=True)
class Stats:
    """One data set in one epoch.

    exact:      whether tokens and images were counted in all of it, not estimated from `share.num_measured` samples.
    has_tokens: whether a tokenizer counted; else `share.tokens` and `share.token_share` mean nothing, and a clip counts
                as one image, as only a model says how many frames it takes.
    licences:   what is known of where it is from; nothing for data of your own.
    """

    share: DatasetStats
    path: Path
    exact: bool
    has_tokens: bool
    licences: tuple[DataLicence, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data, null for what was not counted."""
        return {
            "name": self.share.name,
            "path": str(self.path),
            "samples": self.share.samples,
            "images": self.share.images,
            "tokens": self.share.tokens if self.has_tokens else None,
            "token_share": round(self.share.token_share, 4) if self.has_tokens else None,
            "exact": self.exact,
            "surveyed": self.share.num_measured,
            "licences": [
                {"name": one.name, "licence": one.licence, "forbids": one.forbids, "source": one.source}
                | {"checked": one.checked}
                for one in self.licences
            ],
        }


def stats_of(data: DataSets, sample: int) -> list[Stats]:
    """The statistics of each data set, from at most `sample` samples of it (0: all).

    The numbers are those that training tells before its first step. No picture is opened.
    """
    from vila.data.stats import dataset_stats

    largest = max(len(part.source) for part in data.mixture.datasets)
    shares = dataset_stats(data.mixture, data.tokenize if data.reader else None, sample or largest)
    return [
        Stats(
            share,
            path,
            # A share of a data set is another one in every epoch, so its pictures are not the same number.
            exact=share.num_measured == len(part.source) and share.samples % (len(part.source) or 1) == 0,
            has_tokens=data.reader is not None,
            licences=licences_of(path),
        )
        for share, part, path in zip(shares, data.mixture.datasets, data.paths, strict=True)
    ]
