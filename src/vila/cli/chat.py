"""`vila chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING

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
    from rich.console import Console

    from vila.core.types import Message
    from vila.engine.engine import Engine
    from vila.engine.request import SamplingParams
    from vila.model.processor import VilaProcessor


CHAT_SAMPLING = SamplingOptions(max_new_tokens=512)


@with_option_groups
def chat(
    model: options.RequiredModel,
    system: options.System = None,
    num_video_frames: options.NumVideoFrames = None,
    loading: LoadOptions = options.LOAD,
    sampling: SamplingOptions = CHAT_SAMPLING,
) -> None:
    """Talk to [bold]MODEL[/bold]; /image PATH adds a picture to the next question, /help lists the rest."""
    from rich.console import Console

    from vila.core.files import cache_dir

    params = sampling.params()
    console = Console(highlight=False)
    with console.status(f"loading {model}"):
        checkpoint = open_model(model, loading)
        engine = load_engine(checkpoint, loading)
    talk = Talk(checkpoint.processor, system, num_video_frames)
    console.print(f"{model}: /help lists the commands, Ctrl-C stops an answer.", style="dim", markup=False)
    with LineEditor("you> ", cache_dir() / "chat_history", list(COMMANDS)) as editor:
        Session(console, engine, params, talk).run(editor.read)


# --- talk
# The state of a conversation in the terminal: what was said, and the media that wait for the next question.


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
        image, (width, height) = load_image(image_of(name))
        self._images.append(image)
        return self._wait(name, f"{width}x{height}")

    def add_clip(self, name: str) -> str:
        """Read a video for the next question; returns a line that describes it. Raises MediaError."""
        video = video_of(name, self.num_frames)
        check_video_file(video)
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


# --- session
# The loop of `vila chat`: lines are commands or questions, and nothing that goes wrong ends the conversation.


COMMANDS: Mapping[str, tuple[str, str]] = {
    "/image": ("PATH|URL", "adds a picture to the next question; several may wait"),
    "/video": ("PATH|URL", "adds a video to the next question"),
    "/system": ("TEXT", "sets the system text; alone it goes back to the template's"),
    "/history": ("", "shows the conversation"),
    "/undo": ("", "takes back waiting media, or else the last question and answer"),
    "/reset": ("", "forgets the conversation and waiting media"),
    "/help": ("", "shows this"),
    "/quit": ("", "leaves, as Ctrl-D does"),
}
"""Commands, what they take, what they do."""
# "/usr/bin is what?" is a question.
_COMMAND = re.compile(r"(/[A-Za-z]+)(?:\s+(.*))?", re.DOTALL)


@dataclass
class Session:
    """A terminal, an engine and what was said; errors are shown and end nothing."""

    console: Console
    engine: Engine
    sampling: SamplingParams
    talk: Talk

    def run(self, read: Callable[[], str]) -> None:
        """Answer line after line until /quit, the end of input, or Ctrl-C twice at the prompt."""
        pressed = False
        while True:
            try:
                line = read()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.console.print()
                if pressed:
                    return
                pressed = True
                self._note("Ctrl-C again, Ctrl-D or /quit leaves")
                continue
            pressed = False
            try:
                if line and not self.handle(line):
                    return
            except KeyboardInterrupt:
                self._note("stopped")
            except (VilaError, OSError, MemoryError, RuntimeError) as error:
                self.console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
                if isinstance(error, ContextOverflowError):
                    self._note("/undo and /reset make room here")

    def handle(self, line: str) -> bool:
        """Do what a line says; False when it says to leave."""
        command = _COMMAND.fullmatch(line)
        if command is None:
            self._ask(line)
            return True
        name, rest = command[1].lower(), (command[2] or "").strip()
        if name in ("/quit", "/exit"):
            return False
        actions: Mapping[str, Callable[[str], None]] = {
            "/image": lambda names: self._add(names, self.talk.add_picture, "/image PATH or /image URL"),
            "/video": lambda names: self._add(names, self.talk.add_clip, "/video PATH or /video URL"),
            "/system": self._set_system,
            "/history": lambda _: self._show_history(),
            "/undo": lambda _: self._undo(),
            "/reset": lambda _: self._reset(),
            "/help": lambda _: self._show_help(),
        }
        if name in actions:
            actions[name](rest)
            return True
        near = near_names(name, COMMANDS, 1)
        self._note(f"unknown command {name}; {f'did you mean {near[0]}?' if near else '/help lists the commands'}")
        return True

    def _ask(self, text: str) -> None:
        messages = self.talk.messages(text)
        dropped = check_fit(self.engine.model.config, self.engine.processor, messages, self.sampling)
        if dropped:
            self._note(f"the {dropped} oldest messages do not fit the context and are left out")
        answer, how = self._stream(messages)
        if answer:
            self.talk.keep(text, messages[-1], answer)
        note = {"stopped": "stopped; /undo takes it back", "length": "cut by --max-new-tokens"}.get(how, "")
        if note or not answer:
            self._note(note if answer else "no answer; the question is forgotten, media still wait")

    def _stream(self, messages: tuple[Message, ...]) -> tuple[str, str]:
        """Print the answer as it grows. Returns it and how it ended: stop, length, or stopped by Ctrl-C."""
        self.console.print("vila> ", style="bold green", end="")
        answer = ""
        ends: list[str] = []
        events = self.engine.stream(messages, self.sampling)
        try:
            for piece in stripped(events, ends):
                answer += piece
                self.console.print(piece, end="", markup=False, soft_wrap=True)
                sys.stdout.flush()
        except KeyboardInterrupt:
            ends.append("stopped")
        finally:
            self.console.print()
        return answer.strip(), ends[-1] if ends else "stop"

    def _add(self, names: str, add: Callable[[str], str], form: str) -> None:
        if not names:
            self._note(f"which file? {form}")
        for name in split_names(names):
            self._note(add(name))

    def _set_system(self, text: str) -> None:
        self.talk.system = text or None
        self._note("system text set" if text else "system text: the template's own")

    def _undo(self) -> None:
        taken = self.talk.undo()
        self._note("nothing to take back" if taken is None else f"taken back: {taken}")

    def _reset(self) -> None:
        self.talk.reset()
        self._note("forgotten")

    def _show_history(self) -> None:
        if self.talk.system is not None:
            self._note(f"system: {self.talk.system}")
        for exchange in self.talk.exchanges:
            media = "".join(f"[{name}] " for name in exchange.media)
            self.console.print(f"you> {media}{exchange.question}", style="cyan", markup=False, soft_wrap=True)
            self.console.print(f"vila> {exchange.answer}", style="green", markup=False, soft_wrap=True)
        if self.talk.waiting:
            self._note(f"waiting for the next question: {', '.join(self.talk.waiting)}")
        if not self.talk.exchanges and not self.talk.waiting:
            self._note("nothing was said yet")

    def _show_help(self) -> None:
        for name, (takes, does) in COMMANDS.items():
            self._note(f"{f'{name} {takes}':<18} {does}")
        self._note("anything else is a question; <image> in it says where a picture goes")

    def _note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, soft_wrap=True)


# --- line_editor
# Lines typed at a prompt, with editing and a history where the terminal and Python's readline allow it.


_KEPT_LINES = 1000


class LineEditor:
    """Reads lines; used as a context manager, which keeps the history in a file.

    commands: words that Tab completes at the start of a line; after a space it completes names of files.
    """

    def __init__(self, prompt: str, history: Path, commands: Sequence[str] = ()) -> None:
        self.prompt, self.history, self.commands = prompt, history, commands
        self._num_lines = 0
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._readline = _readline() if self._interactive else None
        if isinstance(sys.stdin, io.TextIOWrapper):
            # Whoever reads the line says what is wrong with it; the lines after it are still read.
            sys.stdin.reconfigure(errors="surrogateescape")

    def __enter__(self) -> LineEditor:
        if self._readline is not None:
            with contextlib.suppress(OSError):
                self._readline.read_history_file(self.history)
            self._readline.set_history_length(_KEPT_LINES)
            self._readline.set_completer_delims(" \t")
            self._readline.set_completer(self._complete)
            self._readline.parse_and_bind("tab: complete")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._readline is not None:
            # A cache that cannot be written costs the history, not the conversation.
            with contextlib.suppress(OSError):
                self.history.parent.mkdir(parents=True, exist_ok=True)
                self._readline.write_history_file(self.history)

    def read(self) -> str:
        """Return the next line, stripped. Lines that come through a pipe are shown as if they had been typed.

        Raises EOFError at the end, KeyboardInterrupt at Ctrl-C, and ConfigError for a pipe or file without any line.
        """
        if self._interactive:
            try:
                return input(self._shown_prompt()).strip()
            except EOFError:
                sys.stdout.write("\n")
                raise
        line = sys.stdin.readline()
        if not line and not self._num_lines:
            raise ConfigError(
                "holds no line", file="standard input", hint="start it in a terminal, or pipe one question per line"
            )
        if not line:
            raise EOFError
        self._num_lines += 1
        sys.stdout.write(f"{self.prompt}{line.rstrip()}\n")
        sys.stdout.flush()
        return line.strip()

    def _shown_prompt(self) -> str:
        if self._readline is None or os.environ.get("NO_COLOR"):
            return self.prompt
        # The bytes 1 and 2 tell readline which characters take no room on the line.
        return f"\x01\x1b[1;36m\x02{self.prompt}\x01\x1b[0m\x02"

    def _complete(self, text: str, state: int) -> str | None:
        assert self._readline is not None
        found = completions(text, self._readline.get_begidx() == 0, self.commands)
        return found[state] if state < len(found) else None


def completions(text: str, first: bool, commands: Sequence[str]) -> list[str]:
    """What the word `text` may become: a command when it is the first of a line, else files below what it names."""
    if first:
        return [f"{command} " for command in commands if command.startswith(text)] if text.startswith("/") else []
    folder, _, start = text.rpartition("/")
    where = Path(f"{folder}/" if folder or text.startswith("/") else ".").expanduser()
    with contextlib.suppress(OSError):
        names = sorted(path.name + ("/" if path.is_dir() else "") for path in where.iterdir())
        shown = [name for name in names if name.startswith(start) and (start or not name.startswith("."))]
        return [text[: len(text) - len(start)] + name for name in shown]
    return []


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # Windows
        return None
    return readline
