"""WebDataset tar shards: a picture or clip with KEY.txt, or KEY.json with a conversation.

KEY.json holds `messages`, whose image parts name members ({"type": "image", "file": "0.jpg"} is KEY.0.jpg), or
`question`, `answer` and `image` as `vflan` reads them, or beside one picture or clip `text` or `caption`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from vila.chat.templates import find_template
from vila.core.progress import SILENT, Events
from vila.core.types import Image, Message, Sample, Text, Video
from vila.data.formats import messages, vflan
from vila.data.formats.base import RecordSource, id_of, media_first, read_options, text_at
from vila.data.readers.records import Record, member_image, member_video


@dataclass(frozen=True, slots=True)
class WebDatasetOptions:
    """template: of every sample without its own; "page" makes a pair one page, any other (or none) question and answer.

    num_frames: frames of each clip beside a text, a clip in `messages` has its own; 0 leaves the number to the model.
    """

    template: str = field(default="")
    num_frames: int = 0


class WebDatasetFormat:
    """Tar shards of captions and conversations."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Give random access to the samples of a shard, or of all shards of a directory. Options: `WebDatasetOptions`.

        Raises UnknownNameError for a template that does not exist.
        """
        chosen = read_options(WebDatasetOptions, options, "webdataset")
        if chosen.template:
            find_template(chosen.template)
        convert = partial(sample_of, root=image_root, options=chosen)
        return RecordSource(path, convert, kinds=(".tar",), events=events, media=_media_keys)


def sample_of(record: Record, root: Path, options: WebDatasetOptions) -> Sample:
    """Make the sample of a shard. Raises DataError with shard, key, field and value."""
    if "messages" in record.value:
        sample = messages.sample_of(record, root)
    elif "question" in record.value:
        sample = vflan.sample_of(record, root)
    else:
        sample = _caption(record, options)
    return sample if sample.template or not options.template else replace(sample, template=options.template)


def _media_keys(record: Record) -> tuple[str, ...]:
    if "messages" in record.value:
        return messages.MEDIA_KEYS
    return vflan.MEDIA_KEYS if "question" in record.value else ()


def _caption(record: Record, options: WebDatasetOptions) -> Sample:
    medium: Image | Video | None = member_image(record) or member_video(record, options.num_frames or None)
    if medium is None:
        members = ", ".join(sorted(record.members)) or "none"
        raise record.error(f"no image or video among its members ({members})")
    text = record.read_text("txt") if "txt" in record.members else text_at(record, ("text", "caption"))
    if not text.strip():
        raise record.error("the text is empty", field="txt" if "txt" in record.members else "text")
    if options.template == "page":
        return Sample(id_of(record), (Message("user", (medium, Text(text))),))
    turns = (Message("user", media_first([medium], "")), Message.of("assistant", text))
    return Sample(id_of(record), turns)


FORMAT = WebDatasetFormat()
