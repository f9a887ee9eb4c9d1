"""Shards, work units, counts and the resize rule."""

import io
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.prepare.image_server import jpeg
from vila.core.errors import ConfigError, DataError, MediaError
from vila.core.reading import Fields
from vila.prepare.resumable_download import KEEP_ORIGINAL, ResizeRule, encode_image, shrunk_size
from vila.prepare.shards import TarSample, even_ranges, read_tar, safe_key, write_tar
from vila.prepare.work_units import Counts, inputs_hash, unit_names, units_of_worker

SAMPLES = [TarSample(f"k{n}", (("json", b"{}"), ("0.jpg", bytes([n]) * (n * 300)))) for n in range(5)]


def encoded(kind: str, size=(40, 30), mode="RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind)
    return stream.getvalue()


def test_a_shard_reads_back_and_equal_samples_give_equal_bytes(tmp_path):
    assert write_tar(tmp_path / "a.tar", SAMPLES) == write_tar(tmp_path / "b.tar", iter(SAMPLES)) == 5
    assert list(read_tar(tmp_path / "a.tar")) == SAMPLES
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.parametrize("cut", [100, 700, 1500, 3000])
def test_a_truncated_shard_is_refused_by_name(tmp_path, cut):
    write_tar(tmp_path / "a.tar", SAMPLES)
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:cut])
    with pytest.raises(DataError) as caught:
        list(read_tar(tmp_path / "a.tar"))
    assert caught.value.file == str(tmp_path / "a.tar") and caught.value.hint


def test_invalid_keys_are_refused_and_made_safe(tmp_path):
    with pytest.raises(DataError) as caught:
        write_tar(tmp_path / "a.tar", [TarSample("a.b", (("txt", b""),))])
    assert (caught.value.field, caught.value.value) == ("key", "a.b")
    assert safe_key("docs shard/1.v3") == "docs_shard_1_v3"


@pytest.mark.parametrize("total, size", [(0, 3), (1, 3), (9, 3), (10, 3), (10, 4), (1000, 999)])
def test_ranges_are_even_complete_and_bounded(total, size):
    ranges = even_ranges(total, size)
    assert [row for begin, end in ranges for row in range(begin, end)] == list(range(total))
    sizes = [end - begin for begin, end in ranges]
    assert not sizes or (max(sizes) <= size and max(sizes) - min(sizes) <= 1)


def test_workers_get_disjoint_units_that_cover_all():
    names = [str(n) for n in range(11)]
    shares = [units_of_worker(names, (k, 4)) for k in range(4)]
    assert Counter(name for share in shares for name in share) == Counter(names)
    with pytest.raises(ConfigError) as caught:
        units_of_worker(names, (4, 4))
    assert (caught.value.field, caught.value.value) == ("shard", 4)


def test_inputs_with_equal_unit_names_are_refused():
    with pytest.raises(ConfigError) as caught:
        unit_names([Path("x/a.jsonl"), Path("y/a.jsonl.gz")])
    assert caught.value.file == "y/a.jsonl.gz"
    with pytest.raises(ConfigError):
        unit_names([])


def test_counts_are_summed_and_printed():
    one, two = Counts(3, 1), Counts(4, 4)
    one.dropped.update({"no image": 2})
    total = Counts.total([Fields(stored.as_json(), "a.json") for stored in (one, two)])
    assert str(total) == "7 in, 5 out; dropped: 2 no image"
    assert total.as_json() == {"in": 7, "out": 5, "dropped": {"no image": 2}, "noted": {}}


@pytest.mark.parametrize("size, shrunk", [
    ((1000, 500), (672, 336)), ((500, 1000), (336, 672)), ((337, 337), (336, 336)), ((336, 5000), (336, 5000)),
    ((10, 20), (10, 20)), ((1001, 777), (433, 336)),
])  # fmt: skip
def test_only_a_short_side_above_the_limit_is_resized(size, shrunk):
    assert shrunk_size(size, 336) == shrunk
    assert shrunk_size(size, None) == size


def test_a_small_image_keeps_its_bytes_and_a_large_one_becomes_jpeg():
    for content, extension in ((jpeg(1), "jpg"), (encoded("PNG"), "png"), (encoded("WEBP"), "webp")):
        kept = encode_image(content, ResizeRule())
        assert (kept.content, kept.extension) == (content, extension)
    large = encoded("PNG", (700, 500))
    shrunk = encode_image(large, ResizeRule())
    assert shrunk.extension == "jpg" and Image.open(io.BytesIO(shrunk.content)).size == (470, 336)
    assert encode_image(large, KEEP_ORIGINAL).content == large
    assert len(encode_image(noise(), ResizeRule(quality=50)).content) < len(encode_image(noise(), ResizeRule()).content)


def noise() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((400, 400), 80).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("kind, mode", [("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB")])
def test_other_formats_become_jpeg_or_png(kind, mode):
    content = encoded(kind, mode=mode)
    assert encode_image(content, ResizeRule()).extension == "jpg"
    lossless = encode_image(content, KEEP_ORIGINAL)
    assert lossless.extension == "png" and Image.open(io.BytesIO(lossless.content)).size == (40, 30)


def test_a_re_encoded_image_keeps_only_the_exif_orientation():
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010E] = 6, "secret place"
    Image.new("RGB", (1000, 500)).save(stream, "JPEG", exif=exif)
    shrunk = Image.open(io.BytesIO(encode_image(stream.getvalue(), ResizeRule()).content))
    assert (shrunk.size, dict(shrunk.getexif())) == ((672, 336), {0x0112: 6})
    assert encode_image(stream.getvalue(), KEEP_ORIGINAL).content == stream.getvalue()


def test_too_large_images_and_other_content_are_refused():
    with pytest.raises(MediaError) as caught:
        encode_image(encoded("PNG"), KEEP_ORIGINAL, max_pixels=1000)
    assert caught.value.field == "image_pixels"
    with pytest.raises(MediaError):
        encode_image(b"<html>", KEEP_ORIGINAL)


@pytest.mark.parametrize("name, value", [("short_side", 0), ("quality", 101)])
def test_invalid_resize_rules_are_refused(name, value):
    with pytest.raises(ConfigError) as caught:
        ResizeRule(**{name: value})
    assert (caught.value.field, caught.value.value) == (f"resize.{name}", value)


def test_all_missing_inputs_are_named(tmp_path):
    with pytest.raises(ConfigError) as caught:
        inputs_hash(unit_names([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]))
    assert all(str(tmp_path / name) in str(caught.value) for name in ("a.jsonl", "b.jsonl"))
