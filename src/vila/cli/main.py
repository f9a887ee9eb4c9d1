"""The `vila` command. Building it and printing help imports no torch; each command imports what it needs."""

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

# Read by transformers when it is imported: its own progress bars would tear ours.
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
_RESUMED = "interrupted; what was finished is kept, and the same command goes on from there"

app = typer.Typer(
    name="vila",
    help="Train, evaluate and talk to visual language models, in VILA's three stages.",
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
    """Options before the command."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, of this process or as given. Every error is printed in one line, with its exit status.

    An exception that is none of ours exits with 70 and names a file with the traceback; VILA_TRACEBACK=1 raises it.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows another one.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app(arguments, prog_name="vila")
    except VilaError as error:
        if not error.is_repeated:
            _complain(str(error), error="" if isinstance(error, Interrupted) else "error: ")
        sys.exit(error.exit_code)
    except SystemExit as ended:
        # The command-line library turns Ctrl-C into this status and says nothing.
        if ended.code == 130:
            words = sys.argv[1:] if arguments is None else arguments
            resumable = any(tuple(words[: len(one)]) == one for one in _RESUMABLE)
            _complain(_RESUMED if resumable else "stopped", error="")
        raise
    except BrokenPipeError:
        # The reader of our output went away (`vila ... | head`); the interpreter must not write to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        # The outermost boundary: whatever gets here would end as a traceback, and a user cannot act on one.
        text, code = _system_error(error) or _own_fault(error)
        if code == _SOFTWARE_ERROR and os.environ.get(_SHOW_TRACEBACK):
            raise
        _complain(text)
        sys.exit(code)
    sys.exit(0)


def _system_error(error: Exception) -> tuple[str, int] | None:
    """Return message and exit status where files, disk or memory failed; None for everything else."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", 1
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return f"a file or standard output cannot be written: {error.strerror}", 1
    # PyTorch's class is named, not imported: importing it takes seconds.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"not enough memory{_reason(error)}", 1
    return None


def _own_fault(error: Exception) -> tuple[str, int]:
    found = f"this is a fault of vila {__version__}: {type(error).__name__}{_reason(error)}"
    if os.environ.get(_SHOW_TRACEBACK):
        return found, _SOFTWARE_ERROR
    return f"{found}; please report it with {_write_traceback(error)}", _SOFTWARE_ERROR


def _reason(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "")
    return f": {text}" if text else ""


def _write_traceback(error: Exception) -> str:
    """Write the traceback to a temporary file and return its name, or how to see the traceback where that fails."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="vila-traceback-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as stream:
            traceback.print_exception(error, file=stream)
    except OSError:
        return f"what the same command prints with {_SHOW_TRACEBACK}=1"
    return f"{stream.name} (or run it again with {_SHOW_TRACEBACK}=1)"


def _open_closed_streams() -> None:
    """Open the null device in place of standard streams that the caller closed, as `<&-` does.

    Python leaves None in their place, and the next file that is opened would take their descriptor.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 open to the end


def _complain(text: str, *, error: str = "error: ") -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(error, style="bold red") + Text(text), soft_wrap=True)


if __name__ == "__main__":
    main()
