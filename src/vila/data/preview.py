"""Preview of data before training: how images are resized for the vision tower, and which samples are too long."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
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
from vila.data.stats import min_median_max
from vila.media.image import open_image
from vila.media.transform import square_bytes

MIN_TEXT_PX: Final = 8
"""Height in pixels, after resizing, below which text counts as unreadable: that of the smallest bitmap fonts. A rule of
thumb for messages."""
_MAX_LOSS = 0.25
_MAX_ASPECT = 1.5
_MIN_FILLED = 0.5
_EFFECTS = {
    "square": "lose more than a quarter of their area in the center crop",
    "resize": "are stretched to more than 1.5 times their aspect ratio",
    "pad": "fill less than half of the padded square",
}


@dataclass
class ImagePreview:
    """Effect of resizing the images of a data set to `image_size` pixels. Memory does not grow with their number.

    image_mode: `square` is a center crop here; a tower without center crop has `resize`.
    changed:    number of images with a strong change: more than a quarter is cropped, the aspect ratio changes by more
                than 1.5, or padding fills more than half of the square.
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
        """Return an empty preview for a model. image_mode: that of the data set, None for that of the model."""
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
        """Mean width and height in pixels."""
        count = self.count or 1
        return round(self.width / count), round(self.height / count)

    @property
    def reduction(self) -> float:
        """Median factor by which a side is reduced; below 1 images are enlarged."""
        return min_median_max(self._reductions)[1] if self.count else 1.0

    @property
    def min_text_px(self) -> int:
        """Height of the smallest readable text, in pixels of a typical original image."""
        return ceil(MIN_TEXT_PX * self.reduction)

    def lines(self) -> list[str]:
        """Return the preview as sentences, none without images."""
        if not self.count:
            return []
        width, height = self.mean_size
        side = self.image_size
        text = f"images are {width} x {height} pixels on average, resized to {side} x {side} for the vision tower"
        if self.reduction > 1:
            text += (
                f" (1/{self.reduction:.3g} of the side); text lower than about {self.min_text_px} pixels becomes "
                f"unreadable, and at most {max(1, side // MIN_TEXT_PX)} lines of text stay readable"
            )
        lines = [text]
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
    """Number of samples longer than `data.max_length`, and tokens that are lost by dropping or cutting them.

    overlong:    `data.overlong` of the recipe.
    origin:      recipe that sets `max_length`, or "the command line"; empty for the default.
    longer:      samples of more than `max_length` tokens; longest: tokens of the longest sample.
    left_out:    dropped samples. lost_tokens: tokens of dropped samples, and those cut off.
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
        """Count a sample of `length` tokens. kept: tokens that remain of an overlong one, 0 if it is dropped."""
        self.count += 1
        self.longest = max(self.longest, length)
        if length <= self.max_length:
            return
        self.longer += 1
        if kept is not None:
            self.left_out += not kept
            self.lost_tokens += length - kept

    def lines(self) -> list[str]:
        """Return the preview as sentences, none if every sample fits."""
        if not self.longer:
            return []
        text = (
            f"{self.longer:,} of {self.count:,} samples are longer than data.max_length={self.max_length} tokens "
            f"(from {self.origin or 'the default'}; the longest has {self.longest:,})"
        )
        if self.overlong == "error":
            return [f"{text}, which is an error in training; raise data.max_length, or set data.overlong"]
        lost = f": {self.left_out:,} dropped, {self.lost_tokens:,} tokens lost" if self.lost_tokens else ""
        action = {"drop": "dropped", "truncate": "cut after an answer, or dropped"}[self.overlong]
        return [f"{text} and are {action} (data.overlong={self.overlong}){lost}"]

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def preview_images(dataset: MixtureDataset, spec: VisionSpec, sample: int) -> ImagePreview:
    """Preview the images of at most `sample` samples of a data set, always the same ones.

    Videos and unreadable images are left out.
    """
    found = ImagePreview.of(spec, dataset.image_mode)
    subset = Subset(dataset.source, sample)
    for index in range(len(subset)):
        try:
            for item in subset[index].media:
                if isinstance(item, Image):
                    found.add(*open_image(item).size)
        except VilaError:
            continue
    return found


def save_views(images: Iterable[Image], spec: VisionSpec, folder: Path, start: int = 0) -> list[Path]:
    """Write images as PNG files of `spec.image_size` pixels a side, as the vision tower gets them; return their paths.

    start: number of the first file. Raises MediaError for an unreadable image.
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


def first_images(dataset: MixtureDataset, count: int) -> list[Image]:
    """Return up to `count` different readable images of a data set, from samples that are spread over it."""
    found: dict[Image, None] = {}
    subset = Subset(dataset.source, 4 * count)
    for index in range(len(subset)):
        if len(found) >= count:
            break
        try:
            item = next((item for item in subset[index].media if isinstance(item, Image)), None)
            if item is not None and item not in found:
                open_image(item)
                found[item] = None
        except VilaError:
            continue
    return list(found)


def _short(name: str) -> str:
    """Return a file name made of the last path component of an image's name."""
    words: Sequence[str] = re.split(r"[/\\]", name)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", words[-1].rpartition(".")[0] or words[-1])[-60:] or "image"
