"""A record of LLaVA's JSON: `conversations` of `from` human|gpt, with `image` (a name or a list) or `video`.

How `<image>` in a turn is read differs between versions of the original, and is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.types import Message, Part, Role, Sample, Video
from vila.data.formats.media import images_at, source_of
from vila.data.formats.rows import Row
from vila.data.formats.turns import MARKER, check_turns, id_of, joined, media_first, without_markers

_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}

Normalise = Callable[[Sequence[str]], list[str]]
"""The questions of a record with pictures, with their markers where the model is to see the pictures."""


def sample_of(row: Row, root: Path, normalise: Normalise, num_frames: int | None = None) -> Sample:
    """The conversation of a record. Raises DataError naming file, row, turn and reason."""
    record, where = row.value, row.where
    turns = _turns(record.get("conversations"), where)
    images = images_at(row, "image", root)
    if record.get("video") is not None:
        if images:
            raise DataError(f"{where}: has both 'image' and 'video'; give one of them")
        clip = Video(source_of(row, ("video",), root), num_frames)
        return Sample(id_of(record, row.name), check_turns(_about_clip(turns, clip), where))
    questions = [text for role, text in turns if role == "user"]
    if images:
        questions = normalise(questions)
    markers = sum(text.count(MARKER) for text in questions)
    if markers and not images:
        raise DataError(f"{where}: {MARKER} in the text, but the record has no image")
    if markers != len(images):
        raise DataError(f"{where}: {_count(len(images), 'image')} but {_count(markers, MARKER)} in its turns")
    rest, pictures = iter(questions), iter(images)
    messages = [
        Message(role, tuple(_parts(next(rest), pictures))) if role == "user" else Message.of(role, text)
        for role, text in turns
    ]
    return Sample(id_of(record, row.name), check_turns(messages, where))


def _turns(given: Any, where: str) -> list[tuple[Role, str]]:
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: expected an object with a list 'conversations'")
    turns: list[tuple[Role, str]] = []
    for number, turn in enumerate(given, start=1):
        speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (turn, None)
        if not isinstance(speaker, str) or speaker not in _ROLES or not isinstance(value, str):
            raise DataError(
                f"{where} turn {number}: from={speaker!r} with value a {type(value).__name__}; expected human or gpt"
            )
        if speaker == "gpt" and MARKER in value:
            raise DataError(f"{where} turn {number}: {MARKER} inside an answer")
        # As in the original, a first turn that is not the human's is left out.
        if turns or speaker == "human" or number > 1:
            turns.append((_ROLES[speaker], value))
    return turns


def _parts(text: str, pictures: Iterator[Part]) -> Iterator[Part]:
    pieces: list[Part | str] = []
    for number, chunk in enumerate(text.split(MARKER)):
        pieces += [next(pictures), chunk] if number else [chunk]
    yield from joined(pieces)


def _about_clip(turns: Sequence[tuple[Role, str]], clip: Video) -> list[Message]:
    """The clip and a newline before the first question, which loses its markers; other turns stay."""
    messages = []
    for number, (role, text) in enumerate(turns):
        if number == 0:
            messages.append(Message(role, media_first([clip], without_markers(text.rstrip(), MARKER, "<video>"))))
        else:
            messages.append(Message.of(role, text))
    return messages


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
