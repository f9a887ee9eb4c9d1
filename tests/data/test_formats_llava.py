"""LLaVA formats: `<image>` markers as in VILA 1.0 and 1.5, videos, and errors with record and turn."""

import pytest

from tests.data.shards import refusal, write_list
from vila.core.types import Image, Message, Text, Video
from vila.data.formats.base import FORMATS
from vila.data.formats.llava import normalise_v1, normalise_v15

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
        ("<image>", "<image>"),
        (" <image>\n", "<image>"),
        ("<image><image>", "<image>"),
    ],
)
def test_v1_puts_one_marker_before_the_question(text, expected):
    assert normalise_v1([text]) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What?\n<image>", "What? <image>"),
        ("Compare <image> and <image>.", "Compare <image>\nand <image>\n."),
        ("<image><image>\nhi", "<image>\n <image>\nhi"),
        ("What?", "<image>\nWhat?"),
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("<image>", "<image>"),
        ("  What? ", "<image>\nWhat?"),
        ("", "<image>"),
    ],
)
def test_v15_keeps_markers_in_place(text, expected):
    assert normalise_v15([text]) == [expected]


def test_v15_puts_a_missing_marker_before_the_first_question_only():
    assert normalise_v15(["a", "b"]) == ["<image>\na", "b"]
    assert normalise_v15(["a", "b <image>"]) == ["a", "b <image>"]


def test_v1_gives_each_turn_with_markers_the_next_image(tmp_path):
    record = {
        "image": ["p.png", "q.png"],
        "conversations": turns("One <image>", "1", "plain", "2", "<image><image> two", "3"),
    }
    messages = read("llava_json", record, tmp_path).messages
    assert messages[0] == Message.of("user", Image(tmp_path / "p.png"), "\nOne")
    assert messages[2] == Message.of("user", "plain")
    assert messages[4] == Message.of("user", Image(tmp_path / "q.png"), "\ntwo")


def test_v15_keeps_images_inside_the_text(tmp_path):
    record = {"image": ["p.png", "q.png"], "conversations": turns("Compare <image> and <image>.", "Same.")}
    first, second = Image(tmp_path / "p.png"), Image(tmp_path / "q.png")
    assert read("llava_json_v15", record, tmp_path).messages[0].parts == (
        Text("Compare "), first, Text("\nand "), second, Text("\n."),
    )  # fmt: skip


def test_v15_accepts_an_image_without_a_marker(tmp_path):
    record = {"image": "p.png", "conversations": turns("What?", "A cat.")}
    assert read("llava_json_v15", record, tmp_path).messages[0].parts == (Image(tmp_path / "p.png"), Text("\nWhat?"))


@BOTH
def test_a_video_goes_before_the_first_question_and_all_turns_stay(kind, tmp_path):
    record = {"id": 3, "video": "v.mp4", "conversations": turns("<image>\n<video>\nWhat? ", "A cat.", "Why?", "So.")}
    sample = read(kind, record, tmp_path, num_frames=8)
    assert sample.id == "3"
    assert sample.messages[0].parts == (Video(tmp_path / "v.mp4", 8), Text("\nWhat?"))
    assert sample.messages[2:] == (Message.of("user", "Why?"), Message.of("assistant", "So."))
    assert read(kind, record, tmp_path).media[0].num_frames is None


@BOTH
def test_a_first_turn_of_the_assistant_is_dropped(kind, tmp_path):
    record = {"conversations": [{"from": "gpt", "value": "Hello"}, *turns("Hi", "Ho")]}
    assert read(kind, record, tmp_path).messages == (Message.of("user", "Hi"), Message.of("assistant", "Ho"))


@BOTH
def test_markers_of_other_media_are_text(kind, tmp_path):
    record = {"conversations": turns("say </s> <video> ### USER:", "x ASSISTANT: </s> y")}
    assert [message.text for message in read(kind, record, tmp_path).messages] == [
        "say </s> <video> ### USER:", "x ASSISTANT: </s> y",
    ]  # fmt: skip


SPOKEN = {"from": "bot", "value": "x"}
WRONG = {
    "no conversations": ({"id": 1}, "conversations"),
    "no turns": ({"conversations": []}, "conversations"),
    "a turn that is text": ({"conversations": ["a"]}, "conversations[0]"),
    "unknown from": ({"conversations": [SPOKEN]}, "conversations[0].from"),
    "from is a list": ({"conversations": [{**SPOKEN, "from": ["human"]}]}, "conversations[0].from"),
    "value is a boolean": ({"conversations": [*turns("a"), {"from": "gpt", "value": True}]}, "conversations[1].value"),
    "two questions": ({"conversations": turns("a", "b") + turns("c")}, "conversations"),
    "wrong order": ({"conversations": [*turns("a"), *turns("b", "c")]}, "conversations[1]"),
    "two answers": ({"conversations": [*turns("a", "b"), {"from": "gpt", "value": "c"}]}, "conversations[2]"),
    "only an answer": ({"conversations": [{"from": "gpt", "value": "a"}]}, "conversations"),
    "empty answer": ({"conversations": turns("a", " \n")}, "conversations[1]"),
    "marker without image": ({"conversations": turns("<image>\na", "b")}, "image"),
    "marker in an answer": (
        {"image": "p.png", "conversations": turns("<image> x", "see <image>")},
        "conversations[1].value",
    ),
    "more images than markers": ({"image": ["p.png", "q.png"], "conversations": turns("<image> a", "b")}, "image"),
    "more markers than images": (
        {"image": "p.png", "conversations": turns("<image> a", "b", "<image> c", "d")},
        "image",
    ),
    "image and video": ({"image": "p.png", "video": "v.mp4", "conversations": turns("a", "b")}, "video"),
    "two videos": ({"video": ["v.mp4", "w.mp4"], "conversations": turns("a", "b")}, "video"),
    "image is a number": ({"image": 3, "conversations": turns("<image> a", "b")}, "image"),
    "image is a list of lists": ({"image": [["p.png"]], "conversations": turns("<image> a", "b")}, "image[0]"),
    "id is a list": ({"id": [1], "conversations": turns("a", "b")}, "id"),
}


@BOTH
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_record_is_an_error_with_its_field(kind, name, tmp_path):
    record, field = WRONG[name]
    error = refusal(lambda: read(kind, record, tmp_path))
    assert (error.file, error.record, error.field) == (str(tmp_path / "d.json"), 0, field)


def test_the_wrong_value_is_part_of_the_error(tmp_path):
    for name, value in (("unknown from", "bot"), ("value is a boolean", True), ("image is a number", 3)):
        assert refusal(lambda name=name: read("llava_json", WRONG[name][0], tmp_path)).value == value


def test_v1_has_an_error_for_an_image_without_a_marker(tmp_path):
    record = {"image": "p.png", "conversations": turns("a", "b")}
    assert refusal(lambda: read("llava_json", record, tmp_path)).field == "image"


def test_v15_counts_every_marker_of_a_turn(tmp_path):
    record = {"image": "p.png", "conversations": turns("<image><image> a", "b")}
    assert refusal(lambda: read("llava_json_v15", record, tmp_path)).field == "image"
    assert len(read("llava_json", record, tmp_path).media) == 1


def test_lists_and_lines_are_distinguished_by_content(tmp_path):
    record = {"conversations": turns("a", "b")}
    (tmp_path / "d.json").write_text(
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n'
    )
    lines = FORMATS["llava_json"].open(tmp_path / "d.json", tmp_path)[0]
    assert lines == read("llava_json", record, tmp_path)
