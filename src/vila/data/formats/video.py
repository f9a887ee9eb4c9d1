"""Format `video_json`: videos with conversations, LLaVA records with `video`, or `video_id` with `q` and `a`.

The video and a newline are put before the first question, whose `<image>` and `<video>` markers are removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vila.core.progress import SILENT, Events
from vila.core.types import Message, Sample, Video
from vila.data.formats import llava
from vila.data.formats.base import (
    IMAGE_MARKER,
    JSON,
    VIDEO_MARKER,
    RecordSource,
    answer_at,
    id_of,
    media_first,
    read_options,
    remove_markers,
    text_at,
)
from vila.data.formats.llava import normalise_v15
from vila.data.readers.records import Record, safe_path

MEDIA_KEYS = (*llava.MEDIA_KEYS, "video_id")


@dataclass(frozen=True, slots=True)
class VideoOptions:
    """num_frames: frames of each video, 0 for the number of the model. suffix: extension of the files of `video_id`."""

    num_frames: int = 0
    suffix: str = ".mp4"


class VideoJsonFormat:
    """Video conversations: LLaVA records with `video`, or `video_id` with `q` and `a`; JSON."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Open a file or all files of a directory. Options: see `VideoOptions`."""
        chosen = read_options(VideoOptions, options, "video_json")
        convert = partial(sample_of, root=image_root, options=chosen)
        return RecordSource(path, convert, kinds=JSON, events=events, media=MEDIA_KEYS)


def sample_of(record: Record, root: Path, options: VideoOptions) -> Sample:
    """Return the conversation of a record. Raises DataError with file, record, field and value."""
    num_frames = options.num_frames or None
    if record.value.get("video") is not None:
        return llava.sample_of(record, root, normalise_v15, num_frames)
    if record.value.get("video_id") is None:
        raise record.error("missing", field="video or video_id")
    name = text_at(record, ("video_id",))
    video = Video(safe_path(record, root, f"{name}{options.suffix}" if name else "", "video_id"), num_frames)
    question = remove_markers(text_at(record, ("q",)), IMAGE_MARKER, VIDEO_MARKER)
    turns = (Message("user", media_first([video], question)), Message.of("assistant", answer_at(record, ("a",))))
    return Sample(id_of(record), turns)


FORMAT = VideoJsonFormat()
