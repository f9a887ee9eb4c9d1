"""Format `webdataset`: tar shards of an image or video with KEY.txt, or of a conversation in KEY.json.

KEY.json has `messages`, whose image parts name members ({"type": "image", "file": "0.jpg"} is KEY.0.jpg); or
`question`, `answer` and `image` as in `vflan`; or `text` or `caption` of one image or video.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from vila.chat.templates import find_template
from vila.core.types import Image, Sample, Text, Video
from vila.data.formats import messages, vflan
from vila.data.formats.base import DatasetFormat, NoOptions, caption_of, id_of, page_sample, question_answers
from vila.data.readers.records import Record, member_image, member_video


@dataclass(frozen=True, slots=True)
class WebDatasetOptions:
    """template: chat template of samples without their own; with "page" a pair becomes one message of image and text,
    otherwise the text answers the image.

    num_frames: frames of each video with a text, 0 for the number of the model; `messages` have their own numbers.
    """

    template: str = ""
    num_frames: int = 0


def sample_of(record: Record, root: Path, options: WebDatasetOptions) -> Sample:
    """Return the sample of a record. Raises DataError with shard, key, field and value."""
    if "messages" in record.value:
        sample = messages.sample_of(record, root, NoOptions())
    elif "question" in record.value:
        sample = vflan.sample_of(record, root, vflan.VflanOptions())
    else:
        sample = _caption(record, options)
    return sample if sample.template or not options.template else replace(sample, template=options.template)


def _media_keys(record: Record, options: WebDatasetOptions) -> tuple[str, ...]:
    if "messages" in record.value:
        return messages.MEDIA_KEYS
    return vflan.MEDIA_KEYS if "question" in record.value else ()


def _caption(record: Record, options: WebDatasetOptions) -> Sample:
    medium: Image | Video | None = member_image(record) or member_video(record, options.num_frames or None)
    if medium is None:
        raise record.error("no image or video member", value=sorted(record.members))
    text = caption_of(record, ("text", "caption"))
    if options.template == "page":
        return page_sample(record, (medium, Text(text)))
    return Sample(id_of(record), question_answers([("", text)], [medium]))


def _check(options: WebDatasetOptions) -> None:
    if options.template:
        find_template(options.template)


FORMAT = DatasetFormat(
    "webdataset",
    "WebDataset tar shards: an image or video with KEY.txt, or KEY.json with a conversation or caption.",
    sample_of,
    WebDatasetOptions,
    media=_media_keys,
    check=_check,
)
