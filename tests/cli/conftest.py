"""A tiny model on disk, a picture, and the command line called in this process."""

import io
import sys

import pytest

from tests import tiny
from vila.cli.main import app, main
from vila.core.errors import VilaError
from vila.model.loading import save_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    save_model(*tiny.vila(), folder)
    return folder


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "p.png"
    path.write_bytes(tiny.picture(1).source)
    return path


def _text_stream(stdin):
    """Standard input over bytes or a binary stream; None is one that the caller closed, as Python shows it."""
    if stdin is None:
        return None
    return io.TextIOWrapper(io.BytesIO(stdin) if isinstance(stdin, bytes) else stdin, encoding="utf-8")


@pytest.fixture
def vila(monkeypatch, capsys):
    """Calls the command: exit status, standard output, standard error on one line."""

    def call(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", _text_stream(stdin))
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        return ended.value.code, out, " ".join(err.split())

    monkeypatch.setenv("COLUMNS", "400")
    return call


@pytest.fixture
def vila_error(monkeypatch, capsys):
    """Calls the command, which must fail, and returns the error that it raises."""

    def call(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", _text_stream(stdin))
        with pytest.raises(VilaError) as caught:
            app(list(map(str, arguments)), prog_name="vila")
        assert capsys.readouterr().out == ""
        return caught.value

    return call
