"""Everything that pixels and sequence lengths depend on, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, cast

from vila.core.errors import MISSING
from vila.core.reading import Fields

ImageMode = Literal["pad", "resize", "square"]
IMAGE_MODES: tuple[ImageMode, ...] = ("pad", "resize", "square")
MAX_SIDE: Final = 2**14
"""Largest side of the square image that a tower reads, in pixels."""
MAX_VIDEO_FRAMES: Final = 4096
"""Most frames that a checkpoint may take from a video by default."""


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

    @staticmethod
    def from_fields(facts: Fields) -> VisionSpec:
        """Read the spec of a config file. Raises the error of `facts` for unknown keys and values out of range."""
        known = [field.name for field in fields(VisionSpec)]
        for key in facts:
            if key not in known:
                raise facts.refusal(key, "unknown key", expected=", ".join(known))
        return VisionSpec(
            image_size=facts.integer("image_size", minimum=1, maximum=MAX_SIDE),
            tokens_per_image=facts.integer("tokens_per_image", minimum=1),
            mean=channel_statistics(facts, "mean"),
            std=channel_statistics(facts, "std"),
            image_mode=cast(ImageMode, facts.text("image_mode", "pad", choices=IMAGE_MODES)),
            center_crop=facts.flag("center_crop", True),
            num_video_frames=facts.integer("num_video_frames", 8, minimum=1, maximum=MAX_VIDEO_FRAMES),
            exif_orientation=facts.flag("exif_orientation", True),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json. `exif_orientation` is written only where it differs from its default, so that
        files stay as they were before the field existed."""
        facts = asdict(self)
        if self.exif_orientation:
            del facts["exif_orientation"]
        return facts


def channel_statistics(facts: Fields, key: str, default: Any = MISSING) -> tuple[float, float, float]:
    """Read mean or standard deviation of the three channels; the latter must not be 0."""
    least = 1e-6 if key.endswith("std") else 0.0
    red, green, blue = facts.numbers(key, default, length=3, minimum=least, maximum=10.0)
    return red, green, blue
