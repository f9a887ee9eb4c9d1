"""`vila chat`: messages passed to the engine after each line, and what is printed."""

import io

import pytest
from PIL import Image as PilImage
from rich.console import Console

from tests import tiny
from tests.cli.printed import counts, words
from vila.cli.chat import COMMANDS, ChatSession, Conversation, split_names
from vila.core.errors import ConfigError, ContextOverflowError, LayoutError, MediaError, TemplateError, VilaError
from vila.core.types import Image, Message, Text
from vila.engine.sampling_params import SamplingParams, TokenEvent
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


class RecordingSession(ChatSession):
    """Keeps the errors of its lines, which it prints."""

    errors = ()

    def handle(self, line):
        try:
            return super().handle(line)
        except (VilaError, RuntimeError) as error:
            self.errors = (*self.errors, error)
            raise


@pytest.fixture
def chat():
    """Function that passes lines to a chat session with an EchoEngine and returns the printed text.

    `errors` of the function has the errors of the last lines.
    """
    out = io.StringIO()
    engine = EchoEngine()
    console = Console(file=out, width=200, highlight=False)
    session = RecordingSession(console, engine, SamplingParams(max_new_tokens=16), Conversation(engine.processor))

    def say(*lines):
        waiting = iter(lines)

        def read():
            line = next(waiting, EOFError)
            if isinstance(line, str):
                return line
            raise line

        out.seek(0)
        out.truncate()
        session.errors = ()
        session.run(read)
        say.errors = session.errors
        assert out.getvalue().count("error: ") == len(say.errors)
        assert all(f"error: {error}\n" in out.getvalue() for error in say.errors)
        return out.getvalue()

    say.engine, say.conversation = engine, session.conversation
    return say


def answers(shown):
    """The printed answers."""
    return [line.removeprefix("vila> ") for line in shown.splitlines() if line.startswith("vila> ")]


def test_turns_and_images_build_up(chat, image, tmp_path):
    other = tmp_path / "q.png"
    other.write_bytes(tiny.image(2, (30, 20)).source)
    shown = chat(f"/image {image}", f"/image {other}", "what?", "and?")
    assert words(shown) >= {"28x28", "30x20"}
    assert answers(shown) == ["what?!", "and?!"]
    first, second = chat.engine.asked
    assert [type(part) for part in first[-1].parts] == [Image, Image, Text]
    assert second == (*first, Message.of("assistant", "what?!"), Message.of("user", "and?"))


def test_a_video_is_expanded_once_and_stays_in_the_conversation(chat, tmp_path):
    video = tmp_path / "c.gif"
    images = [PilImage.new("RGB", (28, 28), (20 * n, 0, 0)) for n in range(12)]
    images[0].save(video, save_all=True, append_images=images[1:])
    shown = chat(f"/video {video}", "what?", "and?")
    assert counts(shown)["frames"] == 8
    asked = chat.engine.asked[-1]
    assert sum(isinstance(part, Image) for part in asked[0].parts) == 8
    assert asked[0] == chat.engine.asked[0][0]


def test_markers_place_the_images_that_are_attached(chat, image):
    chat(f"/image {image}", "a <image> b <image>", "a <image> b")
    assert [(type(error), error.field) for error in chat.errors] == [(MediaError, "the question")]
    assert [type(part) for part in chat.engine.asked[0][0].parts] == [Text, Image, Text]


def test_a_marker_without_an_image_is_an_error_that_names_the_command_to_add_one(chat):
    chat("<image> what?", "what?")
    (error,) = chat.errors
    assert (type(error), error.field) == (MediaError, "the question")
    assert "/image" in words(error.hint)
    assert len(chat.engine.asked) == 1


def test_undo_takes_back_media_first_then_exchanges(chat, image):
    shown = chat("one", "two", f"/image {image}", "/undo", "/undo", "three", "/undo", "/undo", "/undo")
    assert [line.partition(": ")[2] for line in shown.splitlines() if "removed" in line] == [
        str(image),
        "two",
        "three",
        "one",
    ]
    assert [message.text for message in chat.engine.asked[-1]] == ["one", "one!", "three"]


def test_reset_forgets_all_but_the_system_text(chat, image):
    chat("/system be kind", "one", f"/image {image}", "/reset", "two")
    assert chat.engine.asked[-1] == (Message.of("system", "be kind"), Message.of("user", "two"))
    chat("/system", "three")
    assert chat.engine.asked[-1][0] == Message.of("user", "two")


def test_history_shows_roles_and_texts(chat, image):
    chat(f"/image {image}", "what?", f"/image {image}")
    question, answer, attached = chat("/history").splitlines()
    assert (question, answer) == (f"you> [{image}] what?", "vila> what?!")
    assert str(image) in words(attached)


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(chat):
    chat.engine.interrupt_after = 4
    assert answers(chat("abcdef")) == ["abc"]
    chat.engine.interrupt_after = None
    chat("on")
    assert [message.text for message in chat.engine.asked[-1]] == ["abcdef", "abc", "on"]


def test_ctrl_c_before_the_first_word_leaves_everything_as_it_was(chat, image):
    chat("one", f"/image {image}")
    chat.engine.interrupt_after = 0
    chat("two")
    assert [turn.question for turn in chat.conversation.turns] == ["one"]
    assert chat.conversation.pending == [str(image)]


def test_ctrl_c_at_the_prompt_leaves_at_the_second_press(chat):
    assert chat(KeyboardInterrupt, "one", KeyboardInterrupt, "two").count("Ctrl-C") == 2
    chat(KeyboardInterrupt, KeyboardInterrupt, "never")
    assert [messages[-1].text for messages in chat.engine.asked] == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "kind", "fields"),
    [
        ("/image none.png", MediaError, {"file": "none.png"}),
        ("/video none.mp4", MediaError, {"file": "none.mp4"}),
        ("boom", RuntimeError, {}),
        ("x" * 600, ContextOverflowError, {}),
        ("\udcff", ConfigError, {"field": "the question"}),
    ],
)
def test_errors_are_printed_and_the_conversation_continues(chat, line, kind, fields):
    chat("before", line, "after")
    (error,) = chat.errors
    assert type(error) is kind
    assert vars(error).items() >= fields.items()
    assert [message.text for message in chat.engine.asked[-1]][::2] == ["before", "after"]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/image", {"/image"}),
        ("/imgae a.png", {"/imgae", "/image"}),
        ("/zzz", {"/zzz", "/help"}),
        ("x" * 600, {"600", "/undo", "/reset"}),
        ("long", {"--max-new-tokens"}),
        ("/undo", set()),
        ("/history", set()),
    ],
)
def test_notes_name_commands_and_flags(chat, line, named):
    shown = chat(line)
    assert shown
    assert words(shown) >= named


def test_a_question_with_an_empty_answer_is_discarded(chat):
    chat("silence", "after")
    assert [message.text for message in chat.engine.asked[-1]] == ["after"]


def test_a_bad_system_text_is_an_error_of_each_question_until_it_is_changed(chat):
    chat("/system \udcff", "one", "/system", "two")
    assert [(type(error), error.field) for error in chat.errors] == [(ConfigError, "the system text")]
    assert chat.engine.asked == [(Message.of("user", "two"),)]


def test_the_number_of_oldest_messages_that_truncation_drops_is_printed(chat):
    chat.engine.model.config.text_config.max_position_embeddings = 60
    chat("a" * 20, "b" * 20)
    assert [type(error) for error in chat.errors] == [ContextOverflowError]
    out = io.StringIO()
    session = ChatSession(Console(file=out), chat.engine, SamplingParams(16, overlong="truncate"), chat.conversation)
    session.handle("b" * 20)
    assert counts(out.getvalue())["oldest"] == 2


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


def test_the_command_answers_lines_of_a_pipe(vila, model, image, monkeypatch, tmp_path):
    monkeypatch.setenv("VILA_CACHE", str(tmp_path / "cache"))
    flags = ("--max-new-tokens", 3, "--dtype", "float32")
    video = tmp_path / "c.gif"
    frames = [PilImage.new("RGB", (28, 28), (20 * n, 0, 0)) for n in range(5)]
    frames[0].save(video, save_all=True, append_images=frames[1:])
    lines = f"/image {image}\nwhat?\ngr\xfcn?\n/video {video}\n/history\n".encode("latin-1")
    code, out, err = vila("chat", model, *flags, "--system", "x", "--num-video-frames", 3, stdin=lines)
    assert (code, err) == (0, "")
    _, answer, _ = vila("run", model, "-i", image, "-p", "what?", *flags, "--system", "x")
    asked, answered = (out.splitlines().index(line) for line in ("you> what?", f"vila> {answer.rstrip()}"))
    assert answered == asked + 1
    assert out.count("error: ") == 1
    assert counts(out)["frames"] == 3
    assert not (tmp_path / "cache").exists()


def test_a_model_without_a_template_is_refused_at_once(vila_error, tmp_path):
    save_model(*tiny.vila(template=""), tmp_path / "bare")
    error = vila_error("chat", tmp_path / "bare", stdin=b"what?\n")
    assert (type(error), error.field) == (TemplateError, "template")


def test_bad_flags_end_before_anything_is_loaded(vila_error, model):
    error = vila_error("chat", model, "--temperature", "-1")
    assert (error.exit_code, error.file) == (2, "sampling")
    assert "temperature=-1.0" in words(error.problem)
    error = vila_error("chat", f"{model}/none")
    assert (type(error), error.file) == (LayoutError, f"{model}/none")
