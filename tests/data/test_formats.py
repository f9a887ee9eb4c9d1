"""Every format gives samples, and a record that cannot become one is named by file and row."""

import json

import pytest

from vila.core.errors import DataError, UnknownNameError
from vila.core.types import Image, Message, Text
from vila.data.formats.protocol import FORMATS


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


GOOD = {
    "messages": [
        {
            "id": "a",
            "messages": [
                {"role": "user", "content": [{"type": "image", "path": "p.png"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": "A cat."},
            ],
        },
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "template": "chatml"},
    ],
    "llava_json": [
        {
            "id": "a",
            "image": "p.png",
            "conversations": [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A cat."}],
        },
        {"id": 2, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    ],
}


def opened(kind, rows, folder):
    path = folder / "data.json"
    if kind == "llava_json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        write(path, rows)
    return FORMATS[kind].open(path, folder)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_samples_by_index_with_media_unopened(kind, tmp_path):
    source = opened(kind, GOOD[kind], tmp_path)
    assert len(source) == 2
    assert source[0].id == "a"
    assert source[0].media == (Image(tmp_path / "p.png"),)
    assert source[0].messages[-1] == Message.of("assistant", "A cat.")
    assert source[1].messages == (Message.of("user", "Hi"), Message.of("assistant", "Ho"))
    assert source[1] == source[1]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_names_a_file_that_is_missing(kind, tmp_path):
    with pytest.raises(DataError, match="none.json: no such file"):
        FORMATS[kind].open(tmp_path / "none.json", tmp_path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd"])
def test_a_picture_outside_the_image_root_is_refused(kind, name, tmp_path):
    text = json.dumps(GOOD[kind][:1]).replace("p.png", name)
    with pytest.raises(DataError, match="leaves the image root"):
        opened(kind, json.loads(text), tmp_path)[0]


def test_a_symbolic_link_out_of_the_image_root_is_refused(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "p.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="leaves the image root"):
        opened("messages", GOOD["messages"], root)[0]


def test_the_old_placeholder_rule_puts_one_picture_in_front(tmp_path):
    first = opened("llava_json", GOOD["llava_json"], tmp_path)[0].messages[0]
    assert first.parts == (Image(tmp_path / "p.png"), Text("\nWhat?"))


def test_branches_and_template_travel(tmp_path):
    row = {**GOOD["messages"][0], "branches": [[{"role": "user", "content": "q"}]], "template": "page"}
    sample = opened("messages", [row], tmp_path)[0]
    assert sample.branches == ((Message.of("user", "q"),),)
    assert sample.template == "page"


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("messages", [], r"row 1: expected an object with a list 'messages'"),
        ("messages", {"messages": [{"role": "bot", "content": ""}]}, "row 1 message 1: role 'bot' is not one of"),
        ("messages", {"messages": [{"role": "user", "content": 3}]}, "content is neither text nor a list of parts"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "neither a text nor an image"),
        ("llava_json", {"id": 1}, "record 1: expected an object with a list 'conversations'"),
        ("llava_json", {"conversations": [{"from": "bot", "value": "x"}]}, "record 1 turn 1: from='bot'"),
        ("llava_json", {"conversations": [{"from": "human", "value": "<image>"}]}, "but the record has no image"),
        (
            "llava_json",
            {"image": "a.png", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
            "record 1: one image but 0 turns with <image>",
        ),
        (
            "llava_json",
            {"image": "a.png", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "<image>"}]},
            "record 1 turn 2: <image> inside an answer",
        ),
    ],
)
def test_a_record_that_cannot_become_a_sample_is_named(kind, row, message, tmp_path):
    with pytest.raises(DataError, match=message):
        opened(kind, [row], tmp_path)[0]


def test_a_line_that_is_not_json_is_named(tmp_path):
    (tmp_path / "data.json").write_text('{"messages": [\n')
    with pytest.raises(DataError, match=r"data.json row 1: not JSON"):
        FORMATS["messages"].open(tmp_path / "data.json", tmp_path)[0]


def test_an_unknown_format_suggests_a_near_one():
    with pytest.raises(UnknownNameError, match="unknown dataset format 'message'; did you mean 'messages'"):
        FORMATS["message"]
