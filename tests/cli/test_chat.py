"""`vila chat`: messages passed to the engine after each line, and what is printed."""

import io

import pytest
from PIL import Image as PilImage
from rich.console import Console

from tests import tiny
from vila.cli.chat import COMMANDS, ChatSession, Conversation, split_names
from vila.core.types import Image, Message, Text
from vila.engine.request import SamplingParams, TokenEvent
from vila.model.loading import save_model


class EchoEngine:
    """Answers with the last question; "boom" raises an error, "silence" has an empty answer."""

    def __init__(self):
        self.model, self.processor = tiny.vila()
        self.asked = []
        self.interrupt_after = None

    def stream(self, messages, sampling):
        self.asked.append(messages)
        text = messages[-1].text
        if text == "boom":
            raise RuntimeError("out of memory")
        if text == "silence":
            yield TokenEvent(" ", "stop")
            return
        for number, letter in enumerate(f" {text}!"):
            if number == self.interrupt_after:
                raise KeyboardInterrupt
            yield TokenEvent(letter)
        yield TokenEvent("", "length" if text == "long" else "stop")


@pytest.fixture
def chat():
    """Function that passes lines to a chat session with an EchoEngine and returns the printed text."""
    out = io.StringIO()
    engine = EchoEngine()
    console = Console(file=out, width=200, highlight=False)
    session = ChatSession(console, engine, SamplingParams(max_new_tokens=16), Conversation(engine.processor))

    def say(*lines):
        waiting = iter(lines)

        def read():
            line = next(waiting, EOFError)
            if isinstance(line, str):
                return line
            raise line

        out.seek(0)
        out.truncate()
        session.run(read)
        return out.getvalue()

    say.engine, say.conversation = engine, session.conversation
    return say


def test_turns_and_pictures_build_up(chat, picture, tmp_path):
    other = tmp_path / "q.png"
    other.write_bytes(tiny.picture(2, (30, 20)).source)
    shown = chat(f"/image {picture}", f"/image {other}", "what?", "and?")
    assert "p.png (28x28)" in shown
    assert "q.png (30x20)" in shown
    assert "vila> what?!\n" in shown
    first, second = chat.engine.asked
    assert [type(part) for part in first[-1].parts] == [Image, Image, Text]
    assert second == (*first, Message.of("assistant", "what?!"), Message.of("user", "and?"))


def test_a_clip_is_expanded_once_and_stays_in_the_conversation(chat, tmp_path):
    clip = tmp_path / "c.gif"
    pictures = [PilImage.new("RGB", (28, 28), (20 * n, 0, 0)) for n in range(12)]
    pictures[0].save(clip, save_all=True, append_images=pictures[1:])
    shown = chat(f"/video {clip}", "what?", "and?")
    assert "c.gif (8 frames)" in shown
    asked = chat.engine.asked[-1]
    assert sum(isinstance(part, Image) for part in asked[0].parts) == 8
    assert asked[0] == chat.engine.asked[0][0]


def test_markers_place_the_pictures_that_wait(chat, picture):
    shown = chat(f"/image {picture}", "a <image> b <image>", "a <image> b")
    assert "error: the question: 2 <image> markers but 1 image given" in shown
    assert [type(part) for part in chat.engine.asked[0][0].parts] == [Text, Image, Text]


def test_a_marker_without_an_image_is_an_error_that_names_the_command_to_add_one(chat):
    shown = chat("<image> what?", "what?")
    assert "error: the question: 1 <image> marker but 0 images given; /image PATH" in shown
    assert len(chat.engine.asked) == 1


def test_undo_takes_back_media_first_then_exchanges(chat, picture):
    shown = chat("one", "two", f"/image {picture}", "/undo", "/undo", "three", "/undo", "/undo", "/undo")
    assert [line.partition(": ")[2] for line in shown.splitlines() if "removed" in line] == [
        str(picture),
        "two",
        "three",
        "one",
    ]
    assert "nothing to undo" in shown
    assert [message.text for message in chat.engine.asked[-1]] == ["one", "one!", "three"]


def test_reset_forgets_all_but_the_system_text(chat, picture):
    chat("/system be kind", "one", f"/image {picture}", "/reset", "two")
    assert chat.engine.asked[-1] == (Message.of("system", "be kind"), Message.of("user", "two"))
    chat("/system", "three")
    assert chat.engine.asked[-1][0] == Message.of("user", "two")


def test_history_shows_who_said_what(chat, picture):
    assert "the conversation is empty" in chat("/history")
    shown = chat(f"/image {picture}", "what?", f"/image {picture}", "/history")
    assert f"you> [{picture}] what?\nvila> what?!\n" in shown
    assert f"next question: {picture}" in shown


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(chat):
    chat.engine.interrupt_after = 4
    shown = chat("abcdef")
    assert "vila> abc\nstopped" in shown
    chat.engine.interrupt_after = None
    chat("on")
    assert [message.text for message in chat.engine.asked[-1]] == ["abcdef", "abc", "on"]


def test_ctrl_c_before_the_first_word_leaves_everything_as_it_was(chat, picture):
    chat("one", f"/image {picture}")
    chat.engine.interrupt_after = 0
    chat("two")
    assert [turn.question for turn in chat.conversation.turns] == ["one"]
    assert chat.conversation.pending == [str(picture)]


def test_ctrl_c_at_the_prompt_leaves_at_the_second_press(chat):
    assert "Ctrl-C again" in chat(KeyboardInterrupt, "one", KeyboardInterrupt, "two")
    chat(KeyboardInterrupt, KeyboardInterrupt, "never")
    assert [messages[-1].text for messages in chat.engine.asked] == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image none.png", "none.png: no such file"),
        ("/image", "/image PATH or /image URL"),
        ("/video none.mp4", "none.mp4: no such file"),
        ("boom", "\nerror: out of memory"),
        ("x" * 600, "615 tokens"),
        ("x" * 600, "/undo and /reset"),
        ("\udcff", "the question: not UTF-8 text"),
        ("/imgae a.png", "unknown command /imgae; did you mean /image?"),
        ("/zzz", "unknown command /zzz; /help lists the commands"),
        ("silence", "empty answer"),
        ("long", "--max-new-tokens"),
    ],
)
def test_what_goes_wrong_is_shown_and_the_conversation_goes_on(chat, line, message):
    shown = chat("before", line, "after")
    assert message in shown
    assert chat.engine.asked[-1][-1].text == "after"
    assert chat.engine.asked[-1][0].text == "before"


def test_a_bad_system_text_is_told_and_can_be_changed(chat):
    assert "the system text: not UTF-8 text" in chat("/system \udcff", "one", "/system", "two")
    assert chat.engine.asked == [(Message.of("user", "two"),)]


def test_oldest_turns_are_left_out_when_asked_and_told(chat):
    chat.engine.model.config.text_config.max_position_embeddings = 60
    assert "the prompt has" in chat("a" * 20, "b" * 20)
    out = io.StringIO()
    session = ChatSession(Console(file=out), chat.engine, SamplingParams(16, overlong="truncate"), chat.conversation)
    session.handle("b" * 20)
    assert "the 2 oldest messages" in out.getvalue()


def test_a_path_at_the_start_of_a_question_is_no_command(chat):
    chat("/usr/bin is what?", " /quit", "/QUIT", "never")
    assert [messages[-1].text for messages in chat.engine.asked] == ["/usr/bin is what?", " /quit"]


def test_help_names_every_command(chat):
    shown = chat("/help")
    assert all(name in shown for name in COMMANDS)


def test_names_are_read_as_typed_or_as_a_shell_would():
    assert split_names("my cat.png", exists=lambda name: True) == ["my cat.png"]
    assert split_names("'my cat.png' b.png", exists=lambda name: False) == ["my cat.png", "b.png"]
    assert split_names("my\\ cat.png", exists=lambda name: False) == ["my cat.png"]
    assert split_names("it's.png", exists=lambda name: False) == ["it's.png"]
    assert split_names("https://x/a b.png") == ["https://x/a b.png"]


def test_the_command_answers_lines_of_a_pipe(vila, model, picture, monkeypatch, tmp_path):
    monkeypatch.setenv("VILA_CACHE", str(tmp_path / "cache"))
    flags = ("--max-new-tokens", 3, "--dtype", "float32")
    clip = tmp_path / "c.gif"
    frames = [PilImage.new("RGB", (28, 28), (20 * n, 0, 0)) for n in range(5)]
    frames[0].save(clip, save_all=True, append_images=frames[1:])
    lines = f"/image {picture}\nwhat?\ngr\xfcn?\n/video {clip}\n/history\n".encode("latin-1")
    code, out, err = vila("chat", model, *flags, "--system", "x", "--num-video-frames", 3, stdin=lines)
    assert (code, err) == (0, "")
    _, answer, _ = vila("run", model, "-i", picture, "-p", "what?", *flags, "--system", "x")
    assert f"you> what?\nvila> {answer}" in out
    assert "error: the question: not UTF-8 text" in out
    assert "c.gif (3 frames)" in out
    assert not (tmp_path / "cache").exists()


def test_a_model_without_a_template_is_refused_at_once(vila, tmp_path):
    save_model(*tiny.vila(template=""), tmp_path / "bare")
    code, _, err = vila("chat", tmp_path / "bare", stdin=b"what?\n")
    assert code == 1
    assert "--template" in err


def test_bad_flags_end_before_anything_is_loaded(vila, model):
    code, _, err = vila("chat", model, "--temperature", "-1")
    assert code == 2
    assert "temperature=-1.0" in err
    assert "no such directory" in vila("chat", f"{model}/none")[2]
