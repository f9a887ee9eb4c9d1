"""Lines typed at a prompt, with editing and a history where the terminal and Python's readline allow it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, TracebackType

from vila.core.errors import ConfigError

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
