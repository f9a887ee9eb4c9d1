"""`vila chat`: what the model is asked after each line, and what the person sees."""

import io

import pytest
from PIL import Image as PilImage
from rich.console import Console

from tests import tiny
from vila.cli.chat import COMMANDS, Session, Talk, split_names
from vila.core.types import Image, Message, Text
from vila.engine.request import SamplingParams, TokenEvent
from vila.model.loading import save_model


class Parrot:
    """Answers with the text of the last question; "boom" is too much for it, "silence" has no answer."""

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
def stage():
    """A session with a parrot: says lines to it and gives what was shown."""
    out = io.StringIO()
    engine = Parrot()
    console = Console(file=out, width=200, highlight=False)
    session = Session(console, engine, SamplingParams(max_new_tokens=16), Talk(engine.processor))

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

    say.engine, say.talk = engine, session.talk
    return say


def test_turns_and_pictures_build_up(stage, picture, tmp_path):
    other = tmp_path / "q.png"
    other.write_bytes(tiny.picture(2, (30, 20)).source)
    shown = stage(f"/image {picture}", f"/image {other}", "what?", "and?")
    assert "p.png (28x28) goes with the next question" in shown
    assert "q.png (30x20) goes with the next question" in shown
    assert "vila> what?!\n" in shown
    first, second = stage.engine.asked
    assert [type(part) for part in first[-1].parts] == [Image, Image, Text]
    assert second == (*first, Message.of("assistant", "what?!"), Message.of("user", "and?"))


def test_a_clip_is_expanded_once_and_stays_in_the_conversation(stage, tmp_path):
    clip = tmp_path / "c.gif"
    pictures = [PilImage.new("RGB", (28, 28), (20 * n, 0, 0)) for n in range(12)]
    pictures[0].save(clip, save_all=True, append_images=pictures[1:])
    shown = stage(f"/video {clip}", "what?", "and?")
    assert "c.gif (8 frames) goes with the next question" in shown
    asked = stage.engine.asked[-1]
    assert sum(isinstance(part, Image) for part in asked[0].parts) == 8
    assert asked[0] == stage.engine.asked[0][0]


def test_markers_place_the_pictures_that_wait(stage, picture):
    shown = stage(f"/image {picture}", "a <image> b <image>", "a <image> b")
    assert "error: the question: 2 <image> markers but 1 image given" in shown
    assert [type(part) for part in stage.engine.asked[0][0].parts] == [Text, Image, Text]


def test_a_marker_without_an_image_is_an_error_that_names_the_command_to_add_one(stage):
    shown = stage("<image> what?", "what?")
    assert "error: the question: 1 <image> marker but 0 images given; /image PATH" in shown
    assert len(stage.engine.asked) == 1


def test_undo_takes_back_media_first_then_exchanges(stage, picture):
    shown = stage("one", "two", f"/image {picture}", "/undo", "/undo", "three", "/undo", "/undo", "/undo")
    assert [line.partition(": ")[2] for line in shown.splitlines() if "taken back" in line] == [
        str(picture),
        "two",
        "three",
        "one",
    ]
    assert "nothing to take back" in shown
    assert [message.text for message in stage.engine.asked[-1]] == ["one", "one!", "three"]


def test_reset_forgets_all_but_the_system_text(stage, picture):
    stage("/system be kind", "one", f"/image {picture}", "/reset", "two")
    assert stage.engine.asked[-1] == (Message.of("system", "be kind"), Message.of("user", "two"))
    stage("/system", "three")
    assert stage.engine.asked[-1][0] == Message.of("user", "two")


def test_history_shows_who_said_what(stage, picture):
    assert "nothing was said yet" in stage("/history")
    shown = stage(f"/image {picture}", "what?", f"/image {picture}", "/history")
    assert f"you> [{picture}] what?\nvila> what?!\n" in shown
    assert f"waiting for the next question: {picture}" in shown


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(stage):
    stage.engine.interrupt_after = 4
    shown = stage("abcdef")
    assert "vila> abc\nstopped; /undo takes it back" in shown
    stage.engine.interrupt_after = None
    stage("on")
    assert [message.text for message in stage.engine.asked[-1]] == ["abcdef", "abc", "on"]


def test_ctrl_c_before_the_first_word_leaves_everything_as_it_was(stage, picture):
    stage("one", f"/image {picture}")
    stage.engine.interrupt_after = 0
    stage("two")
    assert [exchange.question for exchange in stage.talk.exchanges] == ["one"]
    assert stage.talk.waiting == [str(picture)]


def test_ctrl_c_at_the_prompt_leaves_at_the_second_press(stage):
    assert "Ctrl-C again, Ctrl-D or /quit leaves" in stage(KeyboardInterrupt, "one", KeyboardInterrupt, "two")
    stage(KeyboardInterrupt, KeyboardInterrupt, "never")
    assert [messages[-1].text for messages in stage.engine.asked] == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image none.png", "none.png: no such file"),
        ("/image", "which file? /image PATH or /image URL"),
        ("/video none.mp4", "none.mp4: no such file"),
        ("boom", "\nerror: out of memory"),
        ("x" * 600, "the prompt has 615 tokens and the answer may have 16"),
        ("x" * 600, "/undo and /reset make room here"),
        ("\udcff", "the question: not UTF-8 text"),
        ("/imgae a.png", "unknown command /imgae; did you mean /image?"),
        ("/zzz", "unknown command /zzz; /help lists the commands"),
        ("silence", "no answer; the question is forgotten"),
        ("long", "cut by --max-new-tokens"),
    ],
)
def test_what_goes_wrong_is_shown_and_the_conversation_goes_on(stage, line, message):
    shown = stage("before", line, "after")
    assert message in shown
    assert stage.engine.asked[-1][-1].text == "after"
    assert stage.engine.asked[-1][0].text == "before"


def test_a_bad_system_text_is_told_and_can_be_changed(stage):
    assert "the system text: not UTF-8 text" in stage("/system \udcff", "one", "/system", "two")
    assert stage.engine.asked == [(Message.of("user", "two"),)]


def test_oldest_turns_are_left_out_when_asked_and_told(stage):
    stage.engine.model.config.text_config.max_position_embeddings = 60
    assert "the prompt has" in stage("a" * 20, "b" * 20)
    out = io.StringIO()
    session = Session(Console(file=out), stage.engine, SamplingParams(16, overlong="truncate"), stage.talk)
    session.handle("b" * 20)
    assert "the 2 oldest messages do not fit the context and are left out" in out.getvalue()


def test_a_path_at_the_start_of_a_question_is_no_command(stage):
    stage("/usr/bin is what?", " /quit", "/QUIT", "never")
    assert [messages[-1].text for messages in stage.engine.asked] == ["/usr/bin is what?", " /quit"]


def test_help_names_every_command(stage):
    shown = stage("/help")
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
    assert "give one: --template vicuna_v1" in err


def test_bad_flags_end_before_anything_is_loaded(vila, model):
    code, _, err = vila("chat", model, "--temperature", "-1")
    assert code == 2
    assert "temperature=-1.0" in err
    assert "no such directory" in vila("chat", f"{model}/none")[2]
