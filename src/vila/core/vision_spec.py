"""Image preprocessing parameters of a model: size, normalisation, crop mode and tokens per image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, cast

from vila.core.errors import MISSING
from vila.core.reading import Fields

ImageMode = Literal["pad", "resize", "square"]
IMAGE_MODES: tuple[ImageMode, ...] = ("pad", "resize", "square")
MAX_SIDE: Final = 2**14
"""Largest `image_size`, in pixels."""
MAX_VIDEO_FRAMES: Final = 4096
"""Largest `num_video_frames` of a checkpoint."""


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """Parameters of image preprocessing, stored in the config of the model.

    image_size:       side of the square input of the vision tower, in pixels.
    tokens_per_image: image placeholders per image in the token sequence.
    mean, std:        normalisation per RGB channel, for pixel values in 0..1.
    image_mode:       `pad`: pad to a square with the mean colour; `resize`: resize to a square, ignoring the aspect
                      ratio; `square`: as the tower's own image processor (centre crop, or resize if not `center_crop`).
    num_video_frames: default number of frames sampled from a video; each frame is an image.
    exif_orientation: whether to apply the EXIF orientation; see docs/images.md.
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
        """Inverse of `to_dict`; accepts lists in place of tuples, as JSON has them."""
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in facts.items()}
        return VisionSpec(**plain)

    @staticmethod
    def from_fields(facts: Fields) -> VisionSpec:
        """Read the spec of a config file. Raises the error class of `facts` for unknown keys and invalid values."""
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
        """Return plain data for config.json.

        `exif_orientation` is written only if false: files from before the field existed stay byte-identical.
        """
        facts = asdict(self)
        if self.exif_orientation:
            del facts["exif_orientation"]
        return facts


def channel_statistics(facts: Fields, key: str, default: Any = MISSING) -> tuple[float, float, float]:
    """Read the mean or standard deviation of the RGB channels; a standard deviation must be positive."""
    least = 1e-6 if key.endswith("std") else 0.0
    red, green, blue = facts.numbers(key, default, length=3, minimum=least, maximum=10.0)
    return red, green, blue
