"""`vila chat`: an interactive conversation with a model in the terminal, with history and completion."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.cli import options
from vila.cli.options import LoadOptions, SamplingOptions, check_fit, load_engine, open_model, with_option_groups
from vila.cli.prompt_input import (
    Question,
    check_text,
    check_video_file,
    image_of,
    load_image,
    place_media,
    video_of,
    with_system,
)
from vila.cli.run import stripped
from vila.core.errors import ConfigError, ContextOverflowError, VilaError, near_names
from vila.core.types import Image, Message, Video

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from rich.console import Console

    from vila.engine.engine import Engine
    from vila.engine.sampling_params import SamplingParams
    from vila.model.processor import VilaProcessor

CHAT_SAMPLING = SamplingOptions(max_new_tokens=512)


@with_option_groups
def chat(
    model: options.Model,
    system: options.System = None,
    num_video_frames: options.NumVideoFrames = None,
    loading: LoadOptions = options.LOAD,
    sampling: SamplingOptions = CHAT_SAMPLING,
) -> None:
    """Chat with [bold]MODEL[/bold]. /image PATH attaches an image to the next question; /help lists the commands."""
    from rich.console import Console

    from vila.core.files import cache_dir

    params = sampling.params()
    console = Console(highlight=False)
    with console.status(f"loading {model}"):
        checkpoint = open_model(model, loading)
        engine = load_engine(checkpoint, loading)
    conversation = Conversation(checkpoint.processor, system, num_video_frames)
    console.print(f"{model}: /help lists the commands, Ctrl-C stops an answer.", style="dim", markup=False)
    reader = LineReader("you> ", cache_dir() / "chat_history", list(COMMANDS))
    ChatSession(console, engine, params, conversation).run(reader.read)


# --- conversation state

_GIVE = "/image PATH and /video PATH attach media to the next question"


@dataclass(frozen=True, slots=True)
class Turn:
    """A question with the names of its media, and the answer. message: the user message, its videos as frames."""

    question: str
    media: Sequence[str]
    message: Message
    answer: str


@dataclass
class Conversation:
    """Turns so far, and the media attached to the next question."""

    processor: VilaProcessor
    system: str | None = None
    num_frames: int | None = None
    turns: list[Turn] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    """Names of the media that are attached to the next question."""
    _images: list[Image] = field(default_factory=list)
    _videos: list[Video] = field(default_factory=list)

    def add_image(self, name: str) -> str:
        """Attach an image to the next question. Returns a description. Raises MediaError."""
        image, (width, height) = load_image(image_of(name))
        self._images.append(image)
        return self._attach(name, f"{width}x{height}")

    def add_video(self, name: str) -> str:
        """Attach a video to the next question. Returns a description. Raises MediaError."""
        video = video_of(name, self.num_frames)
        check_video_file(video)
        frames = self.processor.frames(video, shrink=self.processor.spec)
        self._videos.append(video)
        return self._attach(name, f"{len(frames)} frames")

    def _attach(self, name: str, size: str) -> str:
        short = name if len(name) <= 80 else f"{name[:60]}..."
        self.pending.append(short)
        return f"attached {short} ({size}) to the next question"

    def messages(self, text: str) -> tuple[Message, ...]:
        """Return the turns so far and this question with its media. Raises MediaError and ConfigError.

        `<image>` and `<video>` markers in the text place the media; without markers, the media precede the text.
        """
        gap = self.processor.find_template().media_gap
        question = Question(
            check_text(text, "the question"), self._images, self._videos, where="the question", give=_GIVE
        )
        asked = [Message("user", place_media(question, gap))]
        past = [message for turn in self.turns for message in (turn.message, Message.of("assistant", turn.answer))]
        return with_system([*past, *self.processor.expand_videos(asked, gap, shrink=self.processor.spec)], self.system)

    def add_turn(self, text: str, message: Message, answer: str) -> None:
        """Add a turn with the pending media."""
        self.turns.append(Turn(text, tuple(self.pending), message, answer))
        self.drop_media()

    def drop_media(self) -> None:
        """Remove the pending media."""
        self.pending, self._images, self._videos = [], [], []

    def undo(self) -> str | None:
        """Remove the pending media, or else the last turn. Returns what was removed, None if there is nothing."""
        if self.pending:
            removed = ", ".join(self.pending)
            self.drop_media()
            return removed
        return self.turns.pop().question if self.turns else None

    def reset(self) -> None:
        """Remove all turns and pending media; the system prompt stays."""
        self.turns = []
        self.drop_media()


def split_names(text: str, exists: Callable[[str], bool] = lambda name: Path(name).expanduser().exists()) -> list[str]:
    """Split the argument of a command into file names or URLs with shell quoting.

    A URL and an existing file whose name has spaces stay whole.
    """
    import shlex

    if "://" in text or exists(text):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:
        return [text]


# --- chat loop

COMMANDS: Mapping[str, tuple[str, str]] = {
    "/image": ("PATH|URL", "attach an image to the next question; repeatable"),
    "/video": ("PATH|URL", "attach a video to the next question"),
    "/system": ("TEXT", "set the system prompt; without TEXT, restore the template's"),
    "/history": ("", "show the conversation"),
    "/undo": ("", "remove attached media, or else the last question and answer"),
    "/reset": ("", "clear the conversation and attached media"),
    "/help": ("", "list the commands"),
    "/quit": ("", "exit, like Ctrl-D"),
}
"""Argument and description by command."""
# "/usr/bin is what?" is a question.
_COMMAND = re.compile(r"(/[A-Za-z]+)(?:\s+(.*))?", re.DOTALL)


@dataclass
class ChatSession:
    """Read-answer loop. Errors are printed and do not end it."""

    console: Console
    engine: Engine
    sampling: SamplingParams
    conversation: Conversation

    def run(self, read: Callable[[], str]) -> None:
        """Answer line after line until /quit, end of input, or Ctrl-C twice at the prompt."""
        is_pressed = False
        while True:
            try:
                line = read()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.console.print()
                if is_pressed:
                    return
                is_pressed = True
                self._note("press Ctrl-C again, Ctrl-D or /quit to exit")
                continue
            is_pressed = False
            try:
                if line and not self.handle(line):
                    return
            except KeyboardInterrupt:
                self._note("stopped")
            except (VilaError, OSError, MemoryError, RuntimeError) as error:
                self.console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
                if isinstance(error, ContextOverflowError):
                    self._note("/undo and /reset shorten the conversation")

    def handle(self, line: str) -> bool:
        """Run a command or answer a question. Returns False for /quit."""
        command = _COMMAND.fullmatch(line)
        if command is None:
            self._answer(line)
            return True
        name, argument = command[1].lower(), (command[2] or "").strip()
        if name in ("/quit", "/exit"):
            return False
        actions: Mapping[str, Callable[[str], None]] = {
            "/image": lambda names: self._attach(names, self.conversation.add_image, "/image"),
            "/video": lambda names: self._attach(names, self.conversation.add_video, "/video"),
            "/system": self._set_system,
            "/history": lambda _: self._show_history(),
            "/undo": lambda _: self._undo(),
            "/reset": lambda _: self._reset(),
            "/help": lambda _: self._show_help(),
        }
        if name in actions:
            actions[name](argument)
            return True
        near = near_names(name, COMMANDS, 1)
        self._note(f"unknown command {name}; {f'did you mean {near[0]}?' if near else '/help lists the commands'}")
        return True

    def _answer(self, text: str) -> None:
        messages = self.conversation.messages(text)
        dropped = check_fit(self.engine.model.config, self.engine.processor, messages, self.sampling)
        if dropped:
            self._note(f"the {dropped} oldest messages exceed the context length and are dropped")
        answer, finish_reason = self._stream(messages)
        if not answer:
            self._note("empty answer; the question was discarded, attached media stay attached")
            return
        self.conversation.add_turn(text, messages[-1], answer)
        if finish_reason == "stopped":
            self._note("stopped; /undo removes this turn")
        elif finish_reason == "length":
            self._note("the answer reached --max-new-tokens")

    def _stream(self, messages: tuple[Message, ...]) -> tuple[str, str]:
        """Print the answer as it is generated. Returns it and its finish reason: stop, length, stopped (Ctrl-C)."""
        self.console.print("vila> ", style="bold green", end="")
        answer = ""
        reasons: list[str] = []
        try:
            for piece in stripped(self.engine.stream(messages, self.sampling), reasons):
                answer += piece
                self.console.print(piece, end="", markup=False, soft_wrap=True)
                sys.stdout.flush()
        except KeyboardInterrupt:
            reasons.append("stopped")
        finally:
            self.console.print()
        return answer.strip(), reasons[-1] if reasons else "stop"

    def _attach(self, names: str, add: Callable[[str], str], command: str) -> None:
        if not names:
            self._note(f"file name missing: {command} PATH or {command} URL")
        for name in split_names(names):
            self._note(add(name))

    def _set_system(self, text: str) -> None:
        self.conversation.system = text or None
        self._note("system prompt set" if text else "system prompt: the template's")

    def _undo(self) -> None:
        removed = self.conversation.undo()
        self._note("nothing to undo" if removed is None else f"removed: {removed}")

    def _reset(self) -> None:
        self.conversation.reset()
        self._note("conversation cleared")

    def _show_history(self) -> None:
        conversation = self.conversation
        if conversation.system is not None:
            self._note(f"system: {conversation.system}")
        for turn in conversation.turns:
            media = "".join(f"[{name}] " for name in turn.media)
            self.console.print(f"you> {media}{turn.question}", style="cyan", markup=False, soft_wrap=True)
            self.console.print(f"vila> {turn.answer}", style="green", markup=False, soft_wrap=True)
        if conversation.pending:
            self._note(f"attached to the next question: {', '.join(conversation.pending)}")
        if not conversation.turns and not conversation.pending:
            self._note("the conversation is empty")

    def _show_help(self) -> None:
        for name, (argument, description) in COMMANDS.items():
            self._note(f"{f'{name} {argument}':<18} {description}")
        self._note("anything else is a question; <image> in it marks the position of an image")

    def _note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, soft_wrap=True)


# --- line input


class LineReader:
    """Reads lines from a terminal (prompt_toolkit: editing, history file, completion), or from a pipe or file."""

    def __init__(self, prompt: str, history: Path, commands: Sequence[str] = ()) -> None:
        """history: file of earlier lines. commands: words that Tab completes at the start of a line."""
        self.prompt = prompt
        self._num_lines = 0
        self._session: Any = None
        if sys.stdin.isatty() and sys.stdout.isatty():
            from prompt_toolkit import PromptSession

            self._session = PromptSession(
                [("bold ansicyan", prompt)],
                history=_history(history),
                completer=_completer(commands),
                complete_while_typing=False,
            )
        elif isinstance(sys.stdin, io.TextIOWrapper):
            # A line that is not UTF-8 is an error of this line only; later lines are still read.
            sys.stdin.reconfigure(errors="surrogateescape")

    def read(self) -> str:
        """Return the next line, stripped; a pasted text of several lines is one. Lines of a pipe are echoed.

        Raises EOFError at the end, KeyboardInterrupt for Ctrl-C, ConfigError for a pipe or file without any line.
        """
        if self._session is not None:
            return str(self._session.prompt()).strip()
        line = sys.stdin.readline()
        if not line and not self._num_lines:
            hint = "run it in a terminal, or pipe one question per line"
            raise ConfigError("no lines", file="standard input", hint=hint)
        if not line:
            raise EOFError
        self._num_lines += 1
        sys.stdout.write(f"{self.prompt}{line.rstrip()}\n")
        sys.stdout.flush()
        return line.strip()


def _history(path: Path) -> History:
    from prompt_toolkit.history import FileHistory

    class CacheHistory(FileHistory):
        """History file; errors of reading and writing it are ignored."""

        def load_history_strings(self) -> list[str]:
            with contextlib.suppress(OSError):
                return list(super().load_history_strings())
            return []

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                super().store_string(string)

    return CacheHistory(path)


def _completer(commands: Sequence[str]) -> Completer:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class ChatCompleter(Completer):
        """Completes commands as the first word of a line, and paths as later words."""

        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            first, space, _ = document.text_before_cursor.partition(" ")
            if not space:
                for command in commands if first.startswith("/") else ():
                    if command.startswith(first):
                        yield Completion(f"{command} ", start_position=-len(first), display=command)
                return
            word = document.text_before_cursor.rpartition(" ")[2]
            yield from paths.get_completions(Document(word), complete_event)

    return ChatCompleter()
