"""Reading of training samples: open data sets, split them, tokenize samples, cut long ones, decode images.

`SampleReader` is picklable, for worker processes.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vila.chat.content import expand_sample_videos
from vila.chat.templates import find_template
from vila.chat.tokenize import SpanTokenizer, TokenizedSample, tokenize_sample
from vila.core.errors import MediaError, VilaError
from vila.core.progress import SILENT, Events
from vila.core.types import Image, MediaRef, Sample, Video
from vila.core.vision_spec import ImageMode, VisionSpec
from vila.data.bad_samples import RecordLocation
from vila.data.formats.base import FORMATS
from vila.data.mixture import Mixture, MixtureDataset, Permutation, Source
from vila.data.packing import Pixels
from vila.media.image import open_image
from vila.media.limits import DEFAULT_LIMITS
from vila.media.transform import Bytes, normalise, shrinker, square_bytes
from vila.media.video import open_frames

if TYPE_CHECKING:
    from vila.config.schema import Recipe

_BLOCK = 1000


class _View:
    """Samples of a source under other indices, in O(1) memory. Subclasses define `__len__` and `locate`."""

    source: Source

    def __len__(self) -> int:
        raise NotImplementedError

    def locate(self, index: int) -> int:
        """Return the index in the source. Raises IndexError outside the view."""
        raise NotImplementedError

    @property
    def files(self) -> list[Path]:
        """Files of the whole source."""
        return self.source.files

    @property
    def unread(self) -> Mapping[str, int]:
        """Unread media of the whole source."""
        return self.source.unread

    def __getitem__(self, index: int) -> Sample:
        """Read sample number `index`."""
        return self.source[self.locate(index)]

    def location(self, index: int) -> RecordLocation:
        """Return file and record of sample number `index`."""
        return self.source.location(self.locate(index))


@dataclass(frozen=True)
class Split(_View):
    """The validation split of a source (`val`), or its training split.

    In every block of 1000 consecutive samples a keyed permutation chooses the validation samples. The split of an index
    depends on the index and the fraction alone: samples that are appended later move no other sample.
    """

    source: Source
    val_fraction: float
    val: bool

    def __len__(self) -> int:
        return self._before(len(self.source) // _BLOCK) + len(self._last())

    def locate(self, index: int) -> int:
        """Return the index in the source. Raises IndexError outside the split."""
        blocks = len(self.source) // _BLOCK
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a split of {len(self)}")
        if index >= self._before(blocks):
            return blocks * _BLOCK + self._last()[index - self._before(blocks)]
        block = bisect_right(range(blocks), index, key=self._before) - 1
        offset = index - self._before(block)
        return block * _BLOCK + _block_order(block)[offset if self.val else self._val_in(block) + offset]

    def _val_before(self, block: int) -> int:
        return floor(block * _BLOCK * self.val_fraction)

    def _val_in(self, block: int) -> int:
        return self._val_before(block + 1) - self._val_before(block)

    def _before(self, block: int) -> int:
        """Return the number of samples of the split in all blocks before `block`."""
        return self._val_before(block) if self.val else block * _BLOCK - self._val_before(block)

    def _last(self) -> list[int]:
        """Return the offsets of the samples of the split inside the incomplete last block."""
        block, size = divmod(len(self.source), _BLOCK)
        order, val = _block_order(block), self._val_in(block)
        return sorted(offset for offset in (order[:val] if self.val else order[val:]) if offset < size)


@lru_cache(maxsize=64)
def _block_order(block: int) -> list[int]:
    order = Permutation(_BLOCK, 0, block)
    return [order[offset] for offset in range(_BLOCK)]


class Subset(_View):
    """`size` pseudo-random samples of a source, the same ones for every seed of a run."""

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, min(size, len(source))
        self._order = Permutation(len(source), 0, 0)

    def __len__(self) -> int:
        return self.size

    def locate(self, index: int) -> int:
        """Return the index in the source. Raises IndexError outside the subset."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside a subset of {self.size}")
        return self._order[index]


def shorten_sample(
    sample: Sample, tokenize: Callable[[Sample], TokenizedSample], max_length: int
) -> TokenizedSample | None:
    """Cut a sample to at most `max_length` tokens: whole turns from the end, or whole branches; images are never cut.

    Returns the longest beginning that ends with an answer of the assistant. Branches are removed from the end, and the
    prefix that they share stays whole. Returns None if not even the first answer, or the first branch, fits.
    """
    shorter = _beginnings(sample)
    low, high = 0, len(shorter)
    best: TokenizedSample | None = None
    # Longer beginnings have more tokens, so bisection tokenizes a few of them instead of all.
    while low < high:
        middle = (low + high) // 2
        tokens = tokenize(shorter[middle])
        if len(tokens) <= max_length:
            best, low = tokens, middle + 1
        else:
            high = middle
    return best


def _beginnings(sample: Sample) -> list[Sample]:
    """Return the proper beginnings of a sample, the shortest first."""
    if sample.branches:
        return [replace(sample, branches=sample.branches[:count]) for count in range(1, len(sample.branches))]
    ends = [number for number, message in enumerate(sample.messages, start=1) if message.role == "assistant"]
    return [replace(sample, messages=sample.messages[:end]) for end in ends if end < len(sample.messages)]


@dataclass(frozen=True, slots=True)
class VideoFrame:
    """Frame `number` (from 0) of the `count` frames that are sampled from a video; see `media.video.frame_indices`.

    A reference: the number of frames is known without opening the video.
    """

    source: Path | str | bytes | MediaRef
    number: int
    count: int

    @property
    def name(self) -> str:
        """Name of the video and number of the frame, from 1."""
        return f"{Image(self.source).name} frame {self.number + 1} of {self.count}"

    def read(self) -> bytes:
        """Return the frame as PNG. Raises MediaError naming the video.

        The frames of the last video are cached, so reading them in succession decodes it once. `open_squares` does not
        use this cache.
        """
        stream = io.BytesIO()
        _cached_frames(Video(self.source), self.count)[self.number].save(stream, "PNG", compress_level=1)
        return stream.getvalue()


_cached_frames = lru_cache(maxsize=1)(open_frames)


def video_frames(video: Video, default: int) -> list[Image]:
    """Return references to the sampled frames of a video; `default` of them unless the video has its own number.

    Raises MediaError naming the video if the number is below 1 or above `MediaLimits.num_frames`.
    """
    count, most = default if video.num_frames is None else video.num_frames, DEFAULT_LIMITS.num_frames
    if not 1 <= count <= most:
        raise MediaError(file=Image(video.source).name, field="num_frames", value=count, expected=f"1 to {most}")
    return [Image(VideoFrame(video.source, number, count)) for number in range(count)]


def open_squares(images: Iterable[Image], spec: VisionSpec) -> Iterator[Bytes]:
    """Decode images and make them square at the size of the vision tower, uint8 [3, S, S] each, in order.

    A video is decoded once for its consecutive frames, and each frame is resized as soon as it is decoded, so whole
    frames do not accumulate. Raises MediaError naming image or video.
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


@dataclass(frozen=True, slots=True)
class DatasetEntry:
    """An entry of `data.mixture` in a recipe, with the same fields."""

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


def open_mixture(entries: Iterable[DatasetEntry], seed: int, events: Events = SILENT) -> Mixture:
    """Open the mixture of a recipe. A data set is named after its file; further ones of that name get `#2`, `#3`, ...

    events: receives the progress of indexing.
    """
    datasets: list[MixtureDataset] = []
    for entry in entries:
        if entry.template:
            find_template(entry.template)
        name = Path(entry.path).stem
        same = sum(dataset.name.split("#")[0] == name for dataset in datasets)
        datasets.append(
            MixtureDataset(
                name=f"{name}#{same + 1}" if same else name,
                source=open_dataset(entry, events),
                repeat=entry.repeat,
                weight=entry.weight,
                template=entry.template,
                image_mode=entry.image_mode,
            )
        )
    return Mixture(datasets, seed)


def build_mixture(recipe: Recipe, events: Events = SILENT) -> Mixture:
    """Open the data sets of a recipe; `events` receives the progress of indexing."""
    return open_mixture([DatasetEntry(**entry.model_dump()) for entry in recipe.data.mixture], recipe.seed, events)


def open_dataset(entry: DatasetEntry, events: Events = SILENT) -> Source:
    """Open one data set: its training or validation split, and `max_samples` of that.

    Raises DataError for files that cannot be read or have another format, ConfigError for wrong options.
    """
    file = Path(entry.path)
    root = Path(entry.image_root) if entry.image_root else (file if file.is_dir() else file.parent)
    records = FORMATS[entry.format].open(file, root, events, **entry.options)
    records.check_format(entry.format)
    source: Source = records
    if entry.val_fraction:
        source = Split(source, entry.val_fraction, entry.split == "val")
    return source if entry.max_samples is None else Subset(source, entry.max_samples)


@dataclass(frozen=True)
class SampleReader:
    """Read, tokenize and decode the samples of a mixture by global position.

    The template of a sample overrides that of its data set, which overrides `template`, that of the stage.
    All methods raise VilaErrors that name file and record, or data set and sample.
    """

    mixture: Mixture
    template: str
    tokenizer: SpanTokenizer
    spec: VisionSpec

    def __call__(self, position: int) -> TokenizedSample:
        """Read and tokenize the sample at a global position."""
        return self.tokenize(*self._read(position))

    def tokenize(self, dataset: MixtureDataset, sample: Sample) -> TokenizedSample:
        """Tokenize a sample of a data set. Videos become their frames; no image or video is opened."""
        template, spec = find_template(sample.template or dataset.template or self.template), self.spec
        try:
            expanded = expand_sample_videos(
                sample, template.media_gap, lambda video: video_frames(video, spec.num_video_frames)
            )
            return tokenize_sample(
                expanded, template, self.tokenizer, lambda image: spec.tokens_per_image, dataset.name
            )
        except VilaError as error:
            _add_sample(error, dataset, sample)
            raise

    def shorten(self, position: int, max_length: int) -> TokenizedSample | None:
        """Read the sample at a global position and cut it; see `shorten_sample`."""
        dataset, sample = self._read(position)
        return shorten_sample(sample, lambda shorter: self.tokenize(dataset, shorter), max_length)

    def pixels(self, position: int, sample: TokenizedSample) -> list[Pixels]:
        """Return the preprocessed images of the sample at `position`, float32 [3, S, S] each."""
        return [normalise(square, self.spec) for square in self.squares(position, sample)]

    def squares(self, position: int, sample: TokenizedSample) -> list[Bytes]:
        """Return the images of the sample at `position` before normalisation, uint8 [3, S, S] each.

        They are made square with the image mode of the data set. A video is decoded once.
        """
        dataset = self.mixture.datasets[self.mixture.locate(position)[0]]
        try:
            images = (item for item in sample.media if isinstance(item, Image))
            return list(open_squares(images, dataset.vision_spec(self.spec)))
        except VilaError as error:
            _add_sample(error, dataset, sample)
            raise

    def _read(self, position: int) -> tuple[MixtureDataset, Sample]:
        try:
            return self.mixture[position]
        except VilaError as error:
            if error.file is None and error.record is None:
                error.record = self.mixture.describe(position)
            raise


def _add_sample(error: VilaError, dataset: MixtureDataset, sample: Sample | TokenizedSample) -> None:
    """Add data set and sample to an error that does not name a record of a file."""
    if error.file is None or error.record is None:
        error.record = f"data set {dataset.name!r}, sample {sample.id!r}"


def mixture_images(mixture: Mixture, num_video_frames: int) -> list[Image]:
    """Return every distinct image of the mixture in the order of its data sets; videos are replaced by their frames."""
    images: dict[Image, None] = {}
    for dataset in mixture.datasets:
        for index in range(len(dataset.source)):
            for item in dataset.source[index].media:
                images |= dict.fromkeys(video_frames(item, num_video_frames) if isinstance(item, Video) else [item])
    return list(images)
