"""Examples on the command line: several words or one, and turns before the question."""

import json

import pytest

from tests import tiny
from vila.cli.prompt_input import Question, Shot, build_conversation, fold_words, parse_shot
from vila.core.errors import ConfigError, MediaError
from vila.core.types import Image, Message, Text
from vila.engine.engine import Engine

A, B = Image(b"a"), Image(b"b")


def parsed(*words):
    """The shots of a command line."""
    return [parse_shot(word.removeprefix("--shot=")) for word in fold_words(words) if word.startswith("--shot=")]


def test_words_given_one_by_one_and_one_quoted_word_are_the_same_shot():
    several = ["m", "--shot", "image=a.png", "question=Which one?", "text=a = b", "-p", "x"]
    quoted = ["m", "--shot", "image=a.png question=Which one? text=a = b", "-p", "x"]
    with_equals = ["m", "--shot=image=a.png", "question=Which one?", "text=a = b", "-p", "x"]
    (shot,) = parsed(*several)
    assert (str(shot.image.source), shot.question, shot.text) == ("a.png", "Which one?", "a = b")
    assert parsed(*quoted) == parsed(*with_equals) == [shot]
    assert [word for word in fold_words(several) if not word.startswith("--shot")] == ["m", "-p", "x"]


def test_a_word_of_its_own_may_hold_anything():
    assert parsed("--shot", "text=text=1 image=2", "question= q ") == [Shot("text=1 image=2", None, " q ")]


def test_folding_stops_at_other_words_and_at_the_end_of_options():
    assert len(parsed("--shot", "text=a", "--shot", "text=b", "model", "text=c")) == 2
    assert fold_words(["--shot", "text=a", "m", "k=v"])[1:] == ["m", "k=v"]
    assert fold_words(["--", "--shot", "text=a"]) == ["--", "--shot", "text=a"]
    assert fold_words(["--shot"]) == ["--shot"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("image=a.png",), "text="),
        (("image=a.png", "text= "), "text="),
        (("image=a.png", "txt=a"), "'txt'"),
        (("image=a.png txt=a circle",), "'txt'"),
        (("answer=a",), "'answer'"),
        (("a.png::what?::a",), "'a.png::what?::a'"),
        (("text=a", "text=b"), "text="),
        (("image=", "text=a"), "image="),
    ],
)
def test_errors_of_a_shot_name_the_key_and_the_given_words(words, problem):
    with pytest.raises(ConfigError) as caught:
        parsed("--shot", *words)
    assert (caught.value.field, caught.value.value) == ("--shot", " ".join(words))
    assert problem in caught.value.problem


def test_shots_become_turns_before_the_question():
    shots = [Shot("1", A), Shot("2", None, "two?"), Shot("3", B, "a <image> three?")]
    got = build_conversation(Question("q?", [A, B]), "\n", shots=shots, system="s")
    assert got == (
        Message.of("system", "s"),
        Message.of("user", A, "\nq?"),
        Message.of("assistant", "1"),
        Message.of("user", "two?"),
        Message.of("assistant", "2"),
        Message.of("user", "a ", B, " three?"),
        Message.of("assistant", "3"),
        Message("user", (A, Text("\n"), B, Text("\nq?"))),
    )


def test_a_shot_that_repeats_the_prompt_puts_its_image_at_the_prompts_marker():
    question = Question("look: <image> what?", [B])
    first, _, _ = build_conversation(question, "\n", shots=[Shot("1", A)])
    assert first == Message.of("user", "look: ", A, " what?")
    with pytest.raises(MediaError) as caught:
        build_conversation(question, "\n", shots=[Shot("1")])
    assert caught.value.field == "--shot 1"


def test_the_command_shows_the_model_its_shots(vila, model, image, tmp_path):
    other = tmp_path / "q.png"
    other.write_bytes(tiny.image(2).source)
    shots = ("--shot", f"image={other}", "text=a circle", "--shot", f"image={image} question=one? text=1")
    arguments = ("-i", image, "-p", "what?", "--json", "--max-new-tokens", 6, "--dtype", "float32")
    code, out, err = vila("run", *shots, model, *arguments)
    assert code == 0, err
    turns = [
        Message.of("user", Image(other), "what?"),
        Message.of("assistant", "a circle"),
        Message.of("user", Image(image), "one?"),
        Message.of("assistant", "1"),
        Message.of("user", Image(image), "what?"),
    ]
    expected = Engine.load(model, dtype="float32").complete([turns], max_new_tokens=6)[0]
    facts = json.loads(out)
    assert (facts["text"], facts["prompt_tokens"]) == (expected.text, expected.prompt_tokens)
