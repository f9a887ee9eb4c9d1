"""Questions and answers: messages, VFLAN and M3IT, FLAN, The Cauldron, clips."""

import base64

import pytest

from tests.data.good import MESSAGES
from tests.data.shards import OTHER_PIXELS, PIXELS, TEXT64, write_lines, write_parquet
from vila.core.errors import DataError
from vila.core.types import Image, Message, Text, Video
from vila.data.formats.protocol import FORMATS


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


def test_branches_and_template_travel(tmp_path):
    row = {**MESSAGES[0], "branches": [[{"role": "user", "content": "q"}]], "template": "page"}
    sample = lines("messages", [row], tmp_path)[0]
    assert sample.branches == ((Message.of("user", "q"),),)
    assert sample.template == "page"


def test_parts_without_a_source_take_the_pictures_in_turn(tmp_path):
    row = {"messages": user(HERE, SAY, HERE), "branches": [user(HERE)], "images": ["p.png", "q.png", "r.png"]}
    sample = lines("messages", [row], tmp_path)[0]
    assert [image.source.name for image in sample.media] == ["p.png", "q.png", "r.png"]


@pytest.mark.parametrize(
    "images",
    [[PIXELS, OTHER_PIXELS], [{"bytes": PIXELS, "path": None}, {"bytes": OTHER_PIXELS, "path": "x"}]],
    ids=["bytes", "objects"],
)
def test_a_table_holds_pictures_beside_the_messages(images, tmp_path):
    sample = table("messages", [{"messages": user(HERE, SAY, HERE), "images": images}], tmp_path)[0]
    assert [image.source.read() for image in sample.media] == [PIXELS, OTHER_PIXELS]
    assert [type(part) for part in sample.messages[0].parts] == [Image, Text, Image]


def test_a_table_may_name_files_or_hold_pictures_in_parts(tmp_path):
    rows = [{"messages": user(HERE, SAY), "images": [{"bytes": None, "path": "p.png"}]}]
    assert table("messages", rows, tmp_path)[0].media == (Image(tmp_path / "p.png"),)
    rows = [{"messages": user({"type": "image", "image": {"bytes": PIXELS, "path": None}}, SAY)}]
    assert table("messages", rows, tmp_path)[0].media[0].source.read() == PIXELS


def test_pictures_that_no_part_asks_for_stand_before_the_first_question(tmp_path):
    rows = [{"messages": [{"role": "system", "content": "s"}, *user(SAY)], "images": ["p.png"]}]
    message = lines("messages", rows, tmp_path)[0].messages[1]
    assert message.parts == (Image(tmp_path / "p.png"), Text("What?"))


def test_a_part_may_hold_base64(tmp_path):
    row = {"messages": user({"type": "image", "base64": TEXT64}, SAY)}
    image = lines("messages", [row], tmp_path)[0].media[0]
    assert image.source.read() == PIXELS
    assert image.name.endswith("row 1 messages[0].content[0].base64")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1}, "expected an object with a list 'messages'"),
        ({"messages": [{"role": "bot", "content": ""}]}, "message 1: role 'bot' is not one of"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is neither text nor a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "neither a text nor an image"),
        ({"messages": user(HERE)}, "message 1 part 1: an image part without a source, and no picture of 'images'"),
        ({"messages": user(HERE), "images": ["p", "q"]}, "2 images, but only 1 image parts that take them"),
        ({"messages": user({"type": "video"})}, "video part with no source"),
        ({"messages": user({"type": "image", "path": "p", "file": "q"})}, "image part with path and file"),
        ({"messages": user({"type": "video", "path": "v", "num_frames": 0})}, "num_frames 0 is not a positive"),
        ({"messages": user({"type": "image", "url": "http://x/y"})}, "is a URL; training reads local files only"),
        ({"messages": user({"type": "image_url", "image_url": "http://x/y"})}, "are local files"),
    ],
)
def test_a_wrong_conversation_is_named(row, message, tmp_path):
    with pytest.raises(DataError, match=f"d.jsonl row 1.*{message}"):
        lines("messages", [row], tmp_path)[0]


def test_a_line_that_is_not_json_is_named(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"messages": []}\n{"messages": [\n')
    with pytest.raises(DataError, match=r"d.jsonl row 2: not JSON"):
        FORMATS["messages"].open(tmp_path / "d.jsonl", tmp_path)[1]


def test_pictures_of_an_instruction_stand_in_front_and_its_markers_go(tmp_path):
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
    ("row", "message"),
    [
        ({"question": "q", "answer": "a", "image": ["p.png"] * 9}, "9 pictures, over the limit of 8"),
        ({"question": "q", "answer": "  "}, "turn 2: the answer is empty"),
        ({"question": "q"}, "has no 'answer' or 'answer:' or 'outputs'; it has 'question'"),
        ({"answer": "a"}, "has no 'question'"),
        ({"question": "Image Descriptions x", "answer": "a"}, "do not alternate"),
        ({"question": "Image Descriptions\nQuestion: a\nAnswer: b", "answer": "a"}, "do not alternate"),
    ],
)
def test_a_wrong_instruction_is_named(row, message, tmp_path):
    with pytest.raises(DataError, match=f"d.jsonl row 1.*{message}"):
        lines("vflan", [row], tmp_path)[0]


def test_the_limit_of_pictures_may_be_raised(tmp_path):
    row = {"question": "q", "answer": "a", "image": ["p.png"] * 9}
    assert len(lines("vflan", [row], tmp_path, max_images=9)[0].media) == 9


def test_text_that_is_cut_inside_base64_is_named(tmp_path):
    cut = base64.b64encode(PIXELS * 50).decode()[:-3]
    image = lines("vflan", [{"question": "q", "answer": "a", "image": [cut]}], tmp_path)[0].media[0]
    with pytest.raises(DataError, match=r"d.jsonl row 1 image\[0\]: not base64"):
        image.source.read()


def test_an_instruction_of_text_is_stripped_on_the_right(tmp_path):
    rows = [{"inputs": " q \n", "targets": "a \n"}]
    expected = (Message.of("user", " q"), Message.of("assistant", "a"))
    assert lines("flan", rows, tmp_path)[0].messages == table("flan", rows, tmp_path)[0].messages == expected
    with pytest.raises(DataError, match="row 1 turn 2: the answer is empty"):
        lines("flan", [{"question": "q", "answer": ""}], tmp_path)[0]


def test_pictures_of_the_cauldron_stand_before_the_first_question(tmp_path):
    row = {
        "images": [{"bytes": PIXELS}, {"bytes": OTHER_PIXELS}],
        "texts": [{"user": "<image>a", "assistant": "1"}, {"user": "b", "assistant": "2"}],
    }
    sample = table("cauldron", [row], tmp_path)[0]
    first, second = sample.media
    assert sample.messages[0] == Message.of("user", first, "\n", second, "\na")
    assert sample.messages[2:] == (Message.of("user", "b"), Message.of("assistant", "2"))
    assert second.source.read() == OTHER_PIXELS


def test_clips_by_id_and_by_name(tmp_path):
    rows = [{"video_id": "w", "q": "<video>\nWhat?", "a": "A dog."}, {"video": "v.mp4", "q": "x"}]
    source = lines("video_json", rows, tmp_path, num_frames=8, suffix=".webm")
    assert source[0].messages == (
        Message.of("user", Video(tmp_path / "w.webm", 8), "\nWhat?"),
        Message.of("assistant", "A dog."),
    )
    with pytest.raises(DataError, match="row 2: expected an object with a list 'conversations'"):
        source[1]
    with pytest.raises(DataError, match="row 1: has neither a 'video' nor a text 'video_id'"):
        lines("video_json", [{"q": "x"}], tmp_path)[0]
