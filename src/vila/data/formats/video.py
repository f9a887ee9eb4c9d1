"""Format `video_json`: videos with conversations, LLaVA records with `video`, or `video_id` with `q` and `a`.

The video and a newline are put before the first question, whose `<image>` and `<video>` markers are removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vila.core.types import Sample, Video
from vila.data.formats import llava
from vila.data.formats.base import (
    IMAGE_MARKER,
    VIDEO_MARKER,
    DatasetFormat,
    answer_at,
    id_of,
    question_answers,
    remove_markers,
    text_at,
)
from vila.data.readers.records import Record, safe_path


@dataclass(frozen=True, slots=True)
class VideoOptions:
    """num_frames: frames of each video, 0 for the number of the model. suffix: extension of the files of `video_id`."""

    num_frames: int = 0
    suffix: str = ".mp4"


def sample_of(record: Record, root: Path, options: VideoOptions) -> Sample:
    """Return the conversation of a record. Raises DataError with file, record, field and value."""
    if record.value.get("video") is not None:
        return llava.sample_v15(record, root, llava.LlavaOptions(options.num_frames))
    if record.value.get("video_id") is None:
        raise record.error("missing", field="video or video_id")
    name = text_at(record, ("video_id",))
    video = Video(
        safe_path(record, root, f"{name}{options.suffix}" if name else "", "video_id"), options.num_frames or None
    )
    question = remove_markers(text_at(record, ("q",)), IMAGE_MARKER, VIDEO_MARKER)
    return Sample(id_of(record), question_answers([(question, answer_at(record, ("a",)))], [video]))


FORMAT = DatasetFormat(
    "video_json",
    "Video conversations: LLaVA records with `video`, or `video_id` with `q` and `a`; JSON.",
    sample_of,
    VideoOptions,
    media=(*llava.MEDIA_KEYS, "video_id"),
)
