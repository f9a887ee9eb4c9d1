"""Clips in conversations become their frames, each a picture with the template's gap behind it. Nothing is decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from vila.core.types import Image, Message, Part, Sample, Text, Video

Frames = Callable[[Video], Sequence[Image]]
"""The pictures that stand for a clip, in order."""


def expand_clips(messages: Sequence[Message], gap: str, frames: Frames) -> tuple[Message, ...]:
    """Messages with each clip replaced by its frames, `gap` after each, as the original writes `<image>\\n`."""
    return tuple(
        replace(message, parts=tuple(_expanded(message.parts, gap, frames))) if _has_clip(message) else message
        for message in messages
    )


def expand_sample(sample: Sample, gap: str, frames: Frames) -> Sample:
    """The sample with each clip replaced by its frames; its conversations are those of `expand_clips`.

    Branches come back whole, with nothing before them: whether a gap follows the last frame of what they share depends
    on how each of them goes on.
    """
    if not any(isinstance(item, Video) for item in sample.media):
        return sample
    whole = tuple(expand_clips(messages, gap, frames) for messages in sample.conversations())
    return replace(sample, messages=(), branches=whole) if sample.branches else replace(sample, messages=whole[0])


def _has_clip(message: Message) -> bool:
    return any(isinstance(part, Video) for part in message.parts)


def _expanded(parts: Sequence[Part], gap: str, frames: Frames) -> Iterator[Part]:
    for place, part in enumerate(parts):
        if not isinstance(part, Video):
            yield part
            continue
        after = parts[place + 1] if place + 1 < len(parts) else None
        pictures = frames(part)
        for number, picture in enumerate(pictures, start=1):
            yield picture
            # The gap after the last frame may be there already: "<video>\nWhat happens?".
            there = number == len(pictures) and isinstance(after, Text) and after.text.startswith(gap)
            if gap and not there:
                yield Text(gap)
