"""Clips with conversations: LLaVA records with `video`, or `video_id` with `q` and `a`. A JSON list or JSON lines.

The clip and a newline stand before the first question, whose `<image>` and `<video>` markers are removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vila.core.errors import DataError
from vila.core.events import SILENT, Events
from vila.core.types import Message, Sample, Video
from vila.data.formats import llava_record
from vila.data.formats.llava_json_v15 import normalise_v15
from vila.data.formats.media import safe_path
from vila.data.formats.rows import Row
from vila.data.formats.source import JSON, RecordSource, read_options
from vila.data.formats.turns import MARKER, check_turns, id_of, media_first, text_at, without_markers


@dataclass(frozen=True, slots=True)
class VideoOptions:
    """num_frames: frames of each clip, 0 leaves the number to the model. suffix: what files of a `video_id` end in."""

    num_frames: int = 0
    suffix: str = ".mp4"


class VideoJsonFormat:
    """Conversations about clips."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Random access to the samples of a file, or of all files of a directory. Options: see `VideoOptions`."""
        chosen = read_options(VideoOptions, options, "video_json")
        return RecordSource(path, partial(sample_of, root=image_root, options=chosen), kinds=JSON, events=events)


def sample_of(row: Row, root: Path, options: VideoOptions) -> Sample:
    """The conversation of a record. Raises DataError naming file, row, turn and reason."""
    record, num_frames = row.value, options.num_frames or None
    if "video" in record:
        return llava_record.sample_of(row, root, normalise_v15, num_frames)
    name = record.get("video_id")
    if not isinstance(name, str) or not name:
        raise DataError(f"{row.where}: has neither a 'video' nor a text 'video_id'")
    clip = Video(safe_path(root, f"{name}{options.suffix}", row.where), num_frames)
    question = without_markers(text_at(record, ("q",), row.where), MARKER, "<video>")
    turns = (
        Message("user", media_first([clip], question)),
        Message.of("assistant", text_at(record, ("a",), row.where)),
    )
    return Sample(id_of(record, row.name), check_turns(turns, row.where))


FORMAT = VideoJsonFormat()
