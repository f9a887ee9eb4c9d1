"""Content parts become messages with media unopened, and what cannot is named by message, part and value."""

import base64
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from vila.chat.content import messages_of
from vila.core.errors import DataError
from vila.core.types import Image, Message, Text, Video

BYTES = b"\x89PNG encoded"
BASE64 = base64.b64encode(BYTES).decode()
PICTURE = PilImage.new("RGB", (2, 3))


def user(*parts):
    return {"role": "user", "content": list(parts)}


def only_part(part):
    ((message),) = messages_of([user(part)])
    return message.parts[0]


def test_strings_parts_and_message_objects_give_messages():
    said = Message.of("assistant", "A cat.")
    rows = [
        {"role": "system", "content": "Be brief."},
        user({"type": "image", "path": "a.png"}, {"type": "text", "text": "\nWhat? <image></s>"}, "Well?"),
        said,
    ]
    assert messages_of(rows) == (
        Message.of("system", "Be brief."),
        Message("user", (Image(Path("a.png")), Text("\nWhat? <image></s>"), Text("Well?"))),
        said,
    )


@pytest.mark.parametrize(
    ("part", "medium"),
    [
        ({"type": "image", "path": "a.png"}, Image(Path("a.png"))),
        ({"type": "image", "path": Path("a.png")}, Image(Path("a.png"))),
        ({"type": "image", "url": "https://x.org/a.png"}, Image("https://x.org/a.png")),
        ({"type": "image", "url": f"data:image/png;base64,{BASE64}"}, Image(f"data:image/png;base64,{BASE64}")),
        ({"type": "image", "base64": BASE64}, Image(BYTES)),
        ({"type": "image", "base64": f"{BASE64[:4]}\n{BASE64[4:]}"}, Image(BYTES)),
        ({"type": "image", "base64": f"data:image/png;base64,{BASE64}"}, Image(f"data:image/png;base64,{BASE64}")),
        ({"type": "image", "image": PICTURE}, Image(PICTURE)),
        ({"type": "image", "image": BYTES}, Image(BYTES)),
        ({"type": "image", "image": "a.png"}, Image(Path("a.png"))),
        ({"type": "image", "image": "http://x.org/a.png"}, Image("http://x.org/a.png")),
        ({"type": "image", "image": Image("a.png"), "url": None}, Image("a.png")),
        ({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}, Image("https://x.org/a.png")),
        ({"type": "image_url", "image_url": "https://x.org/a.png"}, Image("https://x.org/a.png")),
        ({"type": "video", "path": "a.mp4"}, Video(Path("a.mp4"))),
        ({"type": "video", "url": "https://x.org/a.mp4", "num_frames": 4}, Video("https://x.org/a.mp4", 4)),
        ({"type": "video", "base64": BASE64}, Video(BYTES)),
        ({"type": "video", "video": "a.mp4"}, Video(Path("a.mp4"))),
        ({"type": "video", "video": Video("a.mp4", 2)}, Video("a.mp4", 2)),
        (Image("a.png"), Image("a.png")),
    ],
)
def test_every_source_of_a_medium_is_read(part, medium):
    assert only_part(part) == medium


def test_arrays_become_pictures():
    torch = pytest.importorskip("torch")
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for value in (array, torch.from_numpy(array)):
        assert np.array_equal(np.asarray(only_part({"type": "image", "image": value}).source), array)
    assert only_part({"type": "image", "image": array[..., 0]}).source.mode == "L"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "sound"}, r"message 1 part 1: content part \{'type': 'sound'\} is neither a text nor an image"),
        ({"type": "text", "text": 3}, "message 1 part 1: content part .* a text part has a string 'text'"),
        (7, "message 1 part 1: content part 7 is neither"),
        ({"type": "image"}, "part 1: image part with no source; give one of path, url, base64, image"),
        ({"type": "image", "path": "a", "url": "b"}, "part 1: image part with path and url; give one of"),
        ({"type": "image", "path": ""}, "part 1: path '' is not a file name"),
        ({"type": "image", "url": "a.png"}, "part 1: url 'a.png' is not an http.* a file is named by 'path'"),
        ({"type": "image_url", "image_url": {"detail": "low"}}, "image_url .* is not an http"),
        ({"type": "image", "base64": "QUJD!"}, "part 1: base64 'QUJD!' is not base64"),
        ({"type": "image", "base64": b"x"}, "part 1: base64 b'x' is not a string"),
        ({"type": "image", "image": 3}, "part 1: image 3 is not a PIL picture, an array, bytes, a path or a URL"),
        ({"type": "image", "image": ""}, "part 1: image '' is not a PIL picture"),
        (
            {"type": "image", "image": Video("a.mp4")},
            "part 1: image Video.* is not a picture; a clip has a part of type video",
        ),
        (
            {"type": "image", "image": np.zeros((3, 8, 8), dtype=np.float32)},
            r"image has dtype float32 and shape \[3, 8, 8\]; give uint8 \[H, W, 3\]",
        ),
        ({"type": "image", "image": np.zeros((3, 8, 8), dtype=np.uint8)}, r"dtype uint8 and shape \[3, 8, 8\]; give"),
        ({"type": "video", "video": PICTURE}, "part 1: video .* is not a clip; give its frames as images"),
        ({"type": "video", "path": "a.mp4", "num_frames": 0}, "num_frames 0 is not a positive whole number"),
    ],
)
def test_a_part_that_cannot_be_read_is_named_with_its_value(part, message):
    with pytest.raises(DataError, match=message):
        messages_of([user(part)])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("What?", r"messages: expected a list of messages, got 'What\?'; write \[\{'role'"),
        ({"role": "user", "content": "What?"}, "expected a list of messages, got {'role'"),
        (
            [{"role": "user", "content": "a"}, {"role": "bot"}],
            "message 2: role 'bot' is not one of system, user, assistant",
        ),
        (["What?"], "message 1: role 'What.' is not one of"),
        ([{"role": "user", "content": None}], "message 1: content is neither text nor a list of parts, but None"),
    ],
)
def test_messages_that_cannot_be_read_are_named(messages, message):
    with pytest.raises(DataError, match=message):
        messages_of(messages)


def test_long_values_are_cut_in_errors():
    with pytest.raises(DataError, match=r"\(20002 characters\)") as caught:
        messages_of([user({"type": "image", "url": "x" * 20_000})])
    assert len(str(caught.value)) < 300


def test_a_reader_of_ones_own_restricts_the_sources():
    def refuse(part, where):
        raise DataError(f"{where}: no media here")

    with pytest.raises(DataError, match="^file row 3 message 1 part 1: no media here"):
        messages_of([user({"type": "image", "path": "a.png"})], where="file row 3", read=refuse)
