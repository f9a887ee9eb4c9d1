"""What the flags of `vila run` ask: where the question comes from, and what goes with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import typer

from vila.cli.conversation import Question, build_conversation, check_text, with_system
from vila.cli.media import check_clip, image_of, open_pictures, opened, video_of
from vila.cli.original import read_query
from vila.cli.shots import Shot, with_opened
from vila.core.errors import ConfigError, MediaError
from vila.core.types import Message

WriteConversation = Callable[[str], Sequence[Message]]
"""Gives the messages, with the template's `media_gap` after pictures that are put before a question."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The flags that make up a question. images, videos: paths and URLs; None stands for a flag that was not given."""

    prompt: str | None = None
    query: str | None = None
    messages: Path | None = None
    batch: Path | None = None
    images: Sequence[str] = ()
    videos: Sequence[str] = ()
    shots: Sequence[Shot] = ()
    system: str | None = None
    num_frames: int | None = None

    def check(self) -> None:
        """Raises ConfigError when there are two questions, or flags that do not go with where it comes from."""
        sources = {
            "--prompt": self.prompt,
            "--query": self.query,
            "--messages": self.messages,
            "--batch": self.batch,
        }
        given = [name for name, value in sources.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} were given, and each is the question; give one of them")
        aside = {"--image": self.images, "--video": self.videos, "--shot": self.shots}
        if self.batch is not None:
            del aside["--shot"]
        for name, value in aside.items():
            if value and given in (["--messages"], ["--batch"]):
                raise ConfigError(f"{name} does not go with {given[0]}; write it into the file")

    def conversation(self) -> WriteConversation:
        """The one conversation that is asked for, its pictures decoded and its text read from wherever it comes."""
        if self.messages is not None:
            messages = _messages(self.messages, self.num_frames, self.system)
            return lambda gap: messages
        clips = [video_of(name, self.num_frames) for name in self.videos]
        for clip in clips:
            check_clip(clip)
        images = [opened(image_of(name)) for name in self.images]
        shots = with_opened(self.shots)
        if self.query is not None:
            question = read_query(check_text(self.query, "--query"), images, clips)
        else:
            question = Question(self._text(), images, clips)
        # An image without a word is a question only where the empty text was written down: captions, few-shot prompts.
        if not question.text.strip() and (self._is_piped or not (images or clips)):
            raise ConfigError(
                "the question is empty",
                field="standard input" if self._is_piped else "--prompt" if self.query is None else "--query",
                hint="give --prompt TEXT, or pipe the question in; --prompt '' asks about an image without a word",
            )
        return partial(build_conversation, question, shots=shots, system=self.system)

    @property
    def _is_piped(self) -> bool:
        """Whether the question comes from standard input."""
        return self.query is None and self.prompt in (None, "-")

    def _text(self) -> str:
        if self.prompt is not None and self.prompt != "-":
            return check_text(self.prompt, "--prompt")
        if self.prompt is None and sys.stdin.isatty():
            raise ConfigError("no question", field="--prompt", hint="give --prompt TEXT, or pipe the question in")
        from vila.cli.question_files import read_question

        return read_question(typer.get_binary_stream("stdin"))


def _messages(path: Path, num_frames: int | None, system: str | None) -> tuple[Message, ...]:
    from vila.cli.question_files import read_messages

    messages = with_system(read_messages(path, num_frames), system)
    try:
        return open_pictures(messages)
    except MediaError as error:
        raise MediaError(f"{path}: {error}") from error
