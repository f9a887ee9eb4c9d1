"""Everything that pixels and sequence lengths depend on, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

ImageMode = Literal["pad", "resize", "square"]
IMAGE_MODES: tuple[ImageMode, ...] = ("pad", "resize", "square")


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """How an image becomes a tensor, and the number of tokens that it then takes.

    image_size:       side of the square tensor, in pixels.
    tokens_per_image: image placeholders of one image in the sequence.
    mean, std:        per-channel statistics on the 0..1 scale, RGB.
    image_mode:       `pad` to a square with the mean colour, `resize` ignoring the aspect, or `square`: what the
                      tower's own processor does, which is a centre crop, or with `center_crop` off a resize.
    num_video_frames: frames taken from a video that does not say otherwise; each is an image.
    exif_orientation: turn images upright as their EXIF says; see docs/images.md.
    """

    image_size: int
    tokens_per_image: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_mode: ImageMode = "pad"
    center_crop: bool = True
    num_video_frames: int = 8
    exif_orientation: bool = True

    @staticmethod
    def from_dict(facts: Mapping[str, Any]) -> VisionSpec:
        """Undo `to_dict`, also after JSON has turned tuples into lists."""
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in facts.items()}
        return VisionSpec(**plain)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json. `exif_orientation` is written only where it differs from its default, so that
        files stay as they were before the field existed."""
        facts = asdict(self)
        if self.exif_orientation:
            del facts["exif_orientation"]
        return facts
