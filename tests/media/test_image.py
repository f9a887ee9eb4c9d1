"""Every kind of source opens as RGB; every kind of bad source is an error that names it."""

import base64
import io
import os
import re
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import numpy as np
import pytest
from PIL import Image as PilImage

from vila.core.errors import MediaError
from vila.core.types import Image
from vila.media.image import open_image


def picture(width: int = 32, height: int = 24) -> PilImage.Image:
    return PilImage.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: PilImage.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises a size and whose data does not keep it."""
    plain = bytearray(encoded(picture()))
    plain[16:24] = struct.pack(">II", width, height)
    plain[29:33] = struct.pack(">I", zlib.crc32(plain[12:29]))
    return bytes(plain)


def refused(source: object, message: str, **options: object) -> None:
    with pytest.raises(MediaError, match=message):
        open_image(Image(source), **options)


def test_one_picture_is_equal_from_every_source(tmp_path):
    expected = np.asarray(picture())
    data = encoded(picture())
    (tmp_path / "a.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    sources = (tmp_path / "a.png", str(tmp_path / "a.png"), data, picture(), f"data:image/png;base64,{text}")
    for source in sources:
        opened = open_image(Image(source))
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), expected)
    np.testing.assert_array_equal(np.asarray(open_image(Image("a.png"), base=tmp_path)), expected)


def test_a_url_is_fetched_and_named_by_its_errors():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encoded(picture()) if self.path == "/a.png" else b"<!DOCTYPE html><title>Log in</title>")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        home = f"http://127.0.0.1:{server.server_port}"
        assert open_image(Image(f"{home}/a.png"), allow_private=True).size == (32, 24)
        refused(f"{home}/a.png", "not a public address")
        refused(
            f"{home}/b.png?key=1", rf"^{home}/b.png\?\.\.\.: not an image \(starts with '<!DOCTYPE'", allow_private=True
        )
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO"))
def test_common_formats_open(kind):
    expected = PilImage.open(io.BytesIO(encoded(picture(), kind))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(open_image(Image(encoded(picture(), kind)))), np.asarray(expected))


@pytest.mark.parametrize(
    "content, message",
    (
        (b"", "not an image .the file is empty"),
        (b"<!DOCTYPE html><html>", "not an image .starts with '<!DOCTYPE': a web page"),
        (b"\n <html><body>", "starts with '<html><bo': a web page"),
        (b"<svg xmlns='x'/>", "starts with '<svg xmln'; if it is a drawing, convert it to PNG"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer; run `git lfs pull`"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC; convert it to JPEG or PNG"),
        (b"\0\x01\x02\xff\xfe rest", r"starts with b'\\x00\\x01\\x02\\xff\\xfe re'; expected JPEG, PNG"),
        (b"\x89PNG\r\n\x1a\n\0\0", "starts like PNG, but its header is damaged or cut short"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "starts with '%!PS-Adob'; expected JPEG, PNG"),
    ),
)
def test_a_file_that_is_no_image_says_how_it_starts(tmp_path, content, message):
    (tmp_path / "cat.jpg").write_bytes(content)
    refused(tmp_path / "cat.jpg", re.escape(str(tmp_path / "cat.jpg")) + ": .*" + message)
    refused(content, f"<{len(content)} bytes>: .*{message}")


@pytest.mark.parametrize("kind", ("JPEG", "PNG", "WEBP", "GIF", "BMP"))
def test_a_truncated_file_is_refused_by_name(tmp_path, kind):
    data = encoded(picture(200, 200), kind)
    (tmp_path / "cut").write_bytes(data[: len(data) * 2 // 3])
    refused("cut", "cut: cannot be decoded .*; it may be damaged or cut short, copy it again", base=tmp_path)


def test_paths_that_are_no_files_are_refused(tmp_path):
    refused(tmp_path / "no.png", "no.png: no such file")
    refused("no.png", f"{re.escape(str(tmp_path))}/no.png: no such file", base=tmp_path)
    refused(tmp_path, "a directory, not an image")
    refused("a\0b.png", r"'a\\x00b.png': cannot be opened")
    refused("x" * 5000, "cannot be opened .*too long")
    refused("s3://bucket/a.png", "s3://bucket/a.png: only http and https addresses")
    refused("data:image/png;base64,####", "base64 is damaged")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        refused(tmp_path / "pipe", "a special file, not an image")


def test_pictures_over_the_limits_are_refused_before_decoding():
    refused(png_of_size(15_000, 15_000), r"225000000 pixels\) exceeds limit of 178956970 pixels.*; shrink it first")
    refused(png_of_size(70_000, 1), "70000 x 1, with a side over 65,535 pixels")
    refused(encoded(picture()), "32 x 24 = 768 pixels, over the limit of 767", max_pixels=767)
    refused(picture(), "<picture 32x24>: .*over the limit of 767", max_pixels=767)
    assert open_image(Image(picture()), max_pixels=768).size == (32, 24)


def test_alpha_is_dropped_and_orientation_ignored():
    colour = picture()
    alpha = colour.copy()
    alpha.putalpha(0)
    np.testing.assert_array_equal(np.asarray(open_image(Image(encoded(alpha)))), np.asarray(colour))
    exif = PilImage.Exif()
    exif[0x0112] = 6
    assert open_image(Image(encoded(colour, exif=exif))).size == (32, 24)


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_opens_without_a_warning():
    palette = picture().quantize(8)
    expected = np.asarray(palette.convert("RGB"))
    data = encoded(palette, transparency=bytes(range(8)))
    np.testing.assert_array_equal(np.asarray(open_image(Image(data))), expected)
    palette.info["transparency"] = bytes(range(8))
    open_image(Image(palette))
    assert palette.info["transparency"] == bytes(range(8))


@pytest.mark.parametrize("kind", ("PNG", "TIFF", "PPM"))
def test_sixteen_bit_grey_keeps_its_high_byte(kind):
    values = np.array([[0, 255, 256, 1000, 32768, 65535]], np.uint16)
    opened = np.asarray(open_image(Image(encoded(PilImage.fromarray(values), kind))))
    assert opened[0, :, 0].tolist() == [0, 0, 1, 3, 128, 255]
    np.testing.assert_array_equal(opened[..., 0], opened[..., 2])


def test_integers_and_floats_are_read_by_their_range():
    def grey(values: list[float], kind: str) -> list[int]:
        return np.asarray(open_image(Image(PilImage.fromarray(np.array([values], kind)))))[0, :, 0].tolist()

    assert grey([0, 100, 255], "i4") == [0, 100, 255]
    assert grey([0, 256, 65535], "i4") == [0, 1, 255]
    assert grey([0, 0.5, 1], "f4") == [0, 128, 255]
    assert grey([0, 1.5, 255], "f4") == [0, 1, 255]
    for values, kind in (([-1, 5], "i4"), ([0, 70000], "i4"), ([0, 256], "f4"), ([0, float("nan")], "f4")):
        refused(
            PilImage.fromarray(np.array([values], kind)), "grey values from .* expected 0 to .*; convert it to 8 bits"
        )


def test_threads_open_pictures_side_by_side():
    data = [encoded(picture(40 + i, 30), kind) for i, kind in enumerate(("PNG", "JPEG", "WEBP", "GIF"))]
    alone = [np.asarray(open_image(Image(item))) for item in data]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda item: np.asarray(open_image(Image(item))), data * 10))
    for index, array in enumerate(together):
        np.testing.assert_array_equal(array, alone[index % 4])
