"""The loop of `vila chat`: lines are commands or questions, and nothing that goes wrong ends the conversation."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vila.cli.answers import trimmed
from vila.cli.loading import check_fit
from vila.cli.talk import Talk, split_names
from vila.core.errors import ContextOverflowError, VilaError, near_names

if TYPE_CHECKING:
    from rich.console import Console

    from vila.core.types import Message
    from vila.engine.engine import Engine
    from vila.engine.request import Sampling

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
    sampling: Sampling
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
            for piece in trimmed(events, ends):
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
