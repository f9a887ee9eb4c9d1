"""LLaVA's records (`conversations` of `from` human|gpt, `image` or `video`), placeholders as in VILA 1.5.

Images stay where the markers are: `Compare <image> and <image>.` becomes `Compare <image>\\nand <image>\\n.`. A
record whose turns have no marker gets one in front of its first question. Read from a JSON list or JSON lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vila.core.events import SILENT, Events
from vila.data.formats.llava_json import LlavaOptions
from vila.data.formats.llava_record import MEDIA_KEYS, sample_of
from vila.data.formats.source import JSON, RecordSource, read_options
from vila.data.formats.turns import IMAGE_MARKER


class LlavaV15Format:
    """LLaVA records, placeholders of VILA 1.5."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Give random access to the samples of a file or of all files of a directory. Options: see `LlavaOptions`."""
        chosen = read_options(LlavaOptions, options, "llava_json_v15")
        convert = partial(sample_of, root=image_root, normalise=normalise_v15, num_frames=chosen.num_frames or None)
        return RecordSource(path, convert, kinds=JSON, events=events, media=MEDIA_KEYS)


def normalise_v15(questions: Sequence[str]) -> list[str]:
    """Put a newline behind every marker and strip the text around it; without any marker, put one in front first."""
    if questions and not any(IMAGE_MARKER in text for text in questions):
        questions = [f"{IMAGE_MARKER}\n{questions[0]}", *questions[1:]]
    return [_spread(text) if IMAGE_MARKER in text else text for text in questions]


def _spread(text: str) -> str:
    *before, last = (chunk.strip() for chunk in text.split(IMAGE_MARKER))
    return f"{IMAGE_MARKER}\n".join([*(f"{chunk} " for chunk in before), last]).strip()


FORMAT = LlavaV15Format()
