"""Parts of a conversation that the format `messages` takes and refuses; each refusal names file and row."""

import json

import pytest

from tests.data.shards import PIXELS, TEXT64, refusal, write_lines, write_parquet, write_tar
from vila.core.types import Image, Message, Text, Video
from vila.data.formats.base import FORMATS

SAY = {"type": "text", "text": "What?"}
GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}


def talk(*content):
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "Yes."}]}


def second(record, folder):
    """The sample of `record`, which is row 2 of its file."""
    return FORMATS["messages"].open(write_lines(folder / "d.jsonl", [GOOD, record]), folder)[1]


def refused(record, field, folder):
    error = refusal(lambda: second(record, folder))
    assert (error.file, error.record, error.field) == (str(folder / "d.jsonl"), 1, field)
    return error


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("url", ["http://example.org/p", "https://example.org/p", f"data:image/png;base64,{TEXT64}"])
def test_a_url_part_is_refused(kind, url, tmp_path):
    error = refused(talk(SAY, {"type": kind, "url": url}), "messages[0].content[1].url", tmp_path)
    assert error.value == url
    if url.startswith("http"):
        # The same address under a key that names a file.
        refused(talk({"type": kind, "path": url}), "messages[0].content[0].path", tmp_path)


def test_a_long_url_is_cut_in_the_message(tmp_path):
    part = {"type": "image", "url": "data:image/png;base64," + "A" * 10_000}
    error = refused(talk(part), "messages[0].content[0].url", tmp_path)
    assert len(str(error)) < 400


def test_an_image_url_part_is_refused(tmp_path):
    part = {"type": "image_url", "image_url": {"url": "http://example.org/p.png"}}
    assert refused(talk(part), "messages[0].content[0]", tmp_path).value == part


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("value", [3, True, [TEXT64], {"data": TEXT64}])
def test_a_base64_part_that_is_no_text_is_refused(kind, value, tmp_path):
    error = refused(talk({"type": kind, "base64": value}), "messages[0].content[0].base64", tmp_path)
    assert error.value == value


@pytest.mark.parametrize("value", ["%%%%", "abc", ""])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_base64_part_that_cannot_be_decoded_is_refused_when_it_is_read(kind, value, tmp_path):
    (medium,) = second(talk({"type": kind, "base64": value}), tmp_path).media
    error = refusal(medium.source.read)
    assert (error.record, error.field, error.value) == (1, "messages[0].content[0].base64", value)


def test_base64_in_a_column_of_bytes_is_read(tmp_path):
    part = {"type": "image", "base64": PIXELS, "text": None}
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": [{**SAY, "base64": None}]}]
    path = write_parquet(tmp_path / "d.parquet", [{"messages": messages}] * 2)
    assert FORMATS["messages"].open(path, tmp_path)[1].media[0].source.read() == PIXELS


def test_a_video_part_is_accepted(tmp_path):
    clip = {"type": "video", "path": "v.mp4"}
    sample = second(talk(clip, {**clip, "num_frames": 4}, {"type": "video", "video": "w.mp4"}, SAY), tmp_path)
    assert sample.messages[0] == Message.of(
        "user", Video(tmp_path / "v.mp4"), Video(tmp_path / "v.mp4", 4), Video(tmp_path / "w.mp4"), "What?"
    )


def test_a_video_part_names_a_member_of_its_shard(tmp_path):
    chat = talk({"type": "video", "file": "0.mp4", "num_frames": 2}, SAY)
    path = write_tar(tmp_path / "d.tar", [("k.0.mp4", b"clip"), ("k.json", json.dumps(chat))])
    (clip,) = FORMATS["webdataset"].open(path, tmp_path)[0].media
    assert clip.num_frames == 2 and clip.source.read() == b"clip" and clip.source.name == f"{path} k.0.mp4"


@pytest.mark.parametrize("frames", [0, -1, 2.5, "8", True])
def test_a_number_of_frames_that_is_none_is_refused(frames, tmp_path):
    part = {"type": "video", "path": "v.mp4", "num_frames": frames}
    assert refused(talk(part), "messages[0].content[0].num_frames", tmp_path).value == frames


@pytest.mark.parametrize("part", [{"type": "audio", "path": "a.wav"}, {"type": None}, {"path": "p.png"}, {}, None, 3])
def test_an_unknown_part_type_is_refused(part, tmp_path):
    assert refused(talk(SAY, part), "messages[0].content[1]", tmp_path).value == part


def beside(*turns, **media):
    """A record of plain text turns with media beside them, as LLaMA-Factory and ms-swift write it."""
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)], **media}


P, Q = "p.png", "q.png"


@pytest.mark.parametrize("key", ["images", "image"])
def test_media_beside_the_messages_go_to_their_markers(key, tmp_path):
    p, q = Image(tmp_path / P), Image(tmp_path / Q)
    sample = second(beside("<image>What?", "blue", "<image>\nAnd <this>?", "green", **{key: [P, Q]}), tmp_path)
    assert [message.parts for message in sample.messages] == [
        (p, Text("What?")), (Text("blue"),), (q, Text("\nAnd <this>?")), (Text("green"),),
    ]  # fmt: skip
    sample = second(beside("Compare <image> with <image>.", "a", **{key: [P, Q]}), tmp_path)
    assert sample.messages[0].parts == (Text("Compare "), p, Text(" with "), q, Text("."))
    assert second(beside("<image>What?", "a", **{key: P}), tmp_path).messages[0].parts == (p, Text("What?"))


def test_videos_go_to_their_own_markers(tmp_path):
    p, v = Image(tmp_path / P), Video(tmp_path / "v.mp4")
    sample = second(beside("<video>\nIs <image> in it?", "a", images=[P], videos=["v.mp4"]), tmp_path)
    assert sample.messages[0].parts == (v, Text("\nIs "), p, Text(" in it?"))
    assert second(beside("<video>?", "a", video="v.mp4"), tmp_path).media == (v,)


def test_markers_in_text_parts_and_in_branches_are_read_too(tmp_path):
    content = [{"type": "text", "text": "<image>a"}, {"type": "image"}, "b"]
    record = {**talk(*content), "branches": [beside("c<image>", "d")["messages"]], "images": [P, Q, "r.png"]}
    sample = second(record, tmp_path)
    assert [image.source.name for image in sample.media] == [P, Q, "r.png"]
    assert sample.branches[0][0].parts == (Text("c"), Image(tmp_path / "r.png"))


def test_sharegpt_turns_with_images_beside_are_read(tmp_path):
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "blue"}]
    record = {"conversations": turns, "images": [P], "system": "Be brief."}
    assert second(record, tmp_path).messages == (
        Message.of("system", "Be brief."), Message.of("user", Image(tmp_path / P), "What?"),
        Message.of("assistant", "blue"),
    )  # fmt: skip
    path = write_parquet(tmp_path / "d.parquet", [{"conversations": turns, "images": [{"bytes": PIXELS}]}])
    assert FORMATS["messages"].open(path, tmp_path)[0].media[0].source.read() == PIXELS


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (beside("<image>What?", "a", images=[P, Q]), "images"),
        (beside("<image><image>What?", "a", image=P), "image"),
        (beside("<image>What?", "a"), "images"),
        (beside("<image>What?", "a", images=[]), "images"),
        (beside("<image>What?", "a", videos=["v.mp4"]), "images"),
        (beside("<video>?", "a", videos=["v.mp4", "w.mp4"]), "videos"),
        (beside("<image>?", "see <image>", images=[P]), "messages[1].content"),
        (beside("?", "see <image>", images=[P]), "messages[1].content"),
        ({**talk({"type": "image"}), "images": [P, Q]}, "images"),
        ({**talk({"type": "image"}, {"type": "image"}), "images": [P]}, "images"),
        ({**talk({"type": "image"}, "<image>"), "images": [P]}, "images"),
        ({**talk({"type": "image", "path": P}), "images": [Q]}, "images"),
        ({**talk({"type": "video"}), "images": [Q]}, "messages[0].content[0]"),
        ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}, "images"),
        ({"messages": [{"role": "assistant", "content": "a"}], "images": [P]}, "messages"),
    ],
)
def test_another_number_of_markers_than_of_media_is_refused(record, field, tmp_path):
    refused(record, field, tmp_path)


def test_media_without_any_marker_stand_before_the_first_question(tmp_path):
    p, q, v = Image(tmp_path / P), Image(tmp_path / Q), Video(tmp_path / "v.mp4")
    assert second(beside("a", "b", "c", "d", images=[P, Q]), tmp_path).messages[0].parts == (p, q, Text("a"))
    assert second(beside("a", "b", images=[P], videos=["v.mp4"]), tmp_path).messages[0].parts == (p, v, Text("a"))
    sample = second({"messages": [], "branches": [beside("a", "b")["messages"]] * 2, "images": [P]}, tmp_path)
    assert sample.messages == (Message("user", (p,)),)


def test_text_that_spells_a_marker_is_text_where_nothing_stands_beside_it(tmp_path):
    part = {"type": "text", "text": "what does <image> do?"}
    assert second(talk(part), tmp_path).messages[0].text == "what does <image> do?"
    # An element of HTML.
    assert (
        second(beside("explain <video> tags", "<video> and <image>"), tmp_path).messages[0].text
        == "explain <video> tags"
    )
