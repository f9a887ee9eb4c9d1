"""Format `interleaved`: pages of OBELICS, OmniCorpus and MINT-1T, parallel lists `texts` and `images`.

At each index one of the two lists is null. Images are bytes, names of files below the image root, or objects with
`bytes` or `path`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.types import Part, Sample, Text
from vila.data.formats.base import DatasetFormat, list_at, page_sample
from vila.data.readers.records import Record, image_at


@dataclass(frozen=True, slots=True)
class InterleavedOptions:
    """max_images: keep the first images of a page up to this number, 0 for all. joiner: put between adjacent texts."""

    max_images: int = 0
    joiner: str = "\n\n"


def sample_of(record: Record, root: Path, options: InterleavedOptions) -> Sample:
    """Return the page as one user message. Raises DataError with file, record, field and value."""
    texts, images = list_at(record, "texts", "texts and nulls"), list_at(record, "images", "images and nulls")
    if len(texts) != len(images):
        raise record.error("not as long as 'texts'", field="images", value=len(images), expected=str(len(texts)))
    parts: list[Part] = []
    num_images = 0
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == _is_null(image):
            found = "neither a text nor an image" if text is None else "a text and an image"
            raise record.error(found, field=f"texts[{number}]", expected="one of them, the other null")
        if text is None:
            num_images += 1
            if not options.max_images or num_images <= options.max_images:
                parts.append(image_at(record, ("images", number), root))
        elif not isinstance(text, str):
            raise record.error(field=f"texts[{number}]", value=text, expected="text or null")
        elif parts and isinstance(parts[-1], Text):
            parts[-1] = Text(f"{parts[-1].text}{options.joiner}{text}")
        elif text:
            parts.append(Text(text))
    if not any(isinstance(part, Text) for part in parts):
        raise record.error("the page has no text", field="texts")
    return page_sample(record, tuple(parts))


def _is_null(image: Any) -> bool:
    # Parquet may store a null struct as a struct of nulls.
    return image is None or (isinstance(image, dict) and not any(value is not None for value in image.values()))


FORMAT = DatasetFormat(
    "interleaved",
    "OBELICS, OmniCorpus, MINT-1T: parallel lists `texts` and `images` of a page; parquet or JSON.",
    sample_of,
    InterleavedOptions,
    columns=("id", "texts", "images"),
    media=("images",),
)
