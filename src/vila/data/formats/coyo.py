"""Format `coyo`: image-text pairs, each one message of image and text.

Tar shards have KEY.jpg and KEY.txt, optionally KEY.json; parquet files have a column of images and one of texts.
`<image>` in a text stays text; upstream VILA replaces it by `<IMAGE>`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vila.core.types import Sample, Text
from vila.data.formats.base import DatasetFormat, caption_of, page_sample
from vila.data.readers.records import Record, image_at, member_image


@dataclass(frozen=True, slots=True)
class CoyoOptions:
    """image, text: columns of parquet files or keys of KEY.json; an empty `text` means `text` or `caption`."""

    image: str = "image"
    text: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """Columns or keys of the text; the first that a record has is used."""
        return (self.text,) if self.text else ("text", "caption")


def sample_of(record: Record, root: Path, options: CoyoOptions) -> Sample:
    """Return the pair as one user message. Raises DataError with file, record or key, field and value."""
    image = member_image(record) if record.in_shard else image_at(record, (options.image,), root)
    if image is None:
        raise record.error("no image member", value=sorted(record.members))
    return page_sample(record, (image, Text(caption_of(record, options.texts))))


def _media_keys(record: Record, options: CoyoOptions) -> tuple[str, ...]:
    return (options.image,)


FORMAT = DatasetFormat(
    "coyo",
    "COYO image-text pairs: tar shards of KEY.jpg and KEY.txt, or parquet with `image` and `text` or `caption`.",
    sample_of,
    CoyoOptions,
    columns=lambda options: ("id", options.image, *options.texts),
    media=_media_keys,
)
