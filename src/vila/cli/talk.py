"""The state of a conversation in the terminal: what was said, and the media that wait for the next question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vila.cli.conversation import Question, check_text, place_media, with_system
from vila.cli.media import check_clip, image_of, read_image, video_of
from vila.core.types import Image, Message, Video

if TYPE_CHECKING:
    from vila.model.processor import VilaProcessor


_GIVE = "/image PATH and /video PATH add media to the next question"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question, the names of its media, and its answer; `asked` is the user's turn with every clip expanded."""

    question: str
    media: Sequence[str]
    asked: Message
    answer: str


@dataclass
class Talk:
    """A conversation that grows, and shrinks again by `undo`."""

    processor: VilaProcessor
    system: str | None = None
    num_frames: int | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    """Names of the media that go with the next question."""
    _images: list[Image] = field(default_factory=list)
    _videos: list[Video] = field(default_factory=list)

    def add_picture(self, name: str) -> str:
        """Read an image for the next question; returns a line that describes it. Raises MediaError."""
        image, (width, height) = read_image(image_of(name))
        self._images.append(image)
        return self._wait(name, f"{width}x{height}")

    def add_clip(self, name: str) -> str:
        """Read a video for the next question; returns a line that describes it. Raises MediaError."""
        video = video_of(name, self.num_frames)
        check_clip(video)
        frames = self.processor.frames(video, shrink=self.processor.spec)
        self._videos.append(video)
        return self._wait(name, f"{len(frames)} frames")

    def _wait(self, name: str, what: str) -> str:
        short = name if len(name) <= 80 else f"{name[:60]}..."
        self.waiting.append(short)
        return f"{short} ({what}) goes with the next question"

    def messages(self, text: str) -> tuple[Message, ...]:
        """The conversation so far and this question with the media that wait. Raises MediaError and ConfigError.

        `<image>` and `<video>` in the text are the places of these; without any they go before it.
        """
        gap = self.processor.find_template().media_gap
        question = Question(
            check_text(text, "the question"), self._images, self._videos, where="the question", give=_GIVE
        )
        asked = Message("user", place_media(question, gap))
        said = [turn for one in self.exchanges for turn in (one.asked, Message.of("assistant", one.answer))]
        return with_system(
            [*said, *self.processor.expand_videos([asked], gap, shrink=self.processor.spec)], self.system
        )

    def keep(self, text: str, asked: Message, answer: str) -> None:
        """Add an exchange; its media no longer wait."""
        self.exchanges.append(Exchange(text, tuple(self.waiting), asked, answer))
        self.drop_media()

    def drop_media(self) -> None:
        """Forget the media that wait."""
        self.waiting, self._images, self._videos = [], [], []

    def undo(self) -> str | None:
        """Take back the media that wait, or else the last exchange; says which, or None when there is neither."""
        if self.waiting:
            taken = ", ".join(self.waiting)
            self.drop_media()
            return taken
        return self.exchanges.pop().question if self.exchanges else None

    def reset(self) -> None:
        """Forget everything but the system text."""
        self.exchanges = []
        self.drop_media()


def split_names(text: str, exists: Callable[[str], bool] = lambda name: Path(name).expanduser().exists()) -> list[str]:
    """The files or URLs that follow a command: one with spaces if there is such a file, else as a shell reads them."""
    import shlex

    if "://" in text or exists(text):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:
        return [text]
