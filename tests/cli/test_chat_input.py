"""Line input of `vila chat`: a terminal with history and completion, and lines of a pipe."""

import io
import sys

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from vila.cli.chat import LineReader, _completer
from vila.core.errors import ConfigError


@pytest.fixture
def terminal(monkeypatch):
    """Function that returns the lines read from typed text, and the exception that ended reading."""

    def type_text(text, history):
        with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
            keys.send_text(text)
            reader, lines = LineReader("you> ", history, ("/image", "/help")), []
            try:
                while True:
                    lines.append(reader.read())
            except (EOFError, KeyboardInterrupt) as error:
                return lines, type(error)

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    return type_text


def test_a_terminal_keeps_lines_in_the_history_file(terminal, tmp_path):
    history = tmp_path / "cache" / "chat_history"
    assert terminal(" one \r\x04", history) == (["one"], EOFError)
    assert terminal("\x1b[A\r\x03", history) == (["one"], KeyboardInterrupt)


def test_pasted_lines_are_one_question(terminal, tmp_path):
    assert terminal("\x1b[200~one\ntwo\x1b[201~\r\x04", tmp_path / "history")[0] == ["one\ntwo"]


def test_a_history_file_that_cannot_be_written_is_ignored(terminal, tmp_path):
    (tmp_path / "file").touch()
    assert terminal("one\r\x04", tmp_path / "file" / "history")[0] == ["one"]


def test_lines_of_a_pipe_are_echoed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO("  one \n\ntwo"))
    reader = LineReader("you> ", tmp_path / "history")
    assert [reader.read() for _ in range(3)] == ["one", "", "two"]
    with pytest.raises(EOFError):
        reader.read()
    assert capsys.readouterr().out == "you>   one\nyou> \nyou> two\n"
    assert not (tmp_path / "history").exists()


def test_a_pipe_without_any_line_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(ConfigError) as caught:
        LineReader("you> ", tmp_path / "history").read()
    assert caught.value.file == "standard input"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("/i", ["/image"]), ("wha", []), ("/image cat", ["cat.png", "cats/"]), ("/image none/x", [])],
)
def test_the_first_word_completes_to_a_command_and_later_words_to_paths(tmp_path, monkeypatch, text, expected):
    (tmp_path / "cat.png").touch()
    (tmp_path / "cats").mkdir()
    monkeypatch.chdir(tmp_path)
    found = _completer(("/image", "/help")).get_completions(Document(text), CompleteEvent())
    assert [completion.display_text for completion in found] == expected
