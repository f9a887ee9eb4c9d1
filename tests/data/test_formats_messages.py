"""Format `messages`: accepted and rejected message parts; errors have file and record."""

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
    """Return the sample of `record`, the third of its file."""
    return FORMATS["messages"].open(write_lines(folder / "d.jsonl", [GOOD, record]), folder)[1]


def refused(record, field, folder):
    error = refusal(lambda: second(record, folder))
    assert (error.file, error.record, error.field) == (str(folder / "d.jsonl"), 1, field)
    return error


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("url", ["http://example.org/p", "https://example.org/p", f"data:image/png;base64,{TEXT64}"])
def test_a_url_part_is_an_error(kind, url, tmp_path):
    error = refused(talk(SAY, {"type": kind, "url": url}), "messages[0].content[1].url", tmp_path)
    assert error.value == url
    if url.startswith("http"):
        # The same address under a key that names a file.
        refused(talk({"type": kind, "path": url}), "messages[0].content[0].path", tmp_path)


def test_a_long_url_is_cut_in_the_error_text(tmp_path):
    part = {"type": "image", "url": "data:image/png;base64," + "A" * 10_000}
    error = refused(talk(part), "messages[0].content[0].url", tmp_path)
    assert len(str(error)) < 400


def test_an_image_url_part_is_an_error(tmp_path):
    part = {"type": "image_url", "image_url": {"url": "http://example.org/p.png"}}
    assert refused(talk(part), "messages[0].content[0]", tmp_path).value == part


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("value", [3, True, [TEXT64], {"data": TEXT64}])
def test_a_base64_part_that_is_not_text_is_an_error(kind, value, tmp_path):
    error = refused(talk({"type": kind, "base64": value}), "messages[0].content[0].base64", tmp_path)
    assert error.value == value


@pytest.mark.parametrize("value", ["%%%%", "abc", ""])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_invalid_base64_is_an_error_when_it_is_read(kind, value, tmp_path):
    (medium,) = second(talk({"type": kind, "base64": value}), tmp_path).media
    error = refusal(medium.source.read)
    assert (error.record, error.field, error.value) == (1, "messages[0].content[0].base64", value)


def test_base64_in_a_column_of_bytes_is_read(tmp_path):
    part = {"type": "image", "base64": PIXELS, "text": None}
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": [{**SAY, "base64": None}]}]
    path = write_parquet(tmp_path / "d.parquet", [{"messages": messages}] * 2)
    assert FORMATS["messages"].open(path, tmp_path)[1].media[0].source.read() == PIXELS


def test_a_video_part_is_accepted(tmp_path):
    video = {"type": "video", "path": "v.mp4"}
    sample = second(talk(video, {**video, "num_frames": 4}, {"type": "video", "video": "w.mp4"}, SAY), tmp_path)
    assert sample.messages[0] == Message.of(
        "user", Video(tmp_path / "v.mp4"), Video(tmp_path / "v.mp4", 4), Video(tmp_path / "w.mp4"), "What?"
    )


def test_a_video_part_refers_to_a_member_of_its_shard(tmp_path):
    chat = talk({"type": "video", "file": "0.mp4", "num_frames": 2}, SAY)
    path = write_tar(tmp_path / "d.tar", [("k.0.mp4", b"video"), ("k.json", json.dumps(chat))])
    (video,) = FORMATS["webdataset"].open(path, tmp_path)[0].media
    assert video.num_frames == 2 and video.source.read() == b"video" and video.source.name == f"{path} k.0.mp4"


@pytest.mark.parametrize("frames", [0, -1, 2.5, "8", True])
def test_an_invalid_number_of_frames_is_an_error(frames, tmp_path):
    part = {"type": "video", "path": "v.mp4", "num_frames": frames}
    assert refused(talk(part), "messages[0].content[0].num_frames", tmp_path).value == frames


@pytest.mark.parametrize("part", [{"type": "audio", "path": "a.wav"}, {"type": None}, {"path": "p.png"}, {}, None, 3])
def test_an_unknown_part_type_is_an_error(part, tmp_path):
    assert refused(talk(SAY, part), "messages[0].content[1]", tmp_path).value == part


def top_level(*turns, **media):
    """A record of plain text turns with top-level media, as LLaMA-Factory and ms-swift write it."""
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)], **media}


P, Q = "p.png", "q.png"


@pytest.mark.parametrize("key", ["images", "image"])
def test_top_level_media_replace_their_markers(key, tmp_path):
    p, q = Image(tmp_path / P), Image(tmp_path / Q)
    sample = second(top_level("<image>What?", "blue", "<image>\nAnd <this>?", "green", **{key: [P, Q]}), tmp_path)
    assert [message.parts for message in sample.messages] == [
        (p, Text("What?")), (Text("blue"),), (q, Text("\nAnd <this>?")), (Text("green"),),
    ]  # fmt: skip
    sample = second(top_level("Compare <image> with <image>.", "a", **{key: [P, Q]}), tmp_path)
    assert sample.messages[0].parts == (Text("Compare "), p, Text(" with "), q, Text("."))
    assert second(top_level("<image>What?", "a", **{key: P}), tmp_path).messages[0].parts == (p, Text("What?"))


def test_top_level_videos_replace_video_markers(tmp_path):
    p, v = Image(tmp_path / P), Video(tmp_path / "v.mp4")
    sample = second(top_level("<video>\nIs <image> in it?", "a", images=[P], videos=["v.mp4"]), tmp_path)
    assert sample.messages[0].parts == (v, Text("\nIs "), p, Text(" in it?"))
    assert second(top_level("<video>?", "a", video="v.mp4"), tmp_path).media == (v,)


def test_markers_in_text_parts_and_in_branches_are_replaced_too(tmp_path):
    content = [{"type": "text", "text": "<image>a"}, {"type": "image"}, "b"]
    record = {**talk(*content), "branches": [top_level("c<image>", "d")["messages"]], "images": [P, Q, "r.png"]}
    sample = second(record, tmp_path)
    assert [image.source.name for image in sample.media] == [P, Q, "r.png"]
    assert sample.branches[0][0].parts == (Text("c"), Image(tmp_path / "r.png"))


def test_sharegpt_turns_with_top_level_images_are_read(tmp_path):
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
        (top_level("<image>What?", "a", images=[P, Q]), "images"),
        (top_level("<image><image>What?", "a", image=P), "image"),
        (top_level("<image>What?", "a"), "images"),
        (top_level("<image>What?", "a", images=[]), "images"),
        (top_level("<image>What?", "a", videos=["v.mp4"]), "images"),
        (top_level("<video>?", "a", videos=["v.mp4", "w.mp4"]), "videos"),
        (top_level("<image>?", "see <image>", images=[P]), "messages[1].content"),
        (top_level("?", "see <image>", images=[P]), "messages[1].content"),
        ({**talk({"type": "image"}), "images": [P, Q]}, "images"),
        ({**talk({"type": "image"}, {"type": "image"}), "images": [P]}, "images"),
        ({**talk({"type": "image"}, "<image>"), "images": [P]}, "images"),
        ({**talk({"type": "image", "path": P}), "images": [Q]}, "images"),
        ({**talk({"type": "video"}), "images": [Q]}, "messages[0].content[0]"),
        ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}, "images"),
        ({"messages": [{"role": "assistant", "content": "a"}], "images": [P]}, "messages"),
    ],
)
def test_different_numbers_of_markers_and_media_are_an_error(record, field, tmp_path):
    refused(record, field, tmp_path)


def test_media_without_markers_go_before_the_first_question(tmp_path):
    p, q, v = Image(tmp_path / P), Image(tmp_path / Q), Video(tmp_path / "v.mp4")
    assert second(top_level("a", "b", "c", "d", images=[P, Q]), tmp_path).messages[0].parts == (p, q, Text("a"))
    assert second(top_level("a", "b", images=[P], videos=["v.mp4"]), tmp_path).messages[0].parts == (p, v, Text("a"))
    sample = second({"messages": [], "branches": [top_level("a", "b")["messages"]] * 2, "images": [P]}, tmp_path)
    assert sample.messages == (Message("user", (p,)),)


def test_a_marker_is_text_in_a_record_without_top_level_media(tmp_path):
    part = {"type": "text", "text": "what does <image> do?"}
    assert second(talk(part), tmp_path).messages[0].text == "what does <image> do?"
    # An element of HTML.
    assert (
        second(top_level("explain <video> tags", "<video> and <image>"), tmp_path).messages[0].text
        == "explain <video> tags"
    )
