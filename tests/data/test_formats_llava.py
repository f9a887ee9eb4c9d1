"""LLaVA records: the two ways of reading `<image>`, clips, and every mistake named by row and turn."""

import pytest

from tests.data.shards import write_list
from vila.core.errors import DataError
from vila.core.types import Image, Message, Text, Video
from vila.data.formats.llava_json import normalise_v1
from vila.data.formats.llava_json_v15 import normalise_v15
from vila.data.formats.protocol import FORMATS

BOTH = pytest.mark.parametrize("kind", ["llava_json", "llava_json_v15"])


def turns(*values):
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


def read(kind, record, folder, **options):
    return FORMATS[kind].open(write_list(folder / "d.json", [record]), folder, **options)[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What?\n<image>", "<image>\nWhat?"),
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("Compare <image> and <image>.", "<image>\nCompare  and ."),
        ("What?", "What?"),
        ("<image>", "<image>\n"),
    ],
)
def test_version_1_puts_one_marker_in_front(text, expected):
    assert normalise_v1([text]) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What?\n<image>", "What? <image>"),
        ("Compare <image> and <image>.", "Compare <image>\nand <image>\n."),
        ("<image><image>\nhi", "<image>\n <image>\nhi"),
        ("What?", "<image>\nWhat?"),
        ("<image>\nWhat?", "<image>\nWhat?"),
    ],
)
def test_version_1_5_keeps_markers_where_they_are(text, expected):
    assert normalise_v15([text]) == [expected]


def test_version_1_5_puts_a_missing_marker_before_the_first_question_only():
    assert normalise_v15(["a", "b"]) == ["<image>\na", "b"]
    assert normalise_v15(["a", "b <image>"]) == ["a", "b <image>"]


def test_version_1_gives_each_turn_with_markers_the_next_picture(tmp_path):
    record = {
        "image": ["p.png", "q.png"],
        "conversations": turns("One <image>", "1", "plain", "2", "<image><image> two", "3"),
    }
    messages = read("llava_json", record, tmp_path).messages
    assert messages[0] == Message.of("user", Image(tmp_path / "p.png"), "\nOne")
    assert messages[2] == Message.of("user", "plain")
    assert messages[4] == Message.of("user", Image(tmp_path / "q.png"), "\ntwo")


def test_version_1_5_shows_pictures_inside_the_text(tmp_path):
    record = {"image": ["p.png", "q.png"], "conversations": turns("Compare <image> and <image>.", "Same.")}
    first, second = Image(tmp_path / "p.png"), Image(tmp_path / "q.png")
    assert read("llava_json_v15", record, tmp_path).messages[0].parts == (
        Text("Compare "), first, Text("\nand "), second, Text("\n."),
    )  # fmt: skip


def test_version_1_5_accepts_a_picture_without_a_marker(tmp_path):
    record = {"image": "p.png", "conversations": turns("What?", "A cat.")}
    assert read("llava_json_v15", record, tmp_path).messages[0].parts == (Image(tmp_path / "p.png"), Text("\nWhat?"))


@BOTH
def test_a_clip_stands_before_the_first_question_and_all_turns_stay(kind, tmp_path):
    record = {"id": 3, "video": "v.mp4", "conversations": turns("<image>\n<video>\nWhat? ", "A cat.", "Why?", "So.")}
    sample = read(kind, record, tmp_path, num_frames=8)
    assert sample.id == "3"
    assert sample.messages[0].parts == (Video(tmp_path / "v.mp4", 8), Text("\nWhat?"))
    assert sample.messages[2:] == (Message.of("user", "Why?"), Message.of("assistant", "So."))
    assert read(kind, record, tmp_path).media[0].num_frames is None


@BOTH
def test_a_first_turn_of_the_assistant_is_left_out(kind, tmp_path):
    record = {"conversations": [{"from": "gpt", "value": "Hello"}, *turns("Hi", "Ho")]}
    assert read(kind, record, tmp_path).messages == (Message.of("user", "Hi"), Message.of("assistant", "Ho"))


@BOTH
def test_text_between_markers_of_other_kinds_is_text(kind, tmp_path):
    record = {"conversations": turns("say </s> <video> ### USER:", "x ASSISTANT: </s> y")}
    assert [message.text for message in read(kind, record, tmp_path).messages] == [
        "say </s> <video> ### USER:", "x ASSISTANT: </s> y",
    ]  # fmt: skip


WRONG = {
    "no conversations": ({"id": 1}, "row 1: expected an object with a list 'conversations'"),
    "no turns": ({"conversations": []}, "row 1: expected an object with a list 'conversations'"),
    "unknown from": ({"conversations": [{"from": "bot", "value": "x"}]}, "row 1 turn 1: from='bot'"),
    "two questions": ({"conversations": turns("a", "b") + turns("c")}, "last turn must be the assistant's"),
    "wrong order": (
        {"conversations": [*turns("a"), *turns("b", "c")]},
        "row 1 turn 2: expected a turn of the assistant, got 'user'",
    ),
    "two answers": (
        {"conversations": [*turns("a", "b"), {"from": "gpt", "value": "c"}]},
        "row 1 turn 3: expected a turn of the user, got 'assistant'",
    ),
    "only an answer": ({"conversations": [{"from": "gpt", "value": "a"}]}, "last turn must be the assistant's"),
    "empty answer": ({"conversations": turns("a", " \n")}, "row 1 turn 2: the answer is empty"),
    "marker without image": ({"conversations": turns("<image>\na", "b")}, "but the record has no image"),
    "marker in an answer": (
        {"image": "p.png", "conversations": turns("<image> x", "see <image>")},
        "row 1 turn 2: <image> inside an answer",
    ),
    "more images than markers": (
        {"image": ["p.png", "q.png"], "conversations": turns("<image> a", "b")},
        "row 1: 2 images but 1 <image> in its turns",
    ),
    "more markers than images": (
        {"image": "p.png", "conversations": turns("<image> a", "b", "<image> c", "d")},
        "row 1: 1 image but 2 <image>s in its turns",
    ),
    "image and video": (
        {"image": "p.png", "video": "v.mp4", "conversations": turns("a", "b")},
        "row 1: has both 'image' and 'video'",
    ),
    "image is a number": ({"image": 3, "conversations": turns("<image> a", "b")}, "row 1 image: 3 is neither"),
}


@BOTH
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_record_is_named(kind, name, tmp_path):
    record, message = WRONG[name]
    with pytest.raises(DataError, match=message):
        read(kind, record, tmp_path)


def test_version_1_refuses_a_picture_without_a_marker(tmp_path):
    with pytest.raises(DataError, match=r"d.json row 1: 1 image but 0 <image>s in its turns"):
        read("llava_json", {"image": "p.png", "conversations": turns("a", "b")}, tmp_path)


def test_version_1_5_counts_markers_of_one_turn_singly(tmp_path):
    record = {"image": "p.png", "conversations": turns("<image><image> a", "b")}
    with pytest.raises(DataError, match="1 image but 2 <image>s"):
        read("llava_json_v15", record, tmp_path)
    assert len(read("llava_json", record, tmp_path).media) == 1


def test_lists_and_lines_are_told_apart_by_their_content(tmp_path):
    record = {"conversations": turns("a", "b")}
    (tmp_path / "d.json").write_text(
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n'
    )
    lines = FORMATS["llava_json"].open(tmp_path / "d.json", tmp_path)[0]
    assert lines == read("llava_json", record, tmp_path)
