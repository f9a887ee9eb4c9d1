"""The conversation types that training, evaluation and serving share. Media are named here and decoded late."""

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
    """Encoded media inside a larger file (a tar, a table, a line of JSON), read when they are needed. Hashable."""

    @property
    def name(self) -> str:
        """File and place, for messages to the user."""

    def read(self) -> bytes:
        """The encoded bytes. Raises DataError naming file and place when they are not there any more."""


@dataclass(frozen=True, slots=True)
class Text:
    """A run of plain text. Nothing inside it is ever read as a marker or a special token."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """One picture: a path, an http(s) or data URL, encoded bytes, bytes stored in a larger file, or a PIL image."""

    source: Path | str | bytes | MediaRef | PilImage.Image

    @property
    def name(self) -> str:
        """What to call this picture in a message to the user."""
        if isinstance(self.source, (str, Path)):
            text = str(self.source)
            return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
        if isinstance(self.source, bytes):
            return f"<{len(self.source)} bytes>"
        if isinstance(self.source, MediaRef):
            return self.source.name
        return f"<picture {self.source.width}x{self.source.height}>"

    def key(self) -> str:
        """A hash that is equal when the content is equal: of the bytes, the pixels, or the file's content."""
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
            digest.update(self.source.info.get("exif") or b"")  # which may turn it
        return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Video:
    """One clip, from which `num_frames` frames are taken evenly; `None` leaves the number to the model."""

    source: Path | str | bytes | MediaRef
    num_frames: int | None = None


Part = Text | Image | Video


@dataclass(frozen=True, slots=True)
class Message:
    """What one speaker says: text and media in reading order."""

    role: Role
    parts: tuple[Part, ...]

    @staticmethod
    def of(role: Role, *parts: Part | str) -> Message:
        """A message from parts, plain strings becoming `Text`."""
        return Message(role, tuple(Text(part) if isinstance(part, str) else part for part in parts))

    @property
    def text(self) -> str:
        """The text parts joined, media left out."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Sample:
    """An id and a conversation, the one form in which data of every kind travels.

    `branches` are alternative continuations: each sees `messages` and itself, never another branch. Several
    questions about one picture share it that way. A branch that opens with the role that `messages` ends with
    continues that message. `template` overrides the template of the stage or the model.
    """

    id: str
    messages: tuple[Message, ...]
    branches: tuple[tuple[Message, ...], ...] = ()
    template: str | None = None

    def conversations(self) -> Iterator[tuple[Message, ...]]:
        """Every whole conversation: `messages` followed by each branch, or `messages` alone."""
        if not self.branches:
            yield self.messages
        for branch in self.branches:
            yield join_messages(self.messages, branch)

    @property
    def media(self) -> tuple[Image | Video, ...]:
        """The media of `messages` and of all branches, in reading order."""
        every = [*self.messages, *(message for branch in self.branches for message in branch)]
        return tuple(part for message in every for part in message.parts if isinstance(part, (Image, Video)))


def join_messages(head: tuple[Message, ...], tail: tuple[Message, ...]) -> tuple[Message, ...]:
    """`head` followed by `tail`; where the roles at the seam are equal, the two messages become one."""
    if head and tail and head[-1].role == tail[0].role:
        return (*head[:-1], Message(head[-1].role, head[-1].parts + tail[0].parts), *tail[1:])
    return head + tail
