"""Pictures with their texts, as COYO: one page each, the picture and then the text.

Read from tar shards (KEY.jpg and KEY.txt, perhaps KEY.json) or parquet (a column of images and one of texts). A text
that spells `<image>` is text; the original writes `<IMAGE>` in its place.
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
    """image, text: the columns of parquet files, or the keys of KEY.json; an empty `text` takes `text` or `caption`."""

    image: str = "image"
    text: str = ""


class CoyoFormat:
    """Image and text pairs."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Give random access to the pairs of a file, or of all shards of a directory. Options: see `CoyoOptions`."""
        chosen = read_options(CoyoOptions, options, "coyo")
        columns = ("id", chosen.image, *_texts(chosen))
        convert = partial(sample_of, root=image_root, options=chosen)
        media = (chosen.image,)
        return RecordSource(path, convert, kinds=(".tar", ".parquet"), columns=columns, events=events, media=media)


def sample_of(record: Record, root: Path, options: CoyoOptions) -> Sample:
    """Make the pair as one message of the user. Raises DataError with file, record or key, field and value."""
    if record.in_shard:
        image = member_image(record)
        if image is None:
            raise record.error(f"no image among its members ({', '.join(sorted(record.members)) or 'none'})")
    else:
        image = image_at(record, (options.image,), root)
    text = record.read_text("txt") if "txt" in record.members else text_at(record, _texts(options))
    if not text.strip():
        raise record.error("the text is empty", field="txt" if "txt" in record.members else _texts(options)[0])
    return Sample(id_of(record), (Message("user", (image, Text(text))),), template="page")


def _texts(options: CoyoOptions) -> tuple[str, ...]:
    return (options.text,) if options.text else ("text", "caption")


FORMAT = CoyoFormat()
