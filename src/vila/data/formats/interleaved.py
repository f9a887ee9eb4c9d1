"""Pages as OBELICS, OmniCorpus and MINT-1T hold them: parallel lists `texts` and `images`, null where the other stands.

Pictures are bytes, names of files below the image root, or objects with `bytes` or `path`. Parquet, JSON lines, a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.events import SILENT, Events
from vila.core.types import Message, Part, Sample, Text
from vila.data.formats.media import image_of
from vila.data.formats.rows import Row
from vila.data.formats.source import JSON, RecordSource, read_options
from vila.data.formats.turns import id_of


@dataclass(frozen=True, slots=True)
class InterleavedOptions:
    """max_images: keep the first so many of a page, 0 all. joiner: stands between two texts that follow each other."""

    max_images: int = 0
    joiner: str = "\n\n"


class InterleavedFormat:
    """Pages of texts and pictures."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Random access to the pages of a file, or of all files of a directory. Options: see `InterleavedOptions`."""
        chosen = read_options(InterleavedOptions, options, "interleaved")
        convert = partial(sample_of, root=image_root, options=chosen)
        return RecordSource(path, convert, kinds=(".parquet", *JSON), columns=("id", "texts", "images"), events=events)


def sample_of(row: Row, root: Path, options: InterleavedOptions) -> Sample:
    """The page as one message of the user. Raises DataError naming file, row and reason."""
    texts, images = _list(row, "texts"), _list(row, "images")
    if len(texts) != len(images):
        raise DataError(f"{row.where}: {len(texts)} texts beside {len(images)} images; the lists are parallel")
    parts: list[Part] = []
    shown = 0
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (_absent(image)):
            raise DataError(f"{row.where} place {number + 1}: exactly one of text and image stands at a place")
        if text is None:
            shown += 1
            if not options.max_images or shown <= options.max_images:
                parts.append(image_of(row, ("images", number), root))
        elif not isinstance(text, str):
            raise DataError(f"{row.where} place {number + 1}: {text!r} is not text")
        elif parts and isinstance(parts[-1], Text):
            parts[-1] = Text(f"{parts[-1].text}{options.joiner}{text}")
        elif text:
            parts.append(Text(text))
    if not any(isinstance(part, Text) for part in parts):
        raise DataError(f"{row.where}: the page has no text")
    return Sample(id_of(row.value, row.name), (Message("user", tuple(parts)),), template="page")


def _list(row: Row, key: str) -> list[Any]:
    value = row.value.get(key)
    if not isinstance(value, list):
        raise DataError(f"{row.where}: expected a page with lists 'texts' and 'images'; {key!r} is no list")
    return value


def _absent(image: Any) -> bool:
    # A null among structs may come as a struct of nulls.
    return image is None or (isinstance(image, dict) and not any(value is not None for value in image.values()))


FORMAT = InterleavedFormat()
