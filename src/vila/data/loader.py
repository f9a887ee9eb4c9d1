"""From a mixture to tokenised samples and pixels: open, fetch, render, tokenise, decode. Picklable, for workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vila.chat.clips import expand_sample
from vila.chat.templates import find_template
from vila.chat.tokenize import SpanTokenizer, TokenizedSample, tokenize_sample
from vila.core.errors import MediaError, VilaError
from vila.core.events import SILENT, Events
from vila.core.types import Image, Sample, Video
from vila.core.vision_spec import ImageMode, VisionSpec
from vila.data.clips import frames_of, open_squares
from vila.data.compact import CompactSample
from vila.data.formats.protocol import FORMATS
from vila.data.formats.source import RecordSource
from vila.data.mixture import Mixture, Part, Source
from vila.data.pack import Pixels
from vila.data.shorten import shorten_sample
from vila.data.view import Split, Subset
from vila.media.transform import Bytes, normalise


@dataclass(frozen=True, slots=True)
class Entry:
    """A data set of a mixture as a recipe states it; the fields are those of `data.mixture`."""

    format: str
    path: str
    image_root: str = ""
    repeat: float = 1.0
    weight: float | None = None
    max_samples: int | None = None
    split: Literal["train", "val"] = "train"
    val_fraction: float = 0.0
    template: str = ""
    image_mode: ImageMode | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def open_mixture(entries: Iterable[Entry], seed: int, events: Events = SILENT) -> Mixture:
    """The mixture of a recipe's entries. A data set is called after its file; a second one of that name gets `#2`.

    events: told how files are indexed.
    """
    parts: list[Part] = []
    for entry in entries:
        if entry.template:
            find_template(entry.template)
        name = Path(entry.path).stem
        same = sum(part.name.split("#")[0] == name for part in parts)
        parts.append(
            Part(
                name=f"{name}#{same + 1}" if same else name,
                source=open_entry(entry, events),
                repeat=entry.repeat,
                weight=entry.weight,
                template=entry.template,
                image_mode=entry.image_mode,
            )
        )
    return Mixture(parts, seed)


def open_entry(entry: Entry, events: Events = SILENT) -> Source:
    """Open one data set: first its training or validation share, then `max_samples` of that.

    Raises DataError for files that cannot be read or are in another format, ConfigError for wrong options.
    """
    file = Path(entry.path)
    root = Path(entry.image_root) if entry.image_root else (file if file.is_dir() else file.parent)
    source: Source = FORMATS[entry.format].open(file, root, events, **entry.options)
    if isinstance(source, RecordSource):
        source.check_format(entry.format)
    if entry.val_fraction:
        source = Split(source, entry.val_fraction, entry.split == "val")
    return source if entry.max_samples is None else Subset(source, entry.max_samples)


@dataclass(frozen=True)
class SampleReader:
    """Reads the samples of a mixture. A sample's own template wins over its data set's, that over the stage's.

    All methods raise VilaErrors that name file and record, or data set and sample.
    """

    mixture: Mixture
    template: str
    tokenizer: SpanTokenizer
    spec: VisionSpec

    def __call__(self, position: int) -> TokenizedSample:
        """Tokenise the sample at a global position."""
        part, sample = self._read(position)
        return self.tokenise(part, sample)

    def tokenise(self, part: Part, sample: Sample) -> TokenizedSample:
        """Tokenise a sample of a part under its template; a video is the images of `frames`. No medium is opened."""
        chosen = find_template(sample.template or part.template or self.template)
        try:
            shown = expand_sample(sample, chosen.media_gap, self.frames)
            return tokenize_sample(shown, chosen, self.tokenizer, self.count)
        except VilaError as error:
            _add_sample(error, part, sample)
            raise

    def shorten(self, position: int, max_length: int) -> TokenizedSample | None:
        """Cut the sample at a position to `max_length` tokens at the end of an exchange; None if its first exchange is
        longer already."""
        part, sample = self._read(position)
        return shorten_sample(sample, lambda shorter: self.tokenise(part, shorter), max_length)

    def pixels(self, position: int, sample: CompactSample) -> list[Pixels]:
        """Read the images of the sample at `position` as the tower sees them, float32 [3, S, S] each."""
        return [normalise(square, self.spec) for square in self.squares(position, sample)]

    def squares(self, position: int, sample: CompactSample) -> list[Bytes]:
        """Read the same before normalising, uint8 [3, S, S] each, made square as the data set says.

        The frames of a video are images; a video is decoded once.
        """
        part = self.mixture.parts[self.mixture.locate(position)[0]]
        spec = replace(self.spec, image_mode=part.image_mode) if part.image_mode else self.spec
        try:
            images = [item for item in sample.media if isinstance(item, Image)]
            return list(open_squares(images, spec))
        except VilaError as error:
            _add_sample(error, part, sample)
            raise

    def data_set(self, position: int) -> str:
        """Return the name of the data set that a position belongs to."""
        return self.mixture.parts[self.mixture.locate(position)[0]].name

    def place(self, position: int) -> tuple[str, int]:
        """Return the file and record of the sample at a position; see `FaultLog`."""
        return self.mixture.place(position)

    def count(self, media: Image | Video) -> int:
        """Return the number of image placeholders of an image. Videos have none: they become frames first."""
        if isinstance(media, Video):
            raise MediaError(f"{media.source!r}: a video becomes frames before it is counted; see `frames`")
        return self.spec.tokens_per_image

    def frames(self, video: Video) -> list[Image]:
        """Return the frames of a video, unopened; the model's number of them unless the video has its own."""
        return frames_of(video, self.spec.num_video_frames)

    def _read(self, position: int) -> tuple[Part, Sample]:
        try:
            return self.mixture[position]
        except VilaError as error:
            if error.file is None and error.record is None:
                error.record = self.mixture.describe(position)
            raise


def _add_sample(error: VilaError, part: Part, sample: Sample | CompactSample) -> None:
    """Add data set and sample to an error that names no record of a file."""
    if error.file is None or error.record is None:
        error.record = f"data set {part.name!r}, sample {sample.id!r}"


def images_of(mixture: Mixture, num_video_frames: int) -> list[Image]:
    """Return every distinct image of the mixture, in the order of its data sets; a video is its frames, unopened."""
    seen: dict[Image, None] = {}
    for part in mixture.parts:
        for index in range(len(part.source)):
            for item in part.source[index].media:
                for image in frames_of(item, num_video_frames) if isinstance(item, Video) else [item]:
                    seen.setdefault(image)
    return list(seen)
