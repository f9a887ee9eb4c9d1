"""Everything that pixels and sequence lengths depend on, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

ImageMode = Literal["pad", "resize", "square"]
IMAGE_MODES: tuple[ImageMode, ...] = ("pad", "resize", "square")


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """How a picture becomes a tensor, and how many tokens it then takes.

    image_size:       side of the square tensor, in pixels.
    tokens_per_image: slots that one picture occupies in the sequence.
    mean, std:        per-channel statistics on the 0..1 scale, RGB.
    image_mode:       `pad` to a square with the mean colour, `resize` ignoring the aspect, or `square` centre crop.
    """

    image_size: int
    tokens_per_image: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_mode: ImageMode = "pad"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return asdict(self)
