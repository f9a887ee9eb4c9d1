"""The `vila` command line: registers the commands, prints errors and sets exit codes.

Building it and printing help import no torch; each command imports what it needs.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# Read by transformers on import; its progress bars would break ours.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer

from vila import __version__
from vila.cli.bench import app as bench_app
from vila.cli.chat import chat
from vila.cli.compare import compare
from vila.cli.convert import convert
from vila.cli.data import app as data_app
from vila.cli.demo import demo
from vila.cli.doctor import doctor
from vila.cli.eval import evaluate
from vila.cli.export import export
from vila.cli.info import info
from vila.cli.plan import plan
from vila.cli.prompt_input import ShotCommand
from vila.cli.quantize import quantize
from vila.cli.quickstart import quickstart
from vila.cli.run import run
from vila.cli.score import score
from vila.cli.serve import serve
from vila.cli.submit import submit
from vila.cli.train import train
from vila.core.errors import Interrupted, VilaError

_SHOW_TRACEBACK = "VILA_TRACEBACK"
_SOFTWARE_ERROR = 70  # EX_SOFTWARE of sysexits.h
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_RESUMABLE = (("quickstart",), ("train",), ("eval",), ("data", "prepare"), ("quantize",))
_RESUMED = "interrupted; finished work is kept, and the same command resumes"

app = typer.Typer(
    name="vila",
    help="Train, evaluate, quantize and serve visual language models.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(quickstart)
# The original writes --num_video_frames and --top_p.
app.command(cls=ShotCommand, context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})(run)
app.command()(chat)
app.command()(train)
app.command()(plan)
app.command("eval")(evaluate)
app.command()(score)
app.command()(submit)
app.command()(compare)
app.command()(info)
app.command()(convert)
app.command()(quantize)
app.command()(export)
app.command()(serve)
app.command()(demo)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.command()(doctor)


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
