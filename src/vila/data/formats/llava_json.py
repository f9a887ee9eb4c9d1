"""LLaVA's records (`conversations` of `from` human|gpt, `image` or `video`), placeholders as in VILA 1.0.

In every question that holds `<image>`, all occurrences are removed, the text is stripped, and one image and a newline
are put in front: `What?\\n<image>` becomes `<image>\\nWhat?`, and a question that is only `<image>` stays so. Several
markers in one turn become one, so a record has as many images as turns with a marker. A JSON list or JSON lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vila.core.events import SILENT, Events
from vila.data.formats.llava_record import MEDIA_KEYS, sample_of
from vila.data.formats.source import JSON, RecordSource, read_options
from vila.data.formats.turns import IMAGE_MARKER


@dataclass(frozen=True, slots=True)
class LlavaOptions:
    """num_frames: frames of each video; 0 leaves the number to the model."""

    num_frames: int = 0


class LlavaFormat:
    """LLaVA records, placeholders of VILA 1.0."""

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Give random access to the samples of a file or of all files of a directory. Options: see `LlavaOptions`."""
        chosen = read_options(LlavaOptions, options, "llava_json")
        convert = partial(sample_of, root=image_root, normalise=normalise_v1, num_frames=chosen.num_frames or None)
        return RecordSource(path, convert, kinds=JSON, events=events, media=MEDIA_KEYS)


def normalise_v1(questions: Sequence[str]) -> list[str]:
    """Return the questions with at most one marker each, in front. Those without a marker stay as they are."""
    return [
        f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}".strip() if IMAGE_MARKER in text else text
        for text in questions
    ]


FORMAT = LlavaFormat()
