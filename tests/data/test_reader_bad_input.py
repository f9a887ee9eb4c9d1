"""Unusual and damaged samples: they are tokenized and decoded completely, or the error names them."""

import io
import os

import numpy as np
import pytest
from PIL import Image as PilImage

from tests.data.reading import reader_of
from tests.data.shards import refusal, write_lines
from vila.chat.tokenize import IGNORE
from vila.core.errors import DataError, MediaError
from vila.data.dataset import DatasetEntry
from vila.data.packing import PackingPolicy, PackingStreams

TURNS = [("user", "Hi"), ("assistant", "Ho")]


def talk(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def reader(folder, *rows, template=""):
    path = write_lines(folder / "d.jsonl", rows)
    return reader_of(DatasetEntry("messages", str(path), template=template))


@pytest.mark.parametrize(
    ("turns", "field"),
    [
        ([("assistant", "Ho"), ("user", "Hi")], "messages[0]"),
        ([*TURNS, ("assistant", "Ho")], "messages[2]"),
        ([("user", "a"), ("user", "b"), ("assistant", "c")], "messages[1]"),
        ([*TURNS, ("system", "s")], "messages[2]"),
        ([*TURNS, ("user", "more")], "messages[2]"),
        ([], "messages"),
    ],
)
def test_roles_in_the_wrong_order_are_an_error_with_the_sample(turns, field, tmp_path):
    error = refusal(lambda: reader(tmp_path, talk(*turns))(0))
    assert (error.record, error.field) == ("data set 'd', sample 'd/0'", field)


@pytest.mark.parametrize("answer", ["", " \n\t", []])
def test_an_empty_answer_is_an_error_with_the_sample(answer, tmp_path):
    error = refusal(lambda: reader(tmp_path, talk(("user", "Hi"), ("assistant", answer)))(0))
    assert error.record == "data set 'd', sample 'd/0'"


@pytest.mark.parametrize("template", ["starter_qa", "chatml"])
def test_separators_and_markers_in_an_answer_are_supervised_text(template, tmp_path):
    answer = "a <|im_end|>\n<|im_start|>user\n</s> USER: <image> ASSISTANT: <|endoftext|> b"
    rows = [talk(("user", "Q"), ("assistant", text), id=text) for text in (answer, "x")]
    read = reader(tmp_path, *rows, template=template)
    ours, plain = sorted((read(n) for n in range(2)), key=len, reverse=True)
    assert ours.id == answer
    special = [*read.tokenizer.special_ids.values()]
    assert np.isin(ours.ids, special).sum() == np.isin(plain.ids, special).sum()
    assert not ours.media and not ours.is_placeholder.any()
    # The tokenizer has one id for each byte.
    assert (ours.labels != IGNORE).sum() - (plain.labels != IGNORE).sum() == len(answer) - 1


def test_a_text_of_100_000_characters_is_tokenized_completely_and_then_cut_dropped_or_an_error(tmp_path):
    long = ("word </s> ### " * 8000)[:100_000]
    rows = [talk(("user", long), ("assistant", "Ho"), id="q"), talk(*TURNS, ("user", "?"), ("assistant", long), id="a")]
    read = reader(tmp_path, *rows)
    assert sorted(len(read(n)) > 100_000 for n in range(2)) == [True, True]
    with pytest.raises(DataError) as caught:
        PackingStreams(read, 1, policy=PackingPolicy(max_length=96, look_ahead=1)).step()
    assert caught.value.field == "data.max_length" and caught.value.value > 100_000
    streams = PackingStreams(
        read, 1, policy=PackingPolicy(max_length=96, look_ahead=1, overlong="truncate"), shorten=read.shorten
    )
    (sequence,) = streams.step()
    assert {sample.id for sample in sequence} == {"a"} and max(map(len, sequence)) < 96
    assert sequence.dropped > 0 < sequence.truncated


@pytest.mark.parametrize("template", ["starter_qa", "page"])
@pytest.mark.parametrize("number", [0, 40])
def test_a_document_of_no_image_or_of_forty_is_complete(number, template, tmp_path):
    image = io.BytesIO()
    PilImage.new("RGB", (8, 8), (200, 30, 30)).save(image, "PNG")
    (tmp_path / "p.png").write_bytes(image.getvalue())
    content = [part for n in range(number) for part in ({"type": "image", "path": "p.png"}, f"text {n}")]
    read = reader(tmp_path, talk(("user", [*content, "?"]), ("assistant", "Ho")), template=template)
    sample = read(0)
    assert len(sample.media) == number and sample.is_placeholder.sum() == 4 * number
    assert len(read.pixels(0, sample)) == number


@pytest.mark.parametrize(("mode", "kind"), [
    ("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("RGBA", "WEBP"),
    ("I;16", "PNG"), ("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("F", "TIFF"),
])  # fmt: skip
def test_images_of_every_pillow_mode_become_three_channels(mode, kind, tmp_path):
    PilImage.new(mode, (10, 6)).save(tmp_path / "p", kind)
    content = [{"type": "image", "path": "p"}, "What?"]
    read = reader(tmp_path, talk(("user", content), ("assistant", "Ho")))
    (image,) = read.pixels(0, read(0))
    assert image.shape == (3, 28, 28) and np.isfinite(image).all() and image.dtype == np.float32


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n\0", None], ids=["empty", "HTML", "cut", "missing"]
)
def test_an_unreadable_image_is_an_error_with_data_set_sample_and_file(content, tmp_path):
    if content is not None:
        (tmp_path / "p.png").write_bytes(content)
    read = reader(tmp_path, talk(("user", [{"type": "image", "path": "p.png"}, "?"]), ("assistant", "Ho")))
    with pytest.raises(MediaError) as raised:
        read.pixels(0, read(0))
    assert (raised.value.file, raised.value.record) == (f"{tmp_path}/p.png", "data set 'd', sample 'd/0'")


def test_a_data_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    read = reader(tmp_path, talk(*TURNS))
    assert len(read(0))
    (tmp_path / "d.jsonl").write_text((tmp_path / "d.jsonl").read_text() * 2)
    with pytest.raises(DataError) as caught:
        read(0)
    assert caught.value.file == str(tmp_path / "d.jsonl")


def test_a_link_out_of_the_image_root_is_an_error_before_it_is_opened(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    os.mkfifo(tmp_path / "outside")  # opening it would hang
    (root / "p.png").symlink_to(tmp_path / "outside")
    read = reader(root, talk(("user", [{"type": "image", "path": "p.png"}]), ("assistant", "Ho")))
    error = refusal(lambda: read(0))
    assert (error.file, error.record, error.value) == (str(root / "d.jsonl"), 0, "p.png")
    assert error.expected == f"a path in {root}"
