"""Images from every source are decoded to RGB; bad ones raise an error that names them."""

import base64
import io
import os
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
from vila.media.image import open_image, orientation_of
from vila.media.limits import MediaLimits


def random_image(width: int = 32, height: int = 24) -> PilImage.Image:
    return PilImage.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: PilImage.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header announces a larger size than its data has."""
    plain = bytearray(encoded(random_image()))
    plain[16:24] = struct.pack(">II", width, height)
    plain[29:33] = struct.pack(">I", zlib.crc32(plain[12:29]))
    return bytes(plain)


def refused(source: object, **options: object) -> MediaError:
    with pytest.raises(MediaError) as caught:
        open_image(Image(source), **options)
    return caught.value


def test_an_image_is_equal_from_every_source(tmp_path):
    expected = np.asarray(random_image())
    data = encoded(random_image())
    (tmp_path / "a.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    sources = (tmp_path / "a.png", str(tmp_path / "a.png"), data, random_image(), f"data:image/png;base64,{text}")
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
            self.wfile.write(
                encoded(random_image()) if self.path == "/a.png" else b"<!DOCTYPE html><title>Log in</title>"
            )

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        home = f"http://127.0.0.1:{server.server_port}"
        assert open_image(Image(f"{home}/a.png"), allow_private=True).size == (32, 24)
        assert refused(f"{home}/a.png").field == "host"
        assert refused(f"{home}/b.png?key=1", allow_private=True).file == f"{home}/b.png?..."
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO"))
def test_common_formats_open(kind):
    expected = PilImage.open(io.BytesIO(encoded(random_image(), kind))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(open_image(Image(encoded(random_image(), kind)))), np.asarray(expected))


@pytest.mark.parametrize(
    "content",
    (
        b"",
        b"<!DOCTYPE html><html>",
        b"\n <html><body>",
        b"<svg xmlns='x'/>",
        b"version https://git-lfs.github.com/spec/v1",
        b"\0\0\0\x18ftypheic\0\0\0\0",
        b"\0\x01\x02\xff\xfe rest",
        b"\x89PNG\r\n\x1a\n\0\0",
        b"II*\0\x08\0\0\0",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
    ),
)
def test_a_file_that_is_not_an_image_is_refused_by_name(tmp_path, content):
    (tmp_path / "cat.jpg").write_bytes(content)
    for source, name in ((tmp_path / "cat.jpg", str(tmp_path / "cat.jpg")), (content, f"<{len(content)} bytes>")):
        error = refused(source)
        assert error.file == name
        assert error.hint or error.expected


@pytest.mark.parametrize("kind", ("JPEG", "PNG", "WEBP", "GIF", "BMP"))
def test_a_truncated_file_is_refused_by_name(tmp_path, kind):
    data = encoded(random_image(200, 200), kind)
    (tmp_path / "cut").write_bytes(data[: len(data) * 2 // 3])
    assert refused("cut", base=tmp_path).file == str(tmp_path / "cut")


def test_paths_that_are_not_files_are_refused(tmp_path):
    assert refused(tmp_path / "no.png").file == str(tmp_path / "no.png")
    assert refused("no.png", base=tmp_path).file == str(tmp_path / "no.png")
    assert refused(tmp_path).file == str(tmp_path)
    assert refused("a\0b.png").file == r"'a\x00b.png'"
    assert "x" * 200 in refused("x" * 5000).file
    assert refused("s3://bucket/a.png").field == "scheme"
    assert refused("data:image/png;base64,####").file == "data:image/png;base64,####"
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert refused(tmp_path / "pipe").file == str(tmp_path / "pipe")


def test_images_over_the_limits_are_refused_before_decoding():
    assert refused(png_of_size(15_000, 15_000)).field == "image_pixels"
    tall = refused(png_of_size(70_000, 1))
    assert (tall.field, tall.value) == ("side", (70_000, 1))
    small = MediaLimits(image_pixels=767)
    for source, name in (
        (encoded(random_image()), f"<{len(encoded(random_image()))} bytes>"),
        (random_image(), "<image 32x24>"),
    ):
        error = refused(source, limits=small)
        assert (error.file, error.field, error.value) == (name, "image_pixels", (32, 24))
    assert open_image(Image(random_image()), limits=MediaLimits(image_pixels=768)).size == (32, 24)


def test_alpha_is_dropped():
    colour = random_image()
    alpha = colour.copy()
    alpha.putalpha(0)
    np.testing.assert_array_equal(np.asarray(open_image(Image(encoded(alpha)))), np.asarray(colour))


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def with_orientation(value: object) -> bytes:
    exif = PilImage.Exif()
    exif[0x0112] = value
    return exif.tobytes()


@pytest.mark.parametrize("kind", ("PNG", "WEBP", "AVIF", "JPEG", "PIL"))
def test_exif_orientation_is_applied_unless_disabled(kind):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    plain = random_image() if kind == "PIL" else encoded(random_image(), kind, **lossless)
    stored = np.asarray(open_image(Image(plain)))
    for value, turn in UPRIGHT.items():
        exif = with_orientation(value)
        if kind == "PIL":
            source = random_image()
            source.info["exif"] = exif
        else:
            source = encoded(random_image(), kind, exif=exif, **lossless)
        upright = open_image(Image(source))
        assert upright.size == (stored.shape[1::-1] if value < 5 else stored.shape[:2])
        if kind != "AVIF":  # whose encoder does not give the same pixels for every orientation
            np.testing.assert_array_equal(np.asarray(upright), turn(stored))
            as_stored = open_image(Image(source), exif_orientation=False)
            np.testing.assert_array_equal(np.asarray(as_stored), stored)
            np.testing.assert_array_equal(np.asarray(open_image(Image(as_stored))), stored)  # and stays
        np.testing.assert_array_equal(np.asarray(open_image(Image(upright))), np.asarray(upright))  # not applied twice


@pytest.mark.parametrize("compression", (None, "tiff_lzw"))
def test_the_orientation_of_a_tiff_is_applied_once(compression):
    """Pillow applies it while decoding, in the released code too."""
    stored = np.asarray(random_image())
    for value, turn in UPRIGHT.items():
        data = encoded(random_image(), "TIFF", compression=compression, tiffinfo={0x0112: value})
        for applied in (True, False):
            np.testing.assert_array_equal(np.asarray(open_image(Image(data), exif_orientation=applied)), turn(stored))
        assert orientation_of(data) == 1


def test_an_orientation_in_xmp_is_applied():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for kind in ("JPEG", "WEBP"):
        data = encoded(random_image(), kind, xmp=xmp)
        assert open_image(Image(data)).size == (24, 32)
        assert open_image(Image(data), exif_orientation=False).size == (32, 24)


@pytest.mark.filterwarnings(
    "ignore:Corrupt EXIF data", "ignore:Truncated File Read", "ignore:Possibly corrupt EXIF data"
)
@pytest.mark.parametrize(
    "exif",
    (
        b"",
        b"Exif\0\0",
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\xff\xff\xff\xff" * 3,
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02six\0",
        with_orientation(0),
        with_orientation(9),
        with_orientation(60_000),
    ),
)
def test_broken_exif_is_ignored(exif):
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(random_image(), kind, exif=exif) if exif else encoded(random_image(), kind)
        assert open_image(Image(data)).size == (32, 24)
        assert orientation_of(data) == 1
    colour = random_image()
    colour.info["exif"] = exif
    np.testing.assert_array_equal(np.asarray(open_image(Image(colour))), np.asarray(random_image()))


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_opens_without_a_warning():
    palette = random_image().quantize(8)
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


@pytest.mark.parametrize(
    "values, expected",
    (
        ([0, 1, 100, 199], [0, 1, 100, 199]),  # 8 bits saved as 16
        ([0, 3, 4, 1023], [0, 0, 1, 255]),
        ([0, 15, 16, 4095], [0, 0, 1, 255]),  # 12 bits, as of X-rays
        ([0, 63, 64, 16383], [0, 0, 1, 255]),
        ([0, 255, 256, 16384], [0, 0, 1, 64]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ),
)
def test_all_integer_modes_follow_one_rule(values, expected):
    """The smallest of 8, 10, 12, 14 and 16 bits that holds the largest value; its high 8 bits."""
    wide = np.array([values], np.uint16)
    sources = [PilImage.fromarray(wide), PilImage.fromarray(wide.astype(np.int32))]
    sources += [PilImage.frombytes("I;16B", (4, 1), wide.astype(">u2").tobytes())]
    sources += [encoded(PilImage.fromarray(wide), kind) for kind in ("PNG", "TIFF")]
    sources += [tiff(wide.astype("<i2"), sample_format=2), tiff(wide.astype(">u2"), order=">")]
    sources += [tiff(wide.astype("<u4")), tiff(wide.astype("<i4"), sample_format=2)]
    for source in sources:
        grey = np.asarray(open_image(Image(source)))
        assert grey[0, :, 0].tolist() == expected
        np.testing.assert_array_equal(grey[..., 0], grey[..., 2])


@pytest.mark.parametrize("channels", (2, 3, 4))
@pytest.mark.parametrize("values, shift", (([0, 1, 100, 199], 0), ([0, 15, 16, 4095], 4), ([0, 255, 256, 65535], 8)))
def test_sixteen_bit_colour_follows_the_same_rule(values, shift, channels):
    """Pillow returns only the high bytes of 16-bit colour: an image of small values would be black."""
    wide = np.stack([np.roll(values, place) for place in range(4)], axis=-1)[None].astype(np.uint16)
    wide = wide[..., :channels]
    if channels in (2, 4):
        wide[..., -1] = 65535  # alpha does not count
    colours = wide[..., [0, 0, 0] if channels == 2 else [0, 1, 2]] >> shift
    sources = {"png": png_of_16_bits(wide)}
    if channels != 2:
        sources |= {"tiff": tiff(wide.astype("<u2")), "big-endian": tiff(wide.astype(">u2"), order=">")}
    for name, source in sources.items():
        np.testing.assert_array_equal(np.asarray(open_image(Image(source))), colours, err_msg=name)


def test_orientation_and_scaling_of_sixteen_bit_colour_combine():
    wide = np.arange(6, dtype=np.uint16).reshape(1, 2, 3) * 30
    chunk = png_chunk(b"eXIf", with_orientation(6)[6:])
    upright = open_image(Image(png_of_16_bits(wide, chunk)))
    np.testing.assert_array_equal(np.asarray(upright), wide.swapaxes(0, 1))


def test_integers_and_floats_are_scaled_by_their_range():
    def grey(values: list[float], kind: str) -> list[int]:
        return np.asarray(open_image(Image(PilImage.fromarray(np.array([values], kind)))))[0, :, 0].tolist()

    assert grey([0, 100, 255], "i4") == [0, 100, 255]
    assert grey([0, 256, 65535], "i4") == [0, 1, 255]
    assert grey([0, 0.5, 1], "f4") == [0, 128, 255]
    assert grey([0, 1.5, 255], "f4") == [0, 1, 255]
    for values, kind in (([-1, 5], "i4"), ([0, 70000], "i4"), ([0, 256], "f4"), ([0, float("nan")], "f4")):
        error = refused(PilImage.fromarray(np.array([values], kind)))
        assert (error.field, error.value) == ("mode", "I" if kind == "i4" else "F")
    assert refused(tiff(np.array([[-5, 5]], "<i2"), sample_format=2)).field == "mode"


def tiff(values: np.ndarray, *, sample_format: int = 1, order: str = "<") -> bytes:
    """An uncompressed TIFF of one strip, from values [H, W] or [H, W, C] in the byte order `order`."""
    height, width, channels = (*values.shape, 1)[:3]
    bits = 8 * values.itemsize
    entries = [(256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * channels), (259, 3, [1])]
    entries += [(262, 3, [2 if channels > 2 else 1]), (273, 4, [0]), (277, 3, [channels])]
    entries += [(278, 4, [height]), (279, 4, [values.nbytes]), (339, 3, [sample_format] * channels)]
    start = 8 + 2 + 12 * len(entries) + 4
    extra, rows = b"", b""
    for tag, kind, numbers in entries:
        if tag == 273:
            numbers = [start + 2 * 2 * channels * (channels > 2)]
        packed = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            packed, extra = struct.pack(f"{order}I", start + len(extra)), extra + packed
        rows += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}I", 8) + struct.pack(f"{order}H", len(entries)) + rows + b"\0\0\0\0"
    return head + extra + values.tobytes()


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of_16_bits(values: np.ndarray, *chunks: bytes) -> bytes:
    """A PNG of uint16 [H, W, C], C = 2 (grey and alpha), 3 or 4."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    content = png_chunk(b"IHDR", header) + b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + content + png_chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("values", (np.zeros((2, 2, 3), "<u4"), np.zeros((2, 2, 5), "<u2"), np.zeros((2, 2), "<f8")))
def test_a_valid_tiff_of_an_unsupported_layout_is_not_reported_as_damaged(values):
    channels = values.shape[2] if values.ndim == 3 else 1
    error = refused(tiff(values, sample_format=3 if values.dtype.kind == "f" else 1))
    assert (error.field, error.value) == ("BitsPerSample", (8 * values.itemsize,) * channels)
    assert "copy" not in error.hint
    cut = refused(tiff(values)[:40])
    assert cut.field is None


def test_cmyk_and_other_colour_spaces_are_converted_as_pillow_does():
    """Adobe stores CMYK inverted in JPEG files; Pillow inverts it back."""
    colour = random_image()
    for kind in ("JPEG", "TIFF"):
        data = encoded(colour.convert("CMYK"), kind)
        expected = PilImage.open(io.BytesIO(data)).convert("RGB")
        np.testing.assert_array_equal(np.asarray(open_image(Image(data))), np.asarray(expected))
        assert np.abs(np.asarray(expected).astype(int) - np.asarray(colour)).mean() < 60
    for mode in ("HSV", "YCbCr", "PA", "LA", "RGBX", "1"):
        image = colour.convert("P").convert("PA") if mode == "PA" else colour.convert(mode)
        np.testing.assert_array_equal(np.asarray(open_image(Image(image))), np.asarray(image.convert("RGB")))
    premultiplied = colour.convert("RGBA").convert("RGBa")
    np.testing.assert_array_equal(np.asarray(open_image(Image(premultiplied))), np.asarray(colour))
    assert refused(PilImage.new("LAB", (4, 4))).value == "LAB"


def test_threads_open_images_concurrently():
    data = [encoded(random_image(40 + i, 30), kind) for i, kind in enumerate(("PNG", "JPEG", "WEBP", "GIF"))]
    alone = [np.asarray(open_image(Image(item))) for item in data]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda item: np.asarray(open_image(Image(item))), data * 10))
    for index, array in enumerate(together):
        np.testing.assert_array_equal(array, alone[index % 4])
