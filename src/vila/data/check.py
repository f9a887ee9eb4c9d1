"""Check of training data: reads every sample of some data sets once, with bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.chat.render import render_sample
from vila.chat.templates import find_template
from vila.chat.tokenize import TokenizedSample
from vila.core.errors import ConfigError, DataError, MediaError, VilaError
from vila.core.progress import SILENT, Events, task
from vila.core.types import Image, MediaRef, Sample, Video
from vila.data.dataset import SampleReader, Subset, shorten_sample
from vila.data.mixture import Mixture, MixtureDataset
from vila.data.preview import ImagePreview, LengthPreview, first_images, save_views
from vila.data.stats import NameSet, histogram, min_median_max, require_images
from vila.media.image import open_image
from vila.media.video import open_frames

if TYPE_CHECKING:
    from vila.config.schema import Recipe


@dataclass(frozen=True)
class DataSets:
    """Data sets of a recipe or of one file, and the reader of their samples.

    paths:     file or directory of each data set.
    reader:    None without a model; lengths are then in characters.
    tokenizer: transformers tokenizer of the model, or None.
    recipe:    None for a file.
    length_origin: recipe that sets `data.max_length`; empty for the default.
    """

    mixture: Mixture
    paths: tuple[Path, ...]
    template: str
    reader: SampleReader | None
    tokenizer: Any = None
    recipe: Recipe | None = None
    length_origin: str = ""

    @property
    def unit(self) -> str:
        """Unit of the lengths."""
        return "tokens" if self.reader else "characters"

    @property
    def tokens_per_image(self) -> int:
        """Number of image placeholders per image. Raises ConfigError without a model."""
        return self._reader_or_raise().spec.tokens_per_image

    def image_preview(self, part: MixtureDataset) -> ImagePreview | None:
        """Return an empty image preview of a data set; None if the image size of the vision tower is unknown."""
        if self.reader:
            return ImagePreview.of(self.reader.spec, part.image_mode)
        if self.recipe and not self.recipe.model.path:
            return ImagePreview(self.recipe.model.image_size, part.image_mode or self.recipe.model.image_mode or "pad")
        return None

    def length_preview(self) -> LengthPreview | None:
        """Return an empty length preview; None without a recipe or without a model."""
        if not (self.recipe and self.reader):
            return None
        return LengthPreview(self.recipe.data.max_length, self.recipe.data.overlong, self.length_origin)

    def shortened(self, part: MixtureDataset, sample: Sample, max_length: int) -> int:
        """Return the length of a sample shortened to `max_length` tokens, 0 if it cannot be shortened."""
        kept = shorten_sample(sample, lambda shorter: self.tokenize(part, shorter), max_length)
        return 0 if kept is None else len(kept)

    def save_views(self, folder: Path, count: int) -> list[Path]:
        """Save up to `count` preprocessed images of each data set as PNG. Raises ConfigError without a model."""
        spec = self._reader_or_raise().spec
        paths: list[Path] = []
        for part in self.mixture.datasets:
            paths += save_views(first_images(part, count), part.vision_spec(spec), folder, start=len(paths))
        return paths

    def require_images(self) -> None:
        """Raise ConfigError if the recipe trains only modules that need images and the data has none."""
        if self.recipe and self.recipe.needs_images:
            require_images(self.mixture, self.recipe.needs_images)

    def measure(self, part: MixtureDataset, sample: Sample) -> tuple[int, int]:
        """Return the length of a sample and of its supervised part, in `unit`.

        Raises VilaError for a sample that does not fit its template or has no supervised text.
        """
        if self.reader:
            tokens = self.reader.tokenize(part, sample)
            return len(tokens), int(tokens.is_supervised.sum())
        return _characters(sample, sample.template or part.template or self.template)

    @property
    def tokenize(self) -> Callable[[MixtureDataset, Sample], TokenizedSample]:
        """Function that tokenizes a sample. Raises ConfigError without a model."""
        return self._reader_or_raise().tokenize

    def _reader_or_raise(self) -> SampleReader:
        if self.reader is None:
            raise ConfigError("requires the tokenizer and image size of a model", hint="name one with --model")
        return self.reader


@dataclass
class Findings:
    """Result of the check of one data set. Lists hold the first entries, counts are complete.

    lengths:          histogram of the lengths of valid samples, in `DataSets.unit`.
    supervised:       total length of their supervised parts.
    widths, heights:  histograms of the sizes of distinct readable images, in pixels.
    num_errors:       number of invalid samples; `errors`: the first messages.
    images, videos:   numbers of distinct media, readable or not.
    num_missing:      number of distinct media files that do not exist; `missing`: the first ones.
    num_duplicates:   number of ids that occur more than once; `duplicates`: the first ones.
    unread:           number of records by key, column or archive member with media that the format does not read.
    preview:          images as the vision tower sees them; None without a model.
    rows:             samples longer than `data.max_length`; None without recipe and model.
    """

    name: str
    samples: int = 0
    images: int = 0
    videos: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    supervised: int = 0
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    num_errors: int = 0
    missing: list[str] = field(default_factory=list)
    num_missing: int = 0
    duplicates: list[str] = field(default_factory=list)
    num_duplicates: int = 0
    unread: Mapping[str, int] = field(default_factory=dict)
    preview: ImagePreview | None = None
    rows: LengthPreview | None = None

    @property
    def supervised_share(self) -> float:
        """Supervised fraction of the lengths, 0 to 1."""
        return self.supervised / (sum(length * count for length, count in self.lengths.items()) or 1)

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "name": self.name,
            "samples": self.samples,
            "errors": self.num_errors,
            "first_errors": self.errors,
            "duplicate_ids": self.num_duplicates,
            "first_duplicate_ids": self.duplicates,
            "images": self.images,
            "videos": self.videos,
            "missing_files": self.num_missing,
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
    """Check each data set: all samples, or a fixed subset of `sample` samples (0: all).

    Every distinct image and the first frame of every video are decoded. Errors are invalid records, samples that do
    not fit their template or `data.max_length`, and media that are missing or unreadable.
    max_shown: maximum number of messages, missing files and ids to keep per data set.
    """
    return [_Check(data, part, max_shown).run(sample, events) for part in data.mixture.datasets]


class _Check:
    """Check of one data set."""

    def __init__(self, data: DataSets, part: MixtureDataset, max_shown: int) -> None:
        self.data, self.part, self.max_shown = data, part, max_shown
        self.found = Findings(part.name, preview=data.image_preview(part), rows=data.length_preview())
        self._ids, self._repeated, self._media, self._bad = NameSet(), NameSet(), NameSet(), NameSet()

    def run(self, sample: int, events: Events) -> Findings:
        source = Subset(self.part.source, sample) if sample else self.part.source
        name = f"check {self.part.name}"
        with task(events, name, len(source), "samples"):
            for index in range(len(source)):
                self.found.samples += 1
                try:
                    self._sample(source[index])
                except VilaError as error:
                    self.found.num_errors += 1
                    self._keep(self.found.errors, str(error))
                events.advanced(name)
        self.found.unread = dict(self.part.source.unread)
        return self.found

    def _sample(self, sample: Sample) -> None:
        if not self._ids.add(sample.id) and self._repeated.add(sample.id):
            self.found.num_duplicates += 1
            self._keep(self.found.duplicates, sample.id)
        problems = [problem for item in sample.media if (problem := self._media_error(item))]
        if problems:
            raise MediaError("; ".join(problems), record=f"sample {sample.id!r}")
        length, supervised = self.data.measure(self.part, sample)
        self._check_length(sample, length)
        self.found.lengths[length] += 1
        self.found.supervised += supervised

    def _check_length(self, sample: Sample, length: int) -> None:
        """Count a sample that exceeds `data.max_length`. Raises DataError if the recipe does not allow it."""
        rows = self.found.rows
        if rows is None:
            return
        kept = None
        if length > rows.max_length and rows.overlong != "error":
            kept = self.data.shortened(self.part, sample, rows.max_length) if rows.overlong == "truncate" else 0
        rows.add(length, kept)
        if length > rows.max_length and rows.overlong == "error":
            problem = f"{length} tokens exceed {rows.max_length}"
            hint = f"raise data.max_length (from {rows.origin or 'the default'}) or set data.overlong=drop"
            raise DataError(problem, record=f"sample {sample.id!r}", field="data.max_length", hint=hint)

    def _media_error(self, item: Image | Video) -> str:
        """Return the error of an image or video, or "". Readable media are opened once; errors count per sample."""
        key = _media_key(item)
        is_new = self._media.add(key)
        if not is_new and key not in self._bad:
            return ""
        self.found.images += is_new and isinstance(item, Image)
        self.found.videos += is_new and isinstance(item, Video)
        try:
            width, height = _opened_size(item)
        except VilaError as error:
            if self._bad.add(key) and isinstance(item.source, Path) and not item.source.exists():
                self.found.num_missing += 1
                self._keep(self.found.missing, key)
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
    """Decode an image, or the first frame of a video, and return its width and height."""
    return open_image(item).size if isinstance(item, Image) else open_frames(item, 1)[0].size


def _media_key(item: Image | Video) -> str:
    """Return the identity of an image or video: its path, or its position in a shard."""
    source = item.source
    if isinstance(source, (str, Path)):
        return str(source)
    return source.name if isinstance(source, MediaRef) else Image(source).key()


def _characters(sample: Sample, template: str) -> tuple[int, int]:
    branches = render_sample(sample, find_template(template))
    if not all(any(span.train and span.text for span in branch) for branch in branches):
        raise DataError(f"no supervised text with template {template!r}", record=f"sample {sample.id!r}")
    spans = [span for branch in branches for span in branch]
    return sum(len(span.text) for span in spans), sum(len(span.text) for span in spans if span.train)


def unread_note(unread: Mapping[str, int]) -> str:
    """Return a note on media in the records that the format does not read; empty if there are none."""
    if not unread:
        return ""
    names = ", ".join(f"{name} ({count:,})" for name, count in sorted(unread.items()))
    return f"records have media that the format does not read: {names}"
