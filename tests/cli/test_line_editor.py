"""Lines from a pipe, and the words that Tab completes."""

import io
import sys

import pytest

from vila.cli.chat import LineEditor, completions
from vila.core.errors import ConfigError


def test_lines_of_a_pipe_are_shown_and_end(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO("  one \n\ntwo"))
    with LineEditor("you> ", tmp_path / "history") as editor:
        assert [editor.read() for _ in range(3)] == ["one", "", "two"]
        with pytest.raises(EOFError):
            editor.read()
    assert capsys.readouterr().out == "you>   one\nyou> \nyou> two\n"
    assert not (tmp_path / "history").exists()


def test_an_input_without_any_line_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with LineEditor("you> ", tmp_path / "history") as editor, pytest.raises(ConfigError) as caught:
        editor.read()
    assert caught.value.file == "standard input"


def test_the_first_word_completes_to_a_command_and_later_ones_to_files(tmp_path, monkeypatch):
    for name in ("cat.png", "cap.png", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "cats").mkdir()
    monkeypatch.chdir(tmp_path)
    commands = ("/image", "/help")
    assert completions("/i", True, commands) == ["/image "]
    assert completions("wha", True, commands) == []
    assert completions("cat", False, commands) == ["cat.png", "cats/"]
    assert completions("", False, commands) == ["cap.png", "cat.png", "cats/"]
    assert completions(f"{tmp_path}/cap", False, commands) == [f"{tmp_path}/cap.png"]
    assert completions("none/x", False, commands) == []
