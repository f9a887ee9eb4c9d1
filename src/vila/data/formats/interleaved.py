"""Pages as OBELICS, OmniCorpus and MINT-1T hold them: parallel lists `texts` and `images`, null where the other stands.

Images are bytes, names of files below the image root, or objects with `bytes` or `path`. Parquet, JSON lines, a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vila.core.progress import SILENT, Events
from vila.core.types import Message, Part, Sample, Text
from vila.data.formats.base import JSON, RecordSource, id_of, list_at, read_options
from vila.data.readers.records import Record, image_at


@dataclass(frozen=True, slots=True)
class InterleavedOptions:
    """max_images: keep this number of a page, the first ones; 0: all. joiner: written between neighbouring texts."""

    max_images: int = 0
    joiner: str = "\n\n"


class InterleavedFormat:
    """Pages of texts and images."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Give random access to the pages of a file or of all files of a directory. See `InterleavedOptions`."""
        chosen = read_options(InterleavedOptions, options, "interleaved")
        convert = partial(sample_of, root=image_root, options=chosen)
        return RecordSource(
            path,
            convert,
            kinds=(".parquet", *JSON),
            columns=("id", "texts", "images"),
            events=events,
            media=("images",),
        )


def sample_of(record: Record, root: Path, options: InterleavedOptions) -> Sample:
    """Make the page as one message of the user. Raises DataError with file, record, field and value."""
    texts, images = list_at(record, "texts", "texts and nulls"), list_at(record, "images", "images and nulls")
    if len(texts) != len(images):
        raise record.error(f"{len(texts)} texts beside {len(images)} images; the lists are parallel", field="images")
    parts: list[Part] = []
    shown = 0
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (_absent(image)):
            found = "neither a text nor an image" if text is None else "a text and an image"
            raise record.error(
                f"{found} at this place", field=f"texts[{number}]", expected="one of them, the other null"
            )
        if text is None:
            shown += 1
            if not options.max_images or shown <= options.max_images:
                parts.append(image_at(record, ("images", number), root))
        elif not isinstance(text, str):
            raise record.error(field=f"texts[{number}]", value=text, expected="text or null")
        elif parts and isinstance(parts[-1], Text):
            parts[-1] = Text(f"{parts[-1].text}{options.joiner}{text}")
        elif text:
            parts.append(Text(text))
    if not any(isinstance(part, Text) for part in parts):
        raise record.error("the page has no text", field="texts")
    return Sample(id_of(record), (Message("user", tuple(parts)),), template="page")


def _absent(image: Any) -> bool:
    # A null among structs may come as a struct of nulls.
    return image is None or (isinstance(image, dict) and not any(value is not None for value in image.values()))


FORMAT = InterleavedFormat()
