"""From a mixture to tokenised samples and pixels: open, fetch, render, tokenise, decode. Picklable, for workers."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from math import floor
from pathlib import Path
from typing import Any, Literal

from vila.chat.content import expand_sample_videos
from vila.chat.templates import find_template
from vila.chat.tokenize import SpanTokenizer, TokenizedSample, tokenize_sample
from vila.core.errors import MediaError, VilaError
from vila.core.progress import SILENT, Events
from vila.core.types import Image, MediaRef, Sample, Video
from vila.core.vision_spec import ImageMode, VisionSpec
from vila.data.bad_samples import RecordLocation
from vila.data.formats.base import FORMATS, RecordSource
from vila.data.mixture import Mixture, MixtureDataset, Permutation, Source
from vila.data.packing import CompactSample, Pixels
from vila.media.image import open_image
from vila.media.limits import DEFAULT_LIMITS
from vila.media.transform import Bytes, normalise, shrinker, square_bytes
from vila.media.video import open_frames

# --- view
# Views of a source: the training or validation share, and a fixed subset. O(1) access, nothing held in memory.


_BLOCK = 1000


@dataclass(frozen=True)
class Split:
    """The validation share of a source, or the rest of it.

    Which share an index belongs to is a function of the index and the fraction alone: in every 1000 consecutive
    samples a keyed permutation chooses the validation ones. So samples that are appended later move none of the
    others, and both shares are found without a table.
    """

    source: Source
    val_fraction: float
    val: bool

    def __len__(self) -> int:
        block, _ = divmod(len(self.source), _BLOCK)
        return self._before(block) + len(self._last())

    @property
    def unread(self) -> Mapping[str, int]:
        """Return the media that the whole source did not read."""
        return self.source.unread

    def __getitem__(self, index: int) -> Sample:
        """Read sample number `index` of the share."""
        return self.source[self.locate(index)]

    def location(self, index: int) -> RecordLocation:
        """Return file and record of sample number `index`."""
        return self.source.location(self.locate(index))

    def locate(self, index: int) -> int:
        """Index in the source. Raises IndexError outside the share."""
        whole = len(self.source) // _BLOCK
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a share of {len(self)}")
        if index >= self._before(whole):
            return whole * _BLOCK + self._last()[index - self._before(whole)]
        low, high = 0, whole - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._before(middle) <= index else (low, middle - 1)
        place = index - self._before(low)
        return low * _BLOCK + _block_order(low)[place if self.val else self._val_in(low) + place]

    def _val_before(self, block: int) -> int:
        return floor(block * _BLOCK * self.val_fraction)

    def _val_in(self, block: int) -> int:
        return self._val_before(block + 1) - self._val_before(block)

    def _before(self, block: int) -> int:
        """Samples of the share in all blocks before `block`."""
        return self._val_before(block) if self.val else block * _BLOCK - self._val_before(block)

    def _last(self) -> list[int]:
        """Places inside the unfinished last block that belong to the share."""
        block, size = divmod(len(self.source), _BLOCK)
        order, val = _block_order(block), self._val_in(block)
        places = range(val) if self.val else range(val, _BLOCK)
        return sorted(order[place] for place in places if order[place] < size)


@lru_cache(maxsize=64)
def _block_order(block: int) -> list[int]:
    order = Permutation(_BLOCK, 0, block)
    return [order[place] for place in range(_BLOCK)]


class Subset:
    """`size` pseudo-random samples of a source, the same ones whatever the seed of the run."""

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, min(size, len(source))
        self._order = Permutation(len(source), 0, 0)

    def __len__(self) -> int:
        return self.size

    @property
    def unread(self) -> Mapping[str, int]:
        """Return the media that the whole source did not read."""
        return self.source.unread

    def __getitem__(self, index: int) -> Sample:
        """Read sample number `index` of the subset."""
        return self.source[self.locate(index)]

    def location(self, index: int) -> RecordLocation:
        """Return file and record of sample number `index`."""
        return self.source.location(self.locate(index))

    def locate(self, index: int) -> int:
        """Index in the source. Raises IndexError outside the subset."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside a subset of {self.size}")
        return self._order[index]


# --- shorten
# Cutting a sample that is too long: whole exchanges from the end, or whole branches. A picture is never cut.


def shorten_sample(
    sample: Sample, tokenise: Callable[[Sample], TokenizedSample], max_length: int
) -> TokenizedSample | None:
    """The longest beginning of a sample that has at most `max_length` tokens and ends with an answer of the assistant.

    Of a sample with branches, branches are left out from the end; what they share stays whole.
    Returns None when not even the first exchange, or the first branch, fits, or when there is no answer to end with.
    """
    shorter = _beginnings(sample)
    low, high = 0, len(shorter)
    best: TokenizedSample | None = None
    # Longer beginnings have more tokens, so bisection tokenises a few of them instead of all.
    while low < high:
        middle = (low + high) // 2
        tokens = tokenise(shorter[middle])
        if len(tokens) <= max_length:
            best, low = tokens, middle + 1
        else:
            high = middle
    return best


def _beginnings(sample: Sample) -> list[Sample]:
    """Proper beginnings, from the shortest."""
    if sample.branches:
        return [replace(sample, branches=sample.branches[:count]) for count in range(1, len(sample.branches))]
    ends = [number for number, message in enumerate(sample.messages, start=1) if message.role == "assistant"]
    return [replace(sample, messages=sample.messages[:end]) for end in ends if end < len(sample.messages)]


# --- clips
# Frames of videos as images that are decoded late: their number is known without opening the video.


@dataclass(frozen=True, slots=True)
class VideoFrame:
    """One of the `count` images that stand for a video, `number` from 0; see `media.video.frame_indices`."""

    source: Path | str | bytes | MediaRef
    number: int
    count: int

    @property
    def name(self) -> str:
        """The video and the number of the image, counted from 1."""
        return f"{_name_of(self.source)} picture {self.number + 1} of {self.count}"

    def read(self) -> bytes:
        """The frame as PNG, which loses nothing. Raises MediaError naming the video.

        The frames of the video read last are kept, so reading them one after the other decodes it once. `open_squares`
        takes the frames themselves and keeps none.
        """
        stream = io.BytesIO()
        _kept_frames(Video(self.source), self.count)[self.number].save(stream, "PNG", compress_level=1)
        return stream.getvalue()


def video_frames(video: Video, default: int) -> list[Image]:
    """The images that stand for a video, unopened; `default` of them unless the video says how many.

    Raises MediaError naming the video when the number is larger than `MediaLimits.num_frames`, or less than one.
    """
    count, most = default if video.num_frames is None else video.num_frames, DEFAULT_LIMITS.num_frames
    if not 1 <= count <= most:
        raise MediaError(file=_name_of(video.source), field="num_frames", value=count, expected=f"1 to {most}")
    return [Image(VideoFrame(video.source, number, count)) for number in range(count)]


def open_squares(images: Iterable[Image], spec: VisionSpec) -> Iterator[Bytes]:
    """Every image made square at the tower's size, uint8 [3, S, S], in order.

    A video is decoded once for the frames of it that stand together, and each frame is made square as soon as it is
    decoded: whole frames do not pile up. Raises MediaError naming image or video.
    """
    for video, group in groupby(images, _video_of):
        if video is None:
            for image in group:
                yield square_bytes(open_image(image, exif_orientation=spec.exif_orientation), spec)
            continue
        frames = open_frames(*video, shrink=shrinker(spec))
        for image in group:
            if isinstance(image.source, VideoFrame):
                yield square_bytes(frames[image.source.number], spec)


def _video_of(image: Image) -> tuple[Video, int] | None:
    return (Video(image.source.source), image.source.count) if isinstance(image.source, VideoFrame) else None


_kept_frames = lru_cache(maxsize=1)(open_frames)


def _name_of(source: Path | str | bytes | MediaRef) -> str:
    return Image(source).name


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
    parts: list[MixtureDataset] = []
    for entry in entries:
        if entry.template:
            find_template(entry.template)
        name = Path(entry.path).stem
        same = sum(part.name.split("#")[0] == name for part in parts)
        parts.append(
            MixtureDataset(
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

    def tokenise(self, part: MixtureDataset, sample: Sample) -> TokenizedSample:
        """Tokenise a sample of a part under its template; a video is the images of `frames`. No medium is opened."""
        chosen = find_template(sample.template or part.template or self.template)
        try:
            shown = expand_sample_videos(sample, chosen.media_gap, self.frames)
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
        part = self.mixture.datasets[self.mixture.locate(position)[0]]
        spec = replace(self.spec, image_mode=part.image_mode) if part.image_mode else self.spec
        try:
            images = [item for item in sample.media if isinstance(item, Image)]
            return list(open_squares(images, spec))
        except VilaError as error:
            _add_sample(error, part, sample)
            raise

    def data_set(self, position: int) -> str:
        """Return the name of the data set that a position belongs to."""
        return self.mixture.datasets[self.mixture.locate(position)[0]].name

    def location(self, position: int) -> RecordLocation:
        """Return the file and record of the sample at a position; see `FaultLog`."""
        return self.mixture.location(position)

    def count(self, media: Image | Video) -> int:
        """Return the number of image placeholders of an image. Videos have none: they become frames first."""
        if isinstance(media, Video):
            raise MediaError(f"{media.source!r}: a video becomes frames before it is counted; see `frames`")
        return self.spec.tokens_per_image

    def frames(self, video: Video) -> list[Image]:
        """Return the frames of a video, unopened; the model's number of them unless the video has its own."""
        return video_frames(video, self.spec.num_video_frames)

    def _read(self, position: int) -> tuple[MixtureDataset, Sample]:
        try:
            return self.mixture[position]
        except VilaError as error:
            if error.file is None and error.record is None:
                error.record = self.mixture.describe(position)
            raise


def _add_sample(error: VilaError, part: MixtureDataset, sample: Sample | CompactSample) -> None:
    """Add data set and sample to an error that names no record of a file."""
    if error.file is None or error.record is None:
        error.record = f"data set {part.name!r}, sample {sample.id!r}"


def mixture_images(mixture: Mixture, num_video_frames: int) -> list[Image]:
    """Return every distinct image of the mixture, in the order of its data sets; a video is its frames, unopened."""
    seen: dict[Image, None] = {}
    for part in mixture.datasets:
        for index in range(len(part.source)):
            for item in part.source[index].media:
                for image in video_frames(item, num_video_frames) if isinstance(item, Video) else [item]:
                    seen.setdefault(image)
    return list(seen)
