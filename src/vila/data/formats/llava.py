"""Formats `llava_json` and `llava_json_v15`: LLaVA records, `conversations` of `from` and `value`, `image` or `video`.

The two formats place `<image>` markers as VILA 1.0 and VILA 1.5 do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vila.core.types import Message, Part, Role, Sample, Video
from vila.data.formats.base import (
    IMAGE_MARKER,
    VIDEO_MARKER,
    DatasetFormat,
    check_turns,
    conversation_turns,
    id_of,
    media_first,
    merge_texts,
    remove_markers,
)
from vila.data.readers.records import Record, images_at, media_keys, media_source

MEDIA_KEYS = ("image", "video")
_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}

Normalise = Callable[[Sequence[str]], list[str]]
"""Moves the image markers of the questions of a record with images."""


@dataclass(frozen=True, slots=True)
class LlavaOptions:
    """num_frames: frames of each video, 0 for the number of the model."""

    num_frames: int = 0


def sample_of(record: Record, root: Path, options: LlavaOptions, normalise: Normalise) -> Sample:
    """Return the conversation of a record. Raises DataError with file, record, field and value."""
    turns = _turns(record)
    images = images_at(record, "image", root)
    if keys := media_keys(record, "video"):
        if images:
            raise record.error("cannot be combined with 'image'", field="video", hint="keep one of them")
        if len(keys) > 1 or keys[0] != ("video",):
            raise record.error(field="video", value=record.value["video"], expected="one video, not a list")
        video = Video(media_source(record, ("video",), root), options.num_frames or None)
        return Sample(id_of(record), check_turns(_about_video(turns, video), record, "conversations"))
    questions = [text for role, text in turns if role == "user"]
    if images:
        questions = normalise(questions)
    markers = sum(text.count(IMAGE_MARKER) for text in questions)
    if markers != len(images):
        problem = f"the number of images differs from that of {IMAGE_MARKER} in the questions"
        hint = "give each image one marker, and name the images in 'image'"
        raise record.error(problem, field="image", value=len(images), expected=str(markers), hint=hint)
    rest, remaining = iter(questions), iter(images)
    messages = [
        Message(role, _parts(next(rest), remaining)) if role == "user" else Message.of(role, text)
        for role, text in turns
    ]
    return Sample(id_of(record), check_turns(messages, record, "conversations"))


def _turns(record: Record) -> list[tuple[Role, str]]:
    turns: list[tuple[Role, str]] = []
    for number, (field, role, text) in enumerate(conversation_turns(record, _ROLES, "human or gpt")):
        if role == "assistant" and IMAGE_MARKER in text:
            raise record.error(f"{IMAGE_MARKER} in an answer", field=f"{field}.value", value=text)
        # As upstream, a first turn that is not from the human is dropped.
        if role == "user" or number:
            turns.append((role, text))
    return turns


def _parts(text: str, images: Iterator[Part]) -> tuple[Part, ...]:
    pieces: list[Part | str] = []
    for number, chunk in enumerate(text.split(IMAGE_MARKER)):
        pieces += [next(images), chunk] if number else [chunk]
    return merge_texts(pieces)


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


sample_v1, sample_v15 = partial(sample_of, normalise=normalise_v1), partial(sample_of, normalise=normalise_v15)
_SUMMARY = "LLaVA: `conversations` of `from` and `value`, with `image` or `video`; JSON. Image markers as in VILA"
FORMAT = DatasetFormat("llava_json", f"{_SUMMARY} 1.0.", sample_v1, LlavaOptions, media=MEDIA_KEYS)
V15_FORMAT = DatasetFormat("llava_json_v15", f"{_SUMMARY} 1.5.", sample_v15, LlavaOptions, media=MEDIA_KEYS)
