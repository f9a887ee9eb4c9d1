"""A tiny model on disk, an image, and the command line called in this process."""

import io
import sys

import pytest

from tests import tiny
from vila.cli.main import main
from vila.core.errors import VilaError
from vila.model.loading import save_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    save_model(*tiny.vila(), folder)
    return folder


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "p.png"
    path.write_bytes(tiny.image(1).source)
    return path


def _text_stream(stdin):
    """Standard input over bytes or a binary stream; None is one that the caller closed, as Python shows it."""
    if stdin is None:
        return None
    return io.TextIOWrapper(io.BytesIO(stdin) if isinstance(stdin, bytes) else stdin, encoding="utf-8")


class CommandLine:
    """Calls the command line in this process and captures what it prints.

    error: the `VilaError`, or typer's usage error, that ended the last call; None if there was none.
    """

    def __init__(self, monkeypatch, capsys):
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.error = None

    def __call__(self, *arguments, stdin=b""):
        """Return exit code, standard output, and standard error on one line."""
        self.monkeypatch.setattr(sys, "stdin", _text_stream(stdin))
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        # `main` and typer exit while they handle the error.
        self.error = ended.value.__context__
        out, err = self.capsys.readouterr()
        assert "Traceback" not in err
        return ended.value.code, out, " ".join(err.split())


@pytest.fixture
def vila(monkeypatch, capsys):
    """Calls the command: exit code, standard output, standard error on one line; `vila.error` is the error."""
    monkeypatch.setenv("COLUMNS", "400")
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def vila_error(vila):
    """Calls the command, which must fail without output, and returns the error whose message it prints."""

    def call(*arguments, stdin=b""):
        code, out, err = vila(*arguments, stdin=stdin)
        error = vila.error
        assert isinstance(error, VilaError), err
        assert (code, out) == (error.exit_code, "")
        assert " ".join(str(error).split()) in err
        return error

    return call
