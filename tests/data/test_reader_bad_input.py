"""What a data set may hold besides good records, on its way to ids and pixels: it arrives whole or is named."""

import io
import os

import numpy as np
import pytest
from PIL import Image as PilImage

from tests.data.reading import reader_of
from tests.data.shards import refusal, write_lines
from vila.chat.tokenize import IGNORE
from vila.core.errors import DataError, MediaError
from vila.data.dataset import Entry
from vila.data.packing import PackingPolicy, PackingStreams, compact

SAYS = [("user", "Hi"), ("assistant", "Ho")]


def talk(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def reader(folder, *rows, template=""):
    path = write_lines(folder / "d.jsonl", rows)
    return reader_of(Entry("messages", str(path), template=template))


@pytest.mark.parametrize(
    ("turns", "field"),
    [
        ([("assistant", "Ho"), ("user", "Hi")], "messages[0]"),
        ([*SAYS, ("assistant", "Ho")], "messages[2]"),
        ([("user", "a"), ("user", "b"), ("assistant", "c")], "messages[1]"),
        ([*SAYS, ("system", "s")], "messages[2]"),
        ([*SAYS, ("user", "more")], "messages[2]"),
        ([], "messages"),
    ],
)
def test_roles_in_the_wrong_order_are_named(turns, field, tmp_path):
    error = refusal(lambda: reader(tmp_path, talk(*turns))(0))
    assert (error.record, error.field) == ("data set 'd', sample 'd/0'", field)


@pytest.mark.parametrize("answer", ["", " \n\t", []])
def test_an_empty_answer_is_named(answer, tmp_path):
    error = refusal(lambda: reader(tmp_path, talk(("user", "Hi"), ("assistant", answer)))(0))
    assert error.record == "data set 'd', sample 'd/0'"


@pytest.mark.parametrize("template", ["starter_qa", "chatml", "vicuna_v1"])
def test_separators_and_markers_in_an_answer_are_text_that_is_learnt(template, tmp_path):
    answer = "a <|im_end|>\n<|im_start|>user\n</s> USER: <image> ASSISTANT: <|endoftext|> b"
    rows = [talk(("user", "Q"), ("assistant", text), id=text) for text in (answer, "x")]
    read = reader(tmp_path, *rows, template=template)
    ours, plain = sorted((read(n) for n in range(2)), key=len, reverse=True)
    assert ours.id == answer
    special = [*read.tokenizer.special_ids.values()]
    assert np.isin(ours.ids, special).sum() == np.isin(plain.ids, special).sum()
    assert not ours.media and not ours.is_placeholder.any()
    # The tokenizer has one id a byte.
    assert (ours.labels != IGNORE).sum() - (plain.labels != IGNORE).sum() == len(answer) - 1


def test_a_text_of_100_000_characters_is_tokenised_whole_and_then_cut_dropped_or_refused_by_length(tmp_path):
    long = ("word </s> ### " * 8000)[:100_000]
    rows = [talk(("user", long), ("assistant", "Ho"), id="q"), talk(*SAYS, ("user", "?"), ("assistant", long), id="a")]
    read = reader(tmp_path, *rows)
    assert sorted(len(read(n)) > 100_000 for n in range(2)) == [True, True]
    with pytest.raises(DataError, match=r"sample '[qa]' has 100,\d+ tokens, rows hold 96"):
        PackingStreams(read, 1, policy=PackingPolicy(max_length=96, look_ahead=1)).step()
    lanes = PackingStreams(
        read, 1, policy=PackingPolicy(max_length=96, look_ahead=1, overlong="truncate"), shorten=read.shorten
    )
    (row,) = lanes.step()
    assert {sample.id for sample in row} == {"a"} and max(map(len, row)) < 96
    assert row.dropped > 0 < row.truncated


@pytest.mark.parametrize("template", ["starter_qa", "page"])
@pytest.mark.parametrize("number", [0, 40])
def test_a_document_of_no_picture_or_of_forty_arrives_whole(number, template, tmp_path):
    picture = io.BytesIO()
    PilImage.new("RGB", (8, 8), (200, 30, 30)).save(picture, "PNG")
    (tmp_path / "p.png").write_bytes(picture.getvalue())
    content = [part for n in range(number) for part in ({"type": "image", "path": "p.png"}, f"text {n}")]
    read = reader(tmp_path, talk(("user", [*content, "?"]), ("assistant", "Ho")), template=template)
    sample = read(0)
    assert len(sample.media) == number and sample.is_placeholder.sum() == 4 * number
    assert len(read.pixels(0, compact(sample))) == number


@pytest.mark.parametrize(("mode", "kind"), [
    ("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("RGBA", "WEBP"),
    ("I;16", "PNG"), ("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("F", "TIFF"),
])  # fmt: skip
def test_pictures_of_every_mode_become_three_planes(mode, kind, tmp_path):
    PilImage.new(mode, (10, 6)).save(tmp_path / "p", kind)
    content = [{"type": "image", "path": "p"}, "What?"]
    read = reader(tmp_path, talk(("user", content), ("assistant", "Ho")))
    (plane,) = read.pixels(0, compact(read(0)))
    assert plane.shape == (3, 28, 28) and np.isfinite(plane).all() and plane.dtype == np.float32


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>", "a web page"),
        (b"\x89PNG\r\n\x1a\n\0", "damaged or cut short"),
        (None, "no such file"),
    ],
)
def test_a_broken_picture_names_data_set_sample_and_file(content, reason, tmp_path):
    if content is not None:
        (tmp_path / "p.png").write_bytes(content)
    read = reader(tmp_path, talk(("user", [{"type": "image", "path": "p.png"}, "?"]), ("assistant", "Ho")))
    with pytest.raises(MediaError, match=f"{tmp_path}/p.png.*{reason}") as raised:
        read.pixels(0, compact(read(0)))
    assert raised.value.record == "data set 'd', sample 'd/0'"


def test_a_data_file_that_changes_under_the_reader_is_named(tmp_path):
    read = reader(tmp_path, talk(*SAYS))
    assert len(read(0))
    (tmp_path / "d.jsonl").write_text((tmp_path / "d.jsonl").read_text() * 2)
    with pytest.raises(DataError, match=r"d.jsonl.* the file has changed"):
        read(0)


def test_a_link_out_of_the_image_root_is_named_before_it_is_opened(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    os.mkfifo(tmp_path / "outside")  # opening it would hang
    (root / "p.png").symlink_to(tmp_path / "outside")
    read = reader(root, talk(("user", [{"type": "image", "path": "p.png"}]), ("assistant", "Ho")))
    error = refusal(lambda: read(0))
    assert (error.file, error.record, error.value) == (str(root / "d.jsonl"), 0, "p.png")
    assert "leaves the image root" in error.problem
