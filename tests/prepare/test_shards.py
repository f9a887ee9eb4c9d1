"""Shards, parts and the resize rule: the small laws that the steps stand on."""

import io
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.prepare.image_server import jpeg
from vila.core.errors import ConfigError, DataError, MediaError
from vila.core.reading import Fields
from vila.prepare.download import KEEP_ORIGINAL, ResizeRule, encode_image, shrunk_size
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
def test_a_shard_that_is_cut_short_is_an_error_that_names_it(tmp_path, cut):
    write_tar(tmp_path / "a.tar", SAMPLES)
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:cut])
    with pytest.raises(DataError) as caught:
        list(read_tar(tmp_path / "a.tar"))
    assert caught.value.file == str(tmp_path / "a.tar") and "prepare it again" in caught.value.hint


def test_keys_that_a_reader_would_split_are_refused_and_made_safe(tmp_path):
    with pytest.raises(DataError, match="the key 'a.b'"):
        write_tar(tmp_path / "a.tar", [TarSample("a.b", (("txt", b""),))])
    assert safe_key("docs shard/1.v3") == "docs_shard_1_v3"


@pytest.mark.parametrize("total, size", [(0, 3), (1, 3), (9, 3), (10, 3), (10, 4), (1000, 999)])
def test_ranges_are_even_whole_and_no_larger_than_asked(total, size):
    ranges = even_ranges(total, size)
    assert [row for begin, end in ranges for row in range(begin, end)] == list(range(total))
    sizes = [end - begin for begin, end in ranges]
    assert not sizes or (max(sizes) <= size and max(sizes) - min(sizes) <= 1)


def test_workers_get_disjoint_shares_that_are_the_whole():
    names = [str(n) for n in range(11)]
    shares = [units_of_worker(names, (k, 4)) for k in range(4)]
    assert Counter(name for share in shares for name in share) == Counter(names)
    with pytest.raises(ConfigError, match="shard 4 of 4: expected a number from 0 to 3"):
        units_of_worker(names, (4, 4))


def test_inputs_that_would_share_a_name_are_refused():
    with pytest.raises(ConfigError, match="would both become unit 'a'"):
        unit_names([Path("x/a.jsonl"), Path("y/a.jsonl.gz")])
    with pytest.raises(ConfigError, match="no input files"):
        unit_names([])


def test_counts_add_up_and_read_as_a_sentence():
    one, two = Counts(3, 1), Counts(4, 4)
    one.dropped.update({"no image": 2})
    total = Counts.total([Fields(stored.as_json(), "a.json") for stored in (one, two)])
    assert str(total) == "7 in, 5 out; dropped: 2 no image"
    assert total.as_json() == {"in": 7, "out": 5, "dropped": {"no image": 2}, "noted": {}}


@pytest.mark.parametrize("size, shrunk", [
    ((1000, 500), (672, 336)), ((500, 1000), (336, 672)), ((337, 337), (336, 336)), ((336, 5000), (336, 5000)),
    ((10, 20), (10, 20)), ((1001, 777), (433, 336)),
])  # fmt: skip
def test_only_a_short_side_over_the_limit_is_shrunk_to_it(size, shrunk):
    assert shrunk_size(size, 336) == shrunk
    assert shrunk_size(size, None) == size


def test_a_picture_that_is_small_enough_keeps_its_bytes_and_a_large_one_becomes_jpeg():
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
def test_rare_formats_are_written_in_one_that_readers_know(kind, mode):
    content = encoded(kind, mode=mode)
    assert encode_image(content, ResizeRule()).extension == "jpg"
    lossless = encode_image(content, KEEP_ORIGINAL)
    assert lossless.extension == "png" and Image.open(io.BytesIO(lossless.content)).size == (40, 30)


def test_an_image_that_is_encoded_anew_keeps_its_orientation_and_no_other_exif():
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010E] = 6, "secret place"
    Image.new("RGB", (1000, 500)).save(stream, "JPEG", exif=exif)
    shrunk = Image.open(io.BytesIO(encode_image(stream.getvalue(), ResizeRule()).content))
    assert (shrunk.size, dict(shrunk.getexif())) == ((672, 336), {0x0112: 6})
    assert encode_image(stream.getvalue(), KEEP_ORIGINAL).content == stream.getvalue()


def test_what_is_too_large_or_no_picture_is_refused():
    with pytest.raises(MediaError) as caught:
        encode_image(encoded("PNG"), KEEP_ORIGINAL, max_pixels=1000)
    assert caught.value.field == "image_pixels"
    with pytest.raises(MediaError, match="not an image"):
        encode_image(b"<html>", KEEP_ORIGINAL)


@pytest.mark.parametrize("options, message", [({"short_side": 0}, "short_side: 0"), ({"quality": 101}, "quality: 101")])
def test_rules_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ResizeRule(**options)


def test_inputs_that_are_missing_are_all_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing inputs: 2 problems\n  - .*a\.jsonl\n  - .*b\.jsonl"):
        inputs_hash(unit_names([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]))
