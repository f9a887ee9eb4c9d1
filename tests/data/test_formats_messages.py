"""Parts of a conversation that the format `messages` takes and refuses; each refusal names file and row."""

import json

import pytest

from tests.data.shards import PIXELS, TEXT64, write_lines, write_parquet, write_tar
from vila.core.errors import DataError
from vila.core.types import Message, Video
from vila.data.formats.protocol import FORMATS

SAY = {"type": "text", "text": "What?"}
GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}


def talk(*content):
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "Yes."}]}


def second(record, folder):
    """The sample of `record`, which is row 2 of its file."""
    return FORMATS["messages"].open(write_lines(folder / "d.jsonl", [GOOD, record]), folder)[1]


def refused(record, message, folder):
    with pytest.raises(DataError, match=rf"{folder}/d.jsonl row 2 .*{message}"):
        second(record, folder)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("url", ["http://example.org/p", "https://example.org/p", f"data:image/png;base64,{TEXT64}"])
def test_a_url_part_is_refused(kind, url, tmp_path):
    refused(
        talk(SAY, {"type": kind, "url": url}), "message 1 part 2: .* is a URL; training reads local files", tmp_path
    )
    if url.startswith("http"):
        # The same address under a key that names a file.
        refused(
            talk({"type": kind, "path": url}),
            r"messages\[0\].content\[0\]: .* is a URL; training reads local files",
            tmp_path,
        )


def test_a_long_url_is_cut_in_the_message(tmp_path):
    part = {"type": "image", "url": "data:image/png;base64," + "A" * 10_000}
    with pytest.raises(DataError, match=r"row 2 message 1 part 1: .*\(10024 characters\) is a URL") as raised:
        second(talk(part), tmp_path)
    assert len(str(raised.value)) < 400


def test_an_image_url_part_is_refused(tmp_path):
    part = {"type": "image_url", "image_url": {"url": "http://example.org/p.png"}}
    refused(talk(part), "message 1 part 1: pictures of training data are local files; give an image part", tmp_path)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("value", [3, True, [TEXT64], {"data": TEXT64}])
def test_a_base64_part_that_is_no_text_is_refused(kind, value, tmp_path):
    refused(talk({"type": kind, "base64": value}), "message 1 part 1: base64 is .*, expected text", tmp_path)


@pytest.mark.parametrize(("value", "reason"), [("%%%%", "not base64"), ("abc", "not base64"), ("", "no base64 text")])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_base64_part_that_cannot_be_decoded_is_refused_when_it_is_read(kind, value, reason, tmp_path):
    (medium,) = second(talk({"type": kind, "base64": value}), tmp_path).media
    with pytest.raises(DataError, match=rf"d.jsonl row 2 messages\[0\].content\[0\].base64: {reason}"):
        medium.source.read()


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
    refused(talk(part), "message 1 part 1: num_frames .* is not a positive whole number", tmp_path)


@pytest.mark.parametrize("part", [{"type": "audio", "path": "a.wav"}, {"type": None}, {"path": "p.png"}, {}, None, 3])
def test_an_unknown_part_type_is_refused(part, tmp_path):
    refused(talk(SAY, part), "message 1 part 2: content part .* is neither a text nor an image or a video", tmp_path)
