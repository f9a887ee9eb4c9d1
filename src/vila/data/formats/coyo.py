"""Format `coyo`: image-text pairs, each one message of image and text.

Tar shards have KEY.jpg and KEY.txt, optionally KEY.json; parquet files have a column of images and one of texts.
`<image>` in a text stays text; upstream VILA replaces it by `<IMAGE>`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vila.core.progress import SILENT, Events
from vila.core.types import Message, Sample, Text
from vila.data.formats.base import RecordSource, id_of, read_options, text_at
from vila.data.readers.records import Record, image_at, member_image


@dataclass(frozen=True, slots=True)
class CoyoOptions:
    """image, text: columns of parquet files or keys of KEY.json; an empty `text` means `text` or `caption`."""

    image: str = "image"
    text: str = ""


class CoyoFormat:
    """COYO image-text pairs: tar shards of KEY.jpg and KEY.txt, or parquet with `image` and `text` or `caption`."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Open a file or all files of a directory. Options: see `CoyoOptions`."""
        chosen = read_options(CoyoOptions, options, "coyo")
        columns = ("id", chosen.image, *_texts(chosen))
        convert = partial(sample_of, root=image_root, options=chosen)
        media = (chosen.image,)
        return RecordSource(path, convert, kinds=(".tar", ".parquet"), columns=columns, events=events, media=media)


def sample_of(record: Record, root: Path, options: CoyoOptions) -> Sample:
    """Return the pair as one user message. Raises DataError with file, record or key, field and value."""
    if record.in_shard:
        image = member_image(record)
        if image is None:
            raise record.error("no image member", value=sorted(record.members))
    else:
        image = image_at(record, (options.image,), root)
    text = record.read_text("txt") if "txt" in record.members else text_at(record, _texts(options))
    if not text.strip():
        raise record.error("the text is empty", field="txt" if "txt" in record.members else _texts(options)[0])
    return Sample(id_of(record), (Message("user", (image, Text(text))),), template="page")


def _texts(options: CoyoOptions) -> tuple[str, ...]:
    return (options.text,) if options.text else ("text", "caption")


FORMAT = CoyoFormat()
