"""Conversation types shared by training, evaluation and serving. They name media; `vila.media` decodes them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL import Image as PilImage

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@runtime_checkable
class MediaRef(Protocol):
    """Reference to an encoded image or video inside a larger file (tar, parquet, JSON), read on demand. Hashable."""

    @property
    def name(self) -> str:
        """File and position, for error messages."""

    def read(self) -> bytes:
        """Return the encoded bytes. Raises DataError with file and record if they no longer exist."""


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text. Its content is never parsed for image markers or special tokens."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image: path, http(s) or data URL, encoded bytes, reference into a larger file, or PIL image."""

    source: Path | str | bytes | MediaRef | PilImage.Image

    @property
    def name(self) -> str:
        """Short name for error messages and logs."""
        if isinstance(self.source, (str, Path)):
            text = str(self.source)
            return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
        if isinstance(self.source, bytes):
            return f"<{len(self.source)} bytes>"
        if isinstance(self.source, MediaRef):
            return self.source.name
        return f"<image {self.source.width}x{self.source.height}>"

    def key(self) -> str:
        """Return a hash of the content: of the bytes, the file, the pixels of a PIL image, or the URL."""
        digest = hashlib.sha256()
        if isinstance(self.source, bytes):
            digest.update(self.source)
        elif isinstance(self.source, MediaRef):
            digest.update(self.source.read())
        elif isinstance(self.source, (str, Path)):
            path = Path(self.source)
            digest.update(path.read_bytes() if path.is_file() else str(self.source).encode())
        else:
            digest.update(f"{self.source.mode}{self.source.size}".encode())
            digest.update(self.source.tobytes())
            digest.update(self.source.info.get("exif") or b"")  # the orientation changes the pixels
        return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Video:
    """A video. num_frames: frames to sample at equal distances; None for the default of the model."""

    source: Path | str | bytes | MediaRef
    num_frames: int | None = None


Part = Text | Image | Video


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation: text and media in reading order."""

    role: Role
    parts: tuple[Part, ...]

    @staticmethod
    def of(role: Role, *parts: Part | str) -> Message:
        """Return a message; plain strings become `Text`."""
        return Message(role, tuple(Text(part) if isinstance(part, str) else part for part in parts))

    @property
    def text(self) -> str:
        """All text parts concatenated; media are skipped."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation with an id; the common form of all training and evaluation data.

    branches: alternative continuations. Each attends to `messages` and to itself, not to other branches, so several
              questions can share one image. A branch that starts with the role of the last message continues it.
    template: conversation template of this sample; None for that of the stage or the model.
    """

    id: str
    messages: tuple[Message, ...]
    branches: tuple[tuple[Message, ...], ...] = ()
    template: str | None = None

    def conversations(self) -> Iterator[tuple[Message, ...]]:
        """Yield every complete conversation: `messages` plus one branch, or `messages` alone if there are none."""
        if not self.branches:
            yield self.messages
        for branch in self.branches:
            yield join_messages(self.messages, branch)

    @property
    def media(self) -> tuple[Image | Video, ...]:
        """Media of `messages` and of all branches, in reading order."""
        every = [*self.messages, *(message for branch in self.branches for message in branch)]
        return tuple(part for message in every for part in message.parts if isinstance(part, (Image, Video)))


def join_messages(head: tuple[Message, ...], tail: tuple[Message, ...]) -> tuple[Message, ...]:
    """Concatenate; if the last role of `head` is the first of `tail`, these two messages are merged."""
    if head and tail and head[-1].role == tail[0].role:
        return (*head[:-1], Message(head[-1].role, head[-1].parts + tail[0].parts), *tail[1:])
    return head + tail
