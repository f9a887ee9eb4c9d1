"""Formats of questions and answers: messages, VFLAN and M3IT, FLAN, The Cauldron, videos."""

import base64

import pytest

from tests.data.good import MESSAGES
from tests.data.shards import OTHER_PIXELS, PIXELS, TEXT64, refusal, write_lines, write_parquet
from vila.core.types import Image, Message, Text, Video
from vila.data.formats.base import FORMATS


def lines(kind, rows, folder, **options):
    return FORMATS[kind].open(write_lines(folder / "d.jsonl", rows), folder, **options)


def table(kind, rows, folder):
    return FORMATS[kind].open(write_parquet(folder / "d.parquet", rows), folder)


def user(*content):
    return [
        {"role": "user", "content": list(content)},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
    ]


HERE = {"type": "image"}
SAY = {"type": "text", "text": "What?"}


def test_branches_and_template_are_read(tmp_path):
    row = {**MESSAGES[0], "branches": [[{"role": "user", "content": "q"}]], "template": "page"}
    sample = lines("messages", [row], tmp_path)[0]
    assert sample.branches == ((Message.of("user", "q"),),)
    assert sample.template == "page"


def test_parts_without_a_source_take_the_top_level_images_in_order(tmp_path):
    row = {"messages": user(HERE, SAY, HERE), "branches": [user(HERE)], "images": ["p.png", "q.png", "r.png"]}
    sample = lines("messages", [row], tmp_path)[0]
    assert [image.source.name for image in sample.media] == ["p.png", "q.png", "r.png"]


@pytest.mark.parametrize(
    "images",
    [[PIXELS, OTHER_PIXELS], [{"bytes": PIXELS, "path": None}, {"bytes": OTHER_PIXELS, "path": "x"}]],
    ids=["bytes", "objects"],
)
def test_a_table_has_a_column_of_images(images, tmp_path):
    sample = table("messages", [{"messages": user(HERE, SAY, HERE), "images": images}], tmp_path)[0]
    assert [image.source.read() for image in sample.media] == [PIXELS, OTHER_PIXELS]
    assert [type(part) for part in sample.messages[0].parts] == [Image, Text, Image]


def test_a_table_has_file_names_or_images_in_parts(tmp_path):
    rows = [{"messages": user(HERE, SAY), "images": [{"bytes": None, "path": "p.png"}]}]
    assert table("messages", rows, tmp_path)[0].media == (Image(tmp_path / "p.png"),)
    rows = [{"messages": user({"type": "image", "image": {"bytes": PIXELS, "path": None}}, SAY)}]
    assert table("messages", rows, tmp_path)[0].media[0].source.read() == PIXELS


def test_images_without_parts_go_before_the_first_question(tmp_path):
    rows = [{"messages": [{"role": "system", "content": "s"}, *user(SAY)], "images": ["p.png"]}]
    message = lines("messages", rows, tmp_path)[0].messages[1]
    assert message.parts == (Image(tmp_path / "p.png"), Text("What?"))


def test_a_part_with_base64_is_read(tmp_path):
    row = {"messages": user({"type": "image", "base64": TEXT64}, SAY)}
    image = lines("messages", [row], tmp_path)[0].media[0]
    assert image.source.read() == PIXELS
    assert image.name.endswith("d.jsonl, record 0, messages[0].content[0].base64")


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"id": 1}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"role": "bot", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "messages[0].content[0]"),
        ({"messages": user(HERE)}, "messages[0].content[0]"),
        ({"messages": user({"type": "video"})}, "messages[0].content[0]"),
        ({"messages": user({"type": "image", "path": "p", "file": "q"})}, "messages[0].content[0]"),
        ({"messages": user({"type": "video", "path": "v", "num_frames": 0})}, "messages[0].content[0].num_frames"),
        ({"messages": user({"type": "image", "url": "http://x/y"})}, "messages[0].content[0].url"),
        ({"messages": user({"type": "image_url", "image_url": "http://x/y"})}, "messages[0].content[0]"),
        ({"messages": user(SAY), "branches": 3}, "branches"),
        ({"messages": user(SAY), "branches": "text"}, "branches"),
        ({"messages": user(SAY), "branches": {"a": 1}}, "branches"),
        ({"messages": user(SAY), "branches": [3]}, "branches[0]"),
        ({"messages": user(SAY), "branches": user(SAY)}, "branches[0]"),
        ({"messages": user(SAY), "branches": [["x"]]}, "branches[0][0]"),
        ({"messages": user(SAY), "template": 3}, "template"),
        ({"messages": user(SAY), "template": ["page"]}, "template"),
        ({"messages": user(SAY), "template": "pge"}, "template"),
        ({"messages": user(SAY), "id": {}}, "id"),
        ({"messages": user(SAY), "images": 3}, "images"),
        ({"messages": user(SAY), "images": [3]}, "images[0]"),
        ({"messages": user(SAY), "videos": [["a.jpg", "b.jpg"]]}, "videos[0]"),
        ({"messages": user(SAY), "image": "p.png", "images": ["q.png"]}, "image"),
        ({"conversations": 3}, "conversations"),
        ({"conversations": [3]}, "conversations[0]"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "conversations[0].from"),
        ({"conversations": [{"from": "human", "value": 3}]}, "conversations[0].value"),
        ({"conversations": [{"from": "human", "value": "x"}], "system": 3}, "system"),
    ],
)
def test_a_wrong_conversation_is_an_error_with_its_field(row, field, tmp_path):
    error = refusal(lambda: lines("messages", [row], tmp_path)[0])
    assert (error.file, error.record, error.field) == (str(tmp_path / "d.jsonl"), 0, field)


def test_a_line_that_is_not_json_is_an_error(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"messages": []}\n{"messages": [\n')
    error = refusal(lambda: FORMATS["messages"].open(tmp_path / "d.jsonl", tmp_path)[1])
    assert (error.file, error.record) == (str(tmp_path / "d.jsonl"), 1)


def test_images_of_an_instruction_go_first_and_its_markers_are_removed(tmp_path):
    row = {"question": "See <image>\nand\n<image> <image>?  \n", "answer": "Yes. \n", "image": ["p.png", TEXT64]}
    sample = lines("vflan", [row], tmp_path)[0]
    first, second = sample.media
    assert sample.messages == (
        Message.of("user", first, "\n", second, "\nSee and ?"),
        Message.of("assistant", "Yes."),
    )
    assert first == Image(tmp_path / "p.png") and second.source.read() == PIXELS


def test_keys_of_other_files_and_records_of_m3it_are_read(tmp_path):
    rows = [
        {"question": "q", "answer:": "a", "image:": "p.png"},
        {"instruction": "Look. ", "inputs": "What?", "outputs": "a", "image_base64_str": [TEXT64]},
        {"question": "q", "answer": "a", "image": []},
    ]
    samples = list(lines("vflan", rows, tmp_path))
    assert [len(sample.media) for sample in samples] == [1, 1, 0]
    assert samples[1].messages[0].text == "\nLook. What?"


def test_a_visual_dialog_becomes_turns(tmp_path):
    head = "Answer.\nImage Descriptions: a cat"
    question = head + "\nQuestion: One?\nAnswer: 1.\nQuestion: Two?\nAnswer: 2.\nQuestion: Three\n?\n"
    sample = lines("vflan", [{"question": question, "answer": "3.", "image": [TEXT64]}], tmp_path)[0]
    assert sample.messages == (
        Message.of("user", sample.media[0], "\nOne?"), Message.of("assistant", "1."),
        Message.of("user", "Two?"), Message.of("assistant", "2."),
        Message.of("user", "Three?"), Message.of("assistant", "3."),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"question": "q", "answer": "a", "image": ["p.png"] * 9}, "image"),
        ({"question": "q", "answer": "a", "image": 3}, "image"),
        ({"question": "q", "answer": "a", "image": ["p.png", None]}, "image[1]"),
        ({"question": "q", "answer": "a", "image": "p.png", "images": ["q.png"]}, "images"),
        ({"question": "q", "answer": "  "}, "answer"),
        ({"question": "q", "answer": True}, "answer"),
        ({"question": "q"}, "answer or answer: or outputs"),
        ({"answer": "a"}, "question"),
        ({"instruction": "q", "inputs": 3, "outputs": "a"}, "inputs"),
        ({"question": "Image Descriptions x", "answer": "a"}, "question"),
        ({"question": "Image Descriptions\nQuestion: a\nAnswer: b", "answer": "a"}, "question"),
    ],
)
def test_a_wrong_instruction_is_an_error_with_its_field(row, field, tmp_path):
    error = refusal(lambda: lines("vflan", [row], tmp_path)[0])
    assert (error.file, error.record, error.field) == (str(tmp_path / "d.jsonl"), 0, field)


@pytest.mark.parametrize("empty", [None, "", []])
def test_an_empty_field_does_not_hide_the_images_of_another_name(empty, tmp_path):
    row = {"question": "q", "answer": "a", "image": empty, "images": ["p.png"]}
    assert lines("vflan", [row], tmp_path)[0].media == (Image(tmp_path / "p.png"),)


def test_max_images_is_an_option(tmp_path):
    row = {"question": "q", "answer": "a", "image": ["p.png"] * 9}
    assert len(lines("vflan", [row], tmp_path, max_images=9)[0].media) == 9


def test_text_cut_inside_base64_is_an_error(tmp_path):
    cut = base64.b64encode(PIXELS * 50).decode()[:-3]
    image = lines("vflan", [{"question": "q", "answer": "a", "image": [cut]}], tmp_path)[0].media[0]
    error = refusal(image.source.read)
    assert (error.record, error.field, error.value) == (0, "image[0]", cut)


def test_an_instruction_of_text_is_stripped_on_the_right(tmp_path):
    rows = [{"inputs": " q \n", "targets": "a \n"}]
    expected = (Message.of("user", " q"), Message.of("assistant", "a"))
    assert lines("flan", rows, tmp_path)[0].messages == table("flan", rows, tmp_path)[0].messages == expected
    assert refusal(lambda: lines("flan", [{"question": "q", "answer": ""}], tmp_path)[0]).field == "answer"
    assert refusal(lambda: lines("flan", [{"inputs": ["q"], "targets": "a"}], tmp_path)[0]).field == "inputs"


def test_images_of_the_cauldron_go_before_the_first_question(tmp_path):
    row = {
        "images": [{"bytes": PIXELS}, {"bytes": OTHER_PIXELS}],
        "texts": [{"user": "<image>a", "assistant": "1"}, {"user": "b", "assistant": "2"}],
    }
    sample = table("cauldron", [row], tmp_path)[0]
    first, second = sample.media
    assert sample.messages[0] == Message.of("user", first, "\n", second, "\na")
    assert sample.messages[2:] == (Message.of("user", "b"), Message.of("assistant", "2"))
    assert second.source.read() == OTHER_PIXELS


def test_videos_by_id_and_by_name(tmp_path):
    rows = [{"video_id": "w", "q": "<video>\nWhat?", "a": "A dog."}, {"video": "v.mp4", "q": "x"}]
    source = lines("video_json", rows, tmp_path, num_frames=8, suffix=".webm")
    assert source[0].messages == (
        Message.of("user", Video(tmp_path / "w.webm", 8), "\nWhat?"),
        Message.of("assistant", "A dog."),
    )
    assert refusal(lambda: source[1]).field == "conversations"
    for row, field in (
        ({"q": "x"}, "video or video_id"),
        ({"video_id": 3, "q": "x", "a": "y"}, "video_id"),
        ({"video_id": "", "q": "x", "a": "y"}, "video_id"),
        ({"video_id": "w", "q": None, "a": "y"}, "q"),
        ({"video_id": "w", "q": "x", "a": " "}, "a"),
    ):
        assert refusal(lambda row=row: lines("video_json", [row], tmp_path)[0]).field == field
