"""What a run sees of its data: how images reach the vision tower, and which samples are too long for a row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image as PilImage

from vila.core.errors import VilaError
from vila.core.files import atomic_path
from vila.core.types import Image
from vila.core.vision_spec import ImageMode, VisionSpec
from vila.data.dataset import Subset
from vila.data.mixture import MixtureDataset
from vila.data.packing import Overlong
from vila.media.image import open_image
from vila.media.transform import square_bytes

MIN_TEXT_PX: Final = 8
"""Height of a line of text, in pixels of the tower, that is taken to be readable: that of the smallest bitmap fonts. A
rule of thumb for messages."""
_MAX_LOSS = 0.25
_MAX_ASPECT = 1.5
_MIN_FILLED = 0.5
_EFFECTS = {
    "square": "lose more than a quarter of their area to the center crop",
    "resize": "are stretched to more than 1.5 times their aspect ratio",
    "pad": "fill less than half of the padded square",
}


@dataclass
class ImagePreview:
    """The images of a data set as a tower of `image_size` pixels sees them, in memory that does not grow.

    image_mode: `square` is a center crop here, so a tower whose processor crops nothing has `resize`.
    changed:    images that the mode changes strongly: more than a quarter is cropped, the aspect ratio is stretched by
                more than 1.5, or padding fills more than half of the square.
    """

    image_size: int
    image_mode: ImageMode
    count: int = 0
    width: int = 0
    height: int = 0
    changed: int = 0
    _reductions: Counter[float] = field(default_factory=Counter)

    @staticmethod
    def of(spec: VisionSpec, image_mode: ImageMode | None = None) -> ImagePreview:
        """Return an empty preview for a model. image_mode: that of the data set, if it has its own."""
        mode = image_mode or spec.image_mode
        return ImagePreview(spec.image_size, "resize" if mode == "square" and not spec.center_crop else mode)

    def add(self, width: int, height: int) -> None:
        """Count an image of width x height pixels."""
        self.count += 1
        self.width += width
        self.height += height
        short, long = sorted((width, height))
        edge = short if self.image_mode == "square" else long
        self._reductions[round(edge / self.image_size, 1)] += 1
        if self.image_mode == "square":
            self.changed += short / long < 1 - _MAX_LOSS
        elif self.image_mode == "resize":
            self.changed += long / short > _MAX_ASPECT
        else:
            self.changed += short / long < _MIN_FILLED

    @property
    def mean_size(self) -> tuple[int, int]:
        """Width and height in pixels, on average."""
        count = self.count or 1
        return round(self.width / count), round(self.height / count)

    @property
    def reduction(self) -> float:
        """Median of the factor by which a side shrinks; below 1 images are enlarged."""
        half = (self.count + 1) // 2
        for factor in sorted(self._reductions):
            half -= self._reductions[factor]
            if half <= 0:
                return factor
        return 1.0

    @property
    def min_text_px(self) -> int:
        """Height of the smallest readable text, in pixels of a typical image of the data set."""
        return ceil(MIN_TEXT_PX * self.reduction)

    def lines(self) -> list[str]:
        """Return sentences for the user, none without images."""
        if not self.count:
            return []
        width, height = self.mean_size
        side = self.image_size
        seen = f"images are {width} x {height} pixels on average; the tower sees {side} x {side}"
        if self.reduction > 1:
            rows = max(1, side // MIN_TEXT_PX)
            seen += (
                f" (1/{self.reduction:.3g} of the side), so text lower than about {self.min_text_px} pixels is not "
                f"readable, nor are more than {rows} lines of it"
            )
        lines = [seen]
        if self.changed:
            effect = _EFFECTS[self.image_mode]
            lines.append(f"{self.changed:,} of {self.count:,} images {effect} (image_mode {self.image_mode})")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "image_size": self.image_size,
            "image_mode": self.image_mode,
            "images": self.count,
            "mean_size": list(self.mean_size),
            "reduction": self.reduction,
            "min_text_px": self.min_text_px,
            "strongly_changed": self.changed,
        }


@dataclass
class LengthPreview:
    """Samples that are longer than a row: how many, and what becomes of them.

    overlong:    what the recipe does with them, `data.overlong`.
    origin:      recipe that `max_length` is from, or "the command line"; empty if it is the default.
    longer:      samples of more than `max_length` tokens; longest: tokens of the longest sample of all.
    left_out:    of the longer ones, those that are dropped. lost_tokens: tokens of samples that are dropped or cut.
    """

    max_length: int
    overlong: Overlong
    origin: str = ""
    count: int = 0
    longer: int = 0
    longest: int = 0
    left_out: int = 0
    lost_tokens: int = 0

    def add(self, length: int, kept: int | None = None) -> None:
        """Count a sample of `length` tokens. kept: tokens that are left of a longer one, 0 if it is dropped."""
        self.count += 1
        self.longest = max(self.longest, length)
        if length <= self.max_length:
            return
        self.longer += 1
        if kept is not None:
            self.left_out += not kept
            self.lost_tokens += length - kept

    def lines(self) -> list[str]:
        """Return sentences for the user, none if every sample fits."""
        if not self.longer:
            return []
        text = (
            f"{self.longer:,} of {self.count:,} samples are longer than data.max_length={self.max_length} tokens "
            f"(from {self.origin or 'the default'}; the longest has {self.longest:,})"
        )
        if self.overlong == "error":
            return [f"{text}, which stops a run; raise data.max_length, or set data.overlong"]
        lost = f": {self.left_out:,} left out, {self.lost_tokens:,} tokens lost" if self.lost_tokens else ""
        fate = {"drop": "left out", "truncate": "cut to whole exchanges, or left out"}[self.overlong]
        return [f"{text} and are {fate} (data.overlong={self.overlong}){lost}"]

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def preview_images(part: MixtureDataset, spec: VisionSpec, sample: int) -> ImagePreview:
    """Preview the images of at most `sample` samples of a data set, a fixed choice.

    Videos are left out, and so is what cannot be read.
    """
    found = ImagePreview.of(spec, part.image_mode)
    some = Subset(part.source, sample)
    for index in range(len(some)):
        try:
            for item in some[index].media:
                if isinstance(item, Image):
                    found.add(*open_image(item).size)
        except VilaError:
            continue
    return found


def save_views(images: Iterable[Image], spec: VisionSpec, folder: Path, start: int = 0) -> list[Path]:
    """Write images as the tower sees them, PNG files of `spec.image_size` pixels a side; returns their paths.

    start: number of the first file. Raises MediaError for an image that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, image in enumerate(images, start=start):
        square = square_bytes(open_image(image), spec)
        path = folder / f"{number:03d}_{_short(image.name)}.png"
        with atomic_path(path) as part:
            PilImage.fromarray(np.moveaxis(square, 0, 2)).save(part, "PNG")
        paths.append(path)
    return paths


def first_images(part: MixtureDataset, count: int) -> list[Image]:
    """Return up to `count` different images of a data set that can be opened, from samples that are spread over it."""
    found: dict[Image, None] = {}
    some = Subset(part.source, 4 * count)
    for index in range(len(some)):
        if len(found) >= count:
            break
        try:
            item = next((item for item in some[index].media if isinstance(item, Image)), None)
            if item is not None and item not in found:
                open_image(item)
                found[item] = None
        except VilaError:
            continue
    return list(found)


def views_spec(spec: VisionSpec, part: MixtureDataset) -> VisionSpec:
    """Return the spec that the images of a data set are transformed with."""
    return replace(spec, image_mode=part.image_mode) if part.image_mode else spec


def _short(name: str) -> str:
    """Return a name for a file, of the last path component of an image's name."""
    words: Sequence[str] = re.split(r"[/\\]", name)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", words[-1].rpartition(".")[0] or words[-1])[-60:] or "image"
