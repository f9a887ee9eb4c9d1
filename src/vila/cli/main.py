"""The `vila` command line: registers the commands, prints errors and sets exit codes.

A command's module is imported when the command is called. Help of commands imports no torch.
"""

from __future__ import annotations

import copy
import errno
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

# Read by transformers on import; its progress bars would break ours.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from vila import __version__
from vila.core.errors import Interrupted, VilaError

_SHOW_TRACEBACK = "VILA_TRACEBACK"
_SOFTWARE_ERROR = 70  # EX_SOFTWARE of sysexits.h
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_RESUMABLE = (("quickstart",), ("train",), ("eval",), ("data", "prepare"), ("quantize",))
_RESUMED = "interrupted; finished work is kept, and the same command resumes"


@dataclass(frozen=True)
class _Entry:
    """A command: `module:attribute` of its function or Typer app, and its line in `vila --help`."""

    target: str
    summary: str


_COMMANDS = {
    "quickstart": _Entry(
        "vila.cli.quickstart:quickstart",
        "Train and evaluate a small visual language model, starting from an open LLM and vision tower.",
    ),
    "run": _Entry(
        "vila.cli.run:app",
        'Answer questions about images and videos: vila run [bold]MODEL[/bold] -i a.png -p "what is in the image?"',
    ),
    "chat": _Entry(
        "vila.cli.chat:chat",
        "Chat with [bold]MODEL[/bold]. /image PATH attaches an image to the next question; /help lists the commands.",
    ),
    "train": _Entry(
        "vila.cli.train:train", "Run the training stage of [bold]RECIPE[/bold]. Resumes after an interruption."
    ),
    "plan": _Entry(
        "vila.cli.plan:plan",
        "Estimate memory, batch, time and disk space of [bold]RECIPE[/bold]. Exit code 2 if it does not fit.",
    ),
    "eval": _Entry(
        "vila.cli.eval:evaluate", "Evaluate [bold]MODEL[/bold] on benchmarks. Resumes after an interruption."
    ),
    "score": _Entry(
        "vila.cli.score:score",
        "Score predictions with the published metric of a benchmark: percent, points for MME.",
    ),
    "submit": _Entry(
        "vila.cli.submit:submit",
        "Write and check submission files for the VQAv2, VizWiz and MMBench servers, and print the upload pages.",
    ),
    "compare": _Entry(
        "vila.cli.compare:compare",
        "Test whether [bold]SECOND[/bold] is better than [bold]FIRST[/bold] on their common questions.",
    ),
    "info": _Entry(
        "vila.cli.info:info",
        "Print layout, architecture, parameters and memory needs of [bold]MODEL[/bold]; reads no weights.",
    ),
    "convert": _Entry(
        "vila.cli.convert:convert",
        "Convert the model [bold]SRC[/bold] to another checkpoint layout in the directory [bold]DST[/bold].",
    ),
    "quantize": _Entry(
        "vila.cli.quantize:quantize",
        "Quantize the LLM of [bold]MODEL[/bold] to INT4. Resumes after an interruption.",
    ),
    "export": _Entry(
        "vila.cli.export:export",
        "Export [bold]MODEL[/bold] for another program, with a README that shows how to run it there.",
    ),
    "serve": _Entry(
        "vila.cli.serve:serve",
        "Serve one or several models with an OpenAI-compatible API: vila serve runs/starter/model",
    ),
    "demo": _Entry(
        "vila.cli.demo:demo",
        "Serve MODEL with a web page for chat about images and videos; two models are shown side by side.",
    ),
    "doctor": _Entry(
        "vila.cli.doctor:doctor",
        "Print versions, devices, dtypes and disk space. Exit code 1 if a required package is missing.",
    ),
    "data": _Entry("vila.cli.data:app", "Convert, check, inspect and count training data."),
    "bench": _Entry("vila.cli.bench:app", "Measure speed and quantization quality on this machine."),
}


class _Commands(Mapping[str, Any]):
    """The commands of `vila` by name, each imported on first use."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        entry = _COMMANDS[name]
        if name not in self._loaded:
            module, _, attribute = entry.target.partition(":")
            target = getattr(import_module(module), attribute)
            if not isinstance(target, typer.Typer):
                function, target = target, typer.Typer(rich_markup_mode="rich", add_completion=False)
                target.command(name)(function)
            self._loaded[name] = get_command(target)
            self._loaded[name].name = name
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_COMMANDS)

    def __len__(self) -> int:
        return len(_COMMANDS)


class _LazyGroup(TyperGroup):
    """Group that imports a command when it is called; its own help is printed from `_COMMANDS`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = _Commands()

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Return the names of the commands in the order of the help."""
        return list(self.commands)

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write the help, with the summary of each command instead of the command."""
        shown = copy.copy(self)
        shown.commands = {name: TyperCommand(name, help=entry.summary) for name, entry in _COMMANDS.items()}
        super(_LazyGroup, shown).format_help(ctx, formatter)


app = typer.Typer(
    name="vila",
    cls=_LazyGroup,
    help="Train, evaluate, quantize and serve visual language models.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"vila {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Define the options before the command."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit. Errors are printed in one line.

    arguments: words after `vila`; None takes those of the process.
    Exit codes: `VilaError.exit_code`, 130 for Ctrl-C, 141 for a closed pipe, 1 for failures of files, disk and memory.
    Any other exception is a bug: exit code 70 and a file with the traceback, or the traceback with VILA_TRACEBACK=1.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # Characters outside the terminal's encoding are replaced.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app(arguments, prog_name="vila")
    except VilaError as error:
        if not error.is_repeated:
            _print_error(str(error), prefix="" if isinstance(error, Interrupted) else "error: ")
        sys.exit(error.exit_code)
    except SystemExit as ended:
        # Typer turns Ctrl-C into this exit code without a message.
        if ended.code == 130:
            words = sys.argv[1:] if arguments is None else arguments
            resumable = any(tuple(words[: len(one)]) == one for one in _RESUMABLE)
            _print_error(_RESUMED if resumable else "stopped", prefix="")
        raise
    except BrokenPipeError:
        # The reader of standard output exited (`vila ... | head`); the interpreter must not write to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        # Outermost boundary: users get a message instead of a traceback.
        text, code = _system_error(error) or _bug_report(error)
        if code == _SOFTWARE_ERROR and os.environ.get(_SHOW_TRACEBACK):
            raise
        _print_error(text)
        sys.exit(code)
    sys.exit(0)


def _system_error(error: Exception) -> tuple[str, int] | None:
    """Return message and exit code for failures of files, disk and memory; None for other exceptions."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", 1
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return f"cannot write a file or standard output: {error.strerror}", 1
    # By name: importing PyTorch takes seconds.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"not enough memory{_reason(error)}", 1
    return None


def _bug_report(error: Exception) -> tuple[str, int]:
    found = f"this is a bug in vila {__version__}: {type(error).__name__}{_reason(error)}"
    if os.environ.get(_SHOW_TRACEBACK):
        return found, _SOFTWARE_ERROR
    return f"{found}; please report it with {_write_traceback(error)}", _SOFTWARE_ERROR


def _reason(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "")
    return f": {text}" if text else ""


def _write_traceback(error: Exception) -> str:
    """Write the traceback to a temporary file. Returns its name, or how to print the traceback if that fails."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="vila-traceback-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as stream:
            traceback.print_exception(error, file=stream)
    except OSError:
        return f"the traceback that {_SHOW_TRACEBACK}=1 prints"
    return f"{stream.name} (or run the command again with {_SHOW_TRACEBACK}=1)"


def _open_closed_streams() -> None:
    """Replace closed standard streams (`<&-`) by the null device.

    Python sets them to None, and the next opened file would get their descriptor.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 open until exit


def _print_error(text: str, *, prefix: str = "error: ") -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(prefix, style="bold red") + Text(text), soft_wrap=True)


if __name__ == "__main__":
    main()
