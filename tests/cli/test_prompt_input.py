"""Placement of media in a user turn, and the errors for markers and media that differ in number."""

import pytest

from vila.cli.prompt_input import Question, build_conversation, place_media, with_system
from vila.core.errors import ConfigError, MediaError
from vila.core.types import Image, Message, Text, Video

A, B, C = Image(b"a"), Image(b"b"), Video(b"c")


@pytest.mark.parametrize("gap", ["", "\n"])
def test_media_go_before_a_text_without_markers(gap):
    first, *_, last = place_media(Question("what?", [A, B], [C]), gap)
    assert first == A
    assert last == Text("what?")
    parts = place_media(Question("what?", [A]), gap)
    assert parts == (A, Text(f"{gap}what?"))


def test_no_gap_is_added_after_a_video():
    assert place_media(Question("what?", [], [C]), "\n") == (C, Text("what?"))


def test_markers_take_media_in_their_order():
    parts = place_media(Question("<image>1<video><image>", [A, B], [C]), "\n")
    assert parts == (A, Text("1"), C, B)


def test_a_gap_of_the_question_wins_over_the_templates():
    assert build_conversation(Question("q", [A], gap="\n"), "") == (Message.of("user", A, "\nq"),)


@pytest.mark.parametrize(
    ("question", "field", "hint"),
    [
        (Question("<image>", [A, B]), "--prompt", "write a marker for each"),
        (Question("<image><image>", [A]), "--prompt", "write a marker for each"),
        (Question("<image>", [], [C]), "--prompt", "write a marker for each"),
        (Question("<video><video>", [], [C], where="row"), "row", "write a marker for each"),
        (Question("<image> what?"), "--prompt", "pass --image FILE"),
        (Question("<video> what?"), "--prompt", "pass --image FILE or --video FILE"),
        (Question("<image> what?", where="prompt", give="name it"), "prompt", "name it"),
    ],
)
def test_numbers_of_markers_and_media_that_differ_are_refused(question, field, hint):
    with pytest.raises(MediaError) as caught:
        place_media(question, "\n")
    assert caught.value.field == field
    assert caught.value.hint.startswith(hint)


def test_a_second_system_text_is_refused():
    said = [Message.of("user", "q")]
    assert with_system(said, None) == tuple(said)
    assert with_system(said, "s")[0] == Message.of("system", "s")
    with pytest.raises(ConfigError) as caught:
        with_system(with_system(said, "s"), "t")
    assert caught.value.field == "--system"
