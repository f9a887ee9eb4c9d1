"""Format `webdataset`: tar shards of an image or video with KEY.txt, or of a conversation in KEY.json.

KEY.json has `messages`, whose image parts name members ({"type": "image", "file": "0.jpg"} is KEY.0.jpg); or
`question`, `answer` and `image` as in `vflan`; or `text` or `caption` of one image or video.
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
    """template: chat template of samples without their own; with "page" a pair becomes one message of image and text,
    otherwise the text answers the image.

    num_frames: frames of each video with a text, 0 for the number of the model; `messages` have their own numbers.
    """

    template: str = field(default="")
    num_frames: int = 0


class WebDatasetFormat:
    """WebDataset tar shards: an image or video with KEY.txt, or KEY.json with a conversation or caption."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Open a shard or all shards of a directory. Options: see `WebDatasetOptions`.

        Raises UnknownNameError for an unknown template.
        """
        chosen = read_options(WebDatasetOptions, options, "webdataset")
        if chosen.template:
            find_template(chosen.template)
        convert = partial(sample_of, root=image_root, options=chosen)
        return RecordSource(path, convert, kinds=(".tar",), events=events, media=_media_keys)


def sample_of(record: Record, root: Path, options: WebDatasetOptions) -> Sample:
    """Return the sample of a record. Raises DataError with shard, key, field and value."""
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
        raise record.error("no image or video member", value=sorted(record.members))
    text = record.read_text("txt") if "txt" in record.members else text_at(record, ("text", "caption"))
    if not text.strip():
        raise record.error("the text is empty", field="txt" if "txt" in record.members else "text")
    if options.template == "page":
        return Sample(id_of(record), (Message("user", (medium, Text(text))),))
    turns = (Message("user", media_first([medium], "")), Message.of("assistant", text))
    return Sample(id_of(record), turns)


FORMAT = WebDatasetFormat()
