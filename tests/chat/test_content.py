"""Parsing of messages with content parts; errors name message, part and value."""

import base64
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from vila.chat.content import parse_messages
from vila.core.errors import DataError
from vila.core.types import Image, Message, Text, Video

BYTES = b"\x89PNG encoded"
BASE64 = base64.b64encode(BYTES).decode()
PIL_IMAGE = PilImage.new("RGB", (2, 3))


def user(*parts):
    return {"role": "user", "content": list(parts)}


def only_part(part):
    ((message),) = parse_messages([user(part)])
    return message.parts[0]


def test_strings_parts_and_message_objects_give_messages():
    answer = Message.of("assistant", "A cat.")
    rows = [
        {"role": "system", "content": "Be brief."},
        user({"type": "image", "path": "a.png"}, {"type": "text", "text": "\nWhat? <image></s>"}, "Well?"),
        answer,
    ]
    assert parse_messages(rows) == (
        Message.of("system", "Be brief."),
        Message("user", (Image(Path("a.png")), Text("\nWhat? <image></s>"), Text("Well?"))),
        answer,
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
        ({"type": "image", "image": PIL_IMAGE}, Image(PIL_IMAGE)),
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
def test_every_source_of_an_image_or_video_is_accepted(part, medium):
    assert only_part(part) == medium


def test_arrays_become_images():
    torch = pytest.importorskip("torch")
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for value in (array, torch.from_numpy(array)):
        assert np.array_equal(np.asarray(only_part({"type": "image", "image": value}).source), array)
    assert only_part({"type": "image", "image": array[..., 0]}).source.mode == "L"


HERE = "messages[0].content[0]"


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ({"type": "sound"}, HERE),
        ({"type": "text", "text": 3}, HERE),
        (7, HERE),
        ({"type": "image"}, HERE),
        ({"type": "image", "path": "a", "url": "b"}, HERE),
        ({"type": "image", "path": ""}, f"{HERE}.path"),
        ({"type": "image", "url": "a.png"}, f"{HERE}.url"),
        ({"type": "image_url", "image_url": {"detail": "low"}}, f"{HERE}.image_url"),
        ({"type": "image", "base64": "QUJD!"}, f"{HERE}.base64"),
        ({"type": "image", "base64": b"x"}, f"{HERE}.base64"),
        ({"type": "image", "image": 3}, f"{HERE}.image"),
        ({"type": "image", "image": ""}, f"{HERE}.image"),
        ({"type": "image", "image": Video("a.mp4")}, f"{HERE}.image"),
        ({"type": "image", "image": np.zeros((3, 8, 8), dtype=np.float32)}, f"{HERE}.image"),
        ({"type": "image", "image": np.zeros((3, 8, 8), dtype=np.uint8)}, f"{HERE}.image"),
        ({"type": "video", "video": PIL_IMAGE}, f"{HERE}.video"),
        ({"type": "video", "path": "a.mp4", "num_frames": 0}, f"{HERE}.num_frames"),
    ],
)
def test_an_invalid_part_is_named(part, field):
    with pytest.raises(DataError) as raised:
        parse_messages([user(part)])
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("messages", "field", "value"),
    [
        ("What?", "messages", "What?"),
        ({"role": "user"}, "messages", {"role": "user"}),
        ([{"role": "user", "content": "a"}, {"role": "bot"}], "messages[1].role", "bot"),
        (["What?"], "messages[0]", "What?"),
        ([{"role": "user", "content": None}], "messages[0].content", None),
        ([{"role": ["user"], "content": "a"}], "messages[0].role", ["user"]),
    ],
)
def test_invalid_messages_are_named_with_their_value(messages, field, value):
    with pytest.raises(DataError) as raised:
        parse_messages(messages)
    assert (raised.value.field, raised.value.value) == (field, value)


def test_long_values_are_cut_in_errors():
    with pytest.raises(DataError) as caught:
        parse_messages([user({"type": "image", "url": "x" * 20_000})])
    assert len(str(caught.value)) < 400


def test_a_custom_reader_can_reject_sources_and_errors_get_file_and_record():
    def refuse(part, field):
        raise DataError("no media here", field=field)

    with pytest.raises(DataError) as raised:
        parse_messages([user({"type": "image", "path": "a.png"})], file="f.json", record=3, field="turns", read=refuse)
    error = raised.value
    assert (error.file, error.record, error.field) == ("f.json", 3, "turns[0].content[0]")
