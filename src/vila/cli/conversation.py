"""From what was typed to the messages that the engine is asked with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vila.cli.shots import Shot
from vila.core.errors import ConfigError, MediaError
from vila.core.types import Image, Message, Part, Text, Video

_IMAGE, _VIDEO = "<image>", "<video>"
_MARKERS = re.compile(f"({_IMAGE}|{_VIDEO})")


@dataclass(frozen=True, slots=True)
class Question:
    """The last turn of a conversation.

    gap:   written after each image that is put before the text; None takes the template's.
    where: name of the text in an error.
    give:  how to give media, for the error for markers without any.
    """

    text: str
    images: Sequence[Image] = ()
    videos: Sequence[Video] = ()
    gap: str | None = None
    where: str = "--prompt"
    give: str = "pass --image FILE or --video FILE; text that spells a marker goes into --messages, as a text part"


def build_conversation(
    question: Question, gap: str, *, shots: Sequence[Shot] = (), system: str | None = None
) -> tuple[Message, ...]:
    """System text, examples, question. `gap` is the template's `media_gap`.

    Raises MediaError when markers in a text and the media for it differ in number.
    """
    gap = gap if question.gap is None else question.gap
    messages: list[Message] = []
    for number, shot in enumerate(shots, start=1):
        example = _example(shot, question, f"--shot {number}")
        answer = check_text(shot.text, example.where)
        messages += [Message("user", place_media(example, gap)), Message.of("assistant", answer)]
    return with_system([*messages, Message("user", place_media(question, gap))], system)


def _example(shot: Shot, question: Question, where: str) -> Question:
    images = () if shot.image is None else (shot.image,)
    if shot.question is None:
        return replace(question, images=images, videos=(), where=where)
    return Question(check_text(shot.question, where), images, where=where)


def place_media(question: Question, gap: str) -> tuple[Part, ...]:
    """Return the parts of a user's turn: media where the text has markers for them, else before the text.

    Raises MediaError with both counts if markers and media differ in number.
    """
    text = question.text
    found = {_IMAGE: text.count(_IMAGE), _VIDEO: text.count(_VIDEO)}
    if not any(found.values()):
        # The processor writes the gaps of a clip, frame by frame.
        before = [part for image in question.images for part in (image, Text(gap))]
        return _joined([*before, *question.videos, Text(text)])
    problems = [
        f"{_count(found[marker], f'{marker} marker')} but {_count(len(given), what)}"
        for marker, given, what in ((_IMAGE, question.images, "image"), (_VIDEO, question.videos, "video"))
        if found[marker] != len(given)
    ]
    if problems:
        has_media = bool(question.images or question.videos)
        raise MediaError(
            f"{', and '.join(problems)} given",
            field=question.where,
            hint="write a marker for each, or none to have them first" if has_media else question.give,
        )
    waiting: dict[str, Iterator[Part]] = {_IMAGE: iter(question.images), _VIDEO: iter(question.videos)}
    return _joined([next(waiting[piece]) if piece in waiting else Text(piece) for piece in _MARKERS.split(text)])


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Neighbouring texts made one, empty ones left out."""
    out: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and out and isinstance(out[-1], Text):
            out[-1] = Text(out[-1].text + part.text)
        else:
            out.append(part)
    return tuple(part for part in out if not (isinstance(part, Text) and not part.text))


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """The conversation with `--system` before it. Raises ConfigError when it has a system message of its own."""
    if system is None:
        return tuple(messages)
    if messages and messages[0].role == "system":
        raise ConfigError("--system was given, but the messages begin with a system message; leave one of them out")
    return (Message.of("system", check_text(system, "the system text")), *messages)


def check_text(text: str, where: str) -> str:
    """The text itself. Raises ConfigError for what is no text: bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text (character {error.start + 1} is {text[error.start]!r})") from error
    return text


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
