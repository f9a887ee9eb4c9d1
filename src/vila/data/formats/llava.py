"""Formats `llava_json` and `llava_json_v15`: LLaVA records, `conversations` of `from` and `value`, `image` or `video`.

The two formats place `<image>` markers as VILA 1.0 and VILA 1.5 do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vila.core.progress import SILENT, Events
from vila.core.types import Message, Part, Role, Sample, Video
from vila.data.formats.base import (
    IMAGE_MARKER,
    JSON,
    VIDEO_MARKER,
    RecordSource,
    check_turns,
    id_of,
    list_at,
    media_first,
    merge_texts,
    read_options,
    remove_markers,
)
from vila.data.readers.records import Record, images_at, media_keys, media_source

MEDIA_KEYS = ("image", "video")
_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}

Normalise = Callable[[Sequence[str]], list[str]]
"""Moves the image markers of the questions of a record with images."""


def sample_of(record: Record, root: Path, normalise: Normalise, num_frames: int | None = None) -> Sample:
    """Return the conversation of a record. Raises DataError with file, record, field and value."""
    turns = _turns(record)
    images = images_at(record, "image", root)
    if keys := media_keys(record, "video"):
        if images:
            raise record.error("cannot be combined with 'image'", field="video", hint="keep one of them")
        if len(keys) > 1 or keys[0] != ("video",):
            raise record.error(field="video", value=record.value["video"], expected="one video, not a list")
        video = Video(media_source(record, ("video",), root), num_frames)
        return Sample(id_of(record), check_turns(_about_video(turns, video), record, "conversations"))
    questions = [text for role, text in turns if role == "user"]
    if images:
        questions = normalise(questions)
    markers = sum(text.count(IMAGE_MARKER) for text in questions)
    if markers != len(images):
        raise record.error(
            f"the number of images differs from that of {IMAGE_MARKER} in the questions",
            field="image",
            value=len(images),
            expected=str(markers),
            hint="give each image one marker, and name the images in 'image'",
        )
    rest, remaining = iter(questions), iter(images)
    messages = [
        Message(role, tuple(_parts(next(rest), remaining))) if role == "user" else Message.of(role, text)
        for role, text in turns
    ]
    return Sample(id_of(record), check_turns(messages, record, "conversations"))


def _turns(record: Record) -> list[tuple[Role, str]]:
    turns: list[tuple[Role, str]] = []
    for number, turn in enumerate(list_at(record, "conversations", "turns")):
        field = f"conversations[{number}]"
        if not isinstance(turn, Mapping):
            raise record.error(field=field, value=turn, expected="an object with 'from' and 'value'")
        speaker, text = turn.get("from"), turn.get("value")
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise record.error(field=f"{field}.from", value=speaker, expected="human or gpt")
        if not isinstance(text, str):
            raise record.error(field=f"{field}.value", value=text, expected="text")
        if speaker == "gpt" and IMAGE_MARKER in text:
            raise record.error(f"{IMAGE_MARKER} in an answer", field=f"{field}.value", value=text)
        # As upstream, a first turn that is not from the human is dropped.
        if turns or speaker == "human" or number:
            turns.append((_ROLES[speaker], text))
    return turns


def _parts(text: str, images: Iterator[Part]) -> Iterator[Part]:
    pieces: list[Part | str] = []
    for number, chunk in enumerate(text.split(IMAGE_MARKER)):
        pieces += [next(images), chunk] if number else [chunk]
    yield from merge_texts(pieces)


def _about_video(turns: Sequence[tuple[Role, str]], video: Video) -> list[Message]:
    """Put the video and a newline before the first question and remove its markers; other turns are unchanged."""
    messages = []
    for number, (role, text) in enumerate(turns):
        if number == 0:
            question = remove_markers(text.rstrip(), IMAGE_MARKER, VIDEO_MARKER)
            messages.append(Message(role, media_first([video], question)))
        else:
            messages.append(Message.of(role, text))
    return messages


@dataclass(frozen=True, slots=True)
class LlavaOptions:
    """num_frames: frames of each video, 0 for the number of the model."""

    num_frames: int = 0


class LlavaFormat:
    """LLaVA: `conversations` of `from` and `value`, with `image` or `video`; JSON. Image markers as in VILA 1.0."""

    name = "llava_json"

    def open(self, path: Path, image_root: Path, events: Events = SILENT, **options: object) -> RecordSource:
        """Open a file or all files of a directory. Options: see `LlavaOptions`."""
        chosen = read_options(LlavaOptions, options, self.name)
        convert = partial(sample_of, root=image_root, normalise=self.normalise, num_frames=chosen.num_frames or None)
        return RecordSource(path, convert, kinds=JSON, events=events, media=MEDIA_KEYS)

    @property
    def normalise(self) -> Normalise:
        """Placement of the image markers."""
        return normalise_v1


class LlavaV15Format(LlavaFormat):
    """LLaVA: `conversations` of `from` and `value`, with `image` or `video`; JSON. Image markers as in VILA 1.5."""

    name = "llava_json_v15"

    @property
    def normalise(self) -> Normalise:
        """Placement of the image markers."""
        return normalise_v15


def normalise_v1(questions: Sequence[str]) -> list[str]:
    """Replace the markers of each question by one in front of it."""
    return [
        f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}".strip() if IMAGE_MARKER in text else text
        for text in questions
    ]


def normalise_v15(questions: Sequence[str]) -> list[str]:
    """Put a newline after every marker and strip the text around it; without any marker, put one before the text."""
    if questions and not any(IMAGE_MARKER in text for text in questions):
        questions = [f"{IMAGE_MARKER}\n{questions[0]}", *questions[1:]]
    return [_spread(text) if IMAGE_MARKER in text else text for text in questions]


def _spread(text: str) -> str:
    *before, last = (chunk.strip() for chunk in text.split(IMAGE_MARKER))
    return f"{IMAGE_MARKER}\n".join([*(f"{chunk} " for chunk in before), last]).strip()


FORMAT = LlavaFormat()
V15_FORMAT = LlavaV15Format()
