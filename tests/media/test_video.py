"""Sampled frames equal those of decoding the whole video; a bad video raises an error that names it."""

import base64
import io
import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from threading import Thread

import av
import numpy as np
import pytest
from PIL import Image as PilImage

from vila.core.errors import MediaError
from vila.core.optional import MissingExtraError
from vila.core.types import Video
from vila.media import video
from vila.media.video import frame_indices, open_frames

WIDTH, HEIGHT, BITS = 64, 48, 12
ONE = 1 << 16


def barcode(number: int) -> np.ndarray:
    """A grey image [48, 64] of 3 x 4 blocks that encode `number` in binary."""
    bits = np.array([number >> bit & 1 for bit in range(BITS)], np.uint8).reshape(3, 4)
    return np.kron(bits * 255, np.ones((16, 16), np.uint8))


def number_of(image: PilImage.Image | np.ndarray) -> int:
    blocks = np.asarray(image)[..., 0].reshape(3, 16, 4, 16).mean((1, 3)) > 127
    return int(blocks.ravel() @ (1 << np.arange(BITS)))


def numbers(source: object, num_frames: int, **options: object) -> list[int]:
    return [number_of(image) for image in open_frames(Video(source), num_frames, **options)]


@lru_cache
def video_bytes(
    kind: str, codec: str, frames: int = 30, *, gop: int = 8, b_frames: int = 0, pixels: str = "yuv420p", **more: object
) -> bytes:
    """`frames` barcodes; `more` may hold `options` of the encoder and the `container`, and `times` of frames in ms."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=kind, options=dict(more.get("container", ()))) as container:
        track = container.add_stream(codec, rate=1000 if "times" in more else 25)
        track.width, track.height, track.pix_fmt = WIDTH, HEIGHT, pixels
        track.options = dict(more.get("options", ()))
        track.codec_context.gop_size = gop
        track.codec_context.max_b_frames = b_frames
        if "times" in more:
            track.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(barcode(number), format="gray").reformat(format=pixels)
            frame.pts = more["times"][number] if "times" in more else number
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return stream.getvalue()


def remuxed(
    data: bytes, kind: str, start: int = 0, *, audio: bool = False, cover: bool = False, only: str = "", keys: int = 0
) -> bytes:
    """Remux a video into another container, from packet `start` on, every `keys`-th packet marked as a key frame.

    cover, audio: add a cover image or an audio track before it; only: without the video itself.
    """
    stream = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(stream, "w", format=kind) as target:
        if cover:
            image = target.add_stream("mjpeg", rate=1)
            image.width, image.height, image.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
            image.disposition = av.stream.Disposition.attached_pic.value
        tone = target.add_stream("aac", rate=8000, layout="mono") if audio else None
        track = target.add_stream_from_template(source.streams.video[0]) if not only else None
        if cover:
            target.mux(
                image.encode(av.VideoFrame.from_ndarray(barcode(4095), format="gray").reformat(format="yuvj420p"))
            )
            target.mux(image.encode(None))
        if tone is not None:
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.rate, sound.pts = 8000, 0
            target.mux(tone.encode(sound))
            target.mux(tone.encode(None))
        for place, packet in enumerate(source.demux(video=0)):
            if track is not None and packet.size and place >= start:
                packet.stream = track
                packet.is_keyframe = packet.is_keyframe or (keys > 0 and place % keys == 0)
                target.mux(packet)
    return stream.getvalue()


def all_frames(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def patched(data: bytes, box: bytes, offset: int, content: bytes) -> bytes:
    """Return the video with `content` written `offset` bytes after the name of `box`."""
    place = data.index(box) + 4 + offset
    return data[:place] + content + data[place + len(content) :]


def refused(source: object, num_frames: int = 4, **options: object) -> MediaError:
    with pytest.raises(MediaError) as caught:
        open_frames(Video(source), num_frames, **options)
    return caught.value


UNEVEN = tuple(np.cumsum(np.random.default_rng(0).integers(1, 90, 30)).tolist())
OPEN_GOP = (("x264-params", "open-gop=1:scenecut=0:keyint=8:bframes=3:b-adapt=0"),)
OPEN_GOP_HEVC = (("x265-params", "log-level=none:open-gop=1:scenecut=0:keyint=8:min-keyint=8:bframes=3:b-adapt=0"),)
VIDEOS = {
    "h264 mp4": lambda: video_bytes("mp4", "libx264", b_frames=3),
    "h264 mkv": lambda: video_bytes("matroska", "libx264", b_frames=3),
    "h264 ts": lambda: video_bytes("mpegts", "libx264", b_frames=3),
    "h264 mp4, open GOP": lambda: video_bytes("mp4", "libx264", b_frames=3, options=OPEN_GOP),
    "h264 mp4, uneven times": lambda: video_bytes("mp4", "libx264", b_frames=3, times=UNEVEN),
    "h264 avi, decoding times": lambda: video_bytes("avi", "libx264", b_frames=3),
    "h264 raw, no times": lambda: video_bytes("h264", "libx264", b_frames=3),
    "h264 mkv, one key frame": lambda: video_bytes("matroska", "libx264", gop=300, b_frames=3),
    "hevc mp4, open GOP": lambda: video_bytes("mp4", "libx265", options=OPEN_GOP_HEVC),
    "mpeg4 mp4": lambda: video_bytes("mp4", "mpeg4", b_frames=2),
    "mpeg4 mp4, false key frames": lambda: remuxed(video_bytes("mp4", "mpeg4", gop=15), "mp4", keys=4),
    "mpeg4 avi": lambda: video_bytes("avi", "mpeg4"),
    "mpeg2 ts": lambda: video_bytes("mpegts", "mpeg2video", b_frames=2),
    "vp9 webm, uneven times": lambda: video_bytes(
        "webm", "libvpx-vp9", times=UNEVEN, options=(("deadline", "realtime"),)
    ),
    "vp8 webm": lambda: video_bytes("webm", "libvpx"),
    "mjpeg avi": lambda: video_bytes("avi", "mjpeg", pixels="yuvj420p"),
    "prores mov, 10 bits": lambda: video_bytes("mov", "prores", pixels="yuv422p10le"),
    "flv": lambda: video_bytes("flv", "libx264", b_frames=2),
    "starts before time zero": lambda: patched(
        video_bytes("mp4", "libx264", b_frames=3), b"elst", 8, struct.pack(">Ii", 800, 1024 + 5 * 512)
    ),
}


NOT_BY_SEEKING = ("h264 avi, decoding times", "h264 raw, no times", "mpeg4 mp4, false key frames")


@pytest.mark.parametrize("kind", VIDEOS)
def test_frames_equal_those_of_decoding_everything(kind, monkeypatch):
    data = VIDEOS[kind]()
    if kind not in NOT_BY_SEEKING:
        monkeypatch.delattr(video._VideoFile, "_decode_all")
    whole = all_frames(data)
    assert len(whole) >= 20
    assert {after - before for before, after in pairwise(map(number_of, whole))} == {1}
    for num_frames in (1, 2, 5, 8, 17, len(whole) - 1, len(whole), len(whole) + 1, 50):
        images = open_frames(Video(data), num_frames)
        assert len(images) == num_frames
        for image, index in zip(images, frame_indices(len(whole), num_frames), strict=True):
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), whole[index])


def test_frames_before_the_first_key_frame_are_not_counted(monkeypatch):
    monkeypatch.delattr(video._VideoFile, "_decode_all")
    assert numbers(remuxed(video_bytes("matroska", "mpeg4"), "matroska", 2), 4) == [
        8 + index for index in frame_indices(22, 4)
    ]
    for kind in ("mpegts", "matroska", "mp4"):
        whole = video_bytes(kind, "libx264", b_frames=3, options=OPEN_GOP)
        for start in (2, 5):  # packet 5 is the second key frame, number 8, and numbers 5 to 7 follow it
            late = remuxed(whole, kind, start)
            for num_frames in (1, 4, 22, 40):
                assert numbers(late, num_frames) == [8 + index for index in frame_indices(22, num_frames)]


def test_frame_indices_equal_the_released_code_and_repeat_for_short_videos():
    assert frame_indices(60, 4) == [0, 19, 38, 58]
    assert frame_indices(9, 8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert frame_indices(8, 8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert frame_indices(3, 8) == [0, 0, 0, 0, 1, 1, 1, 2]
    assert frame_indices(1, 3) == [0, 0, 0]
    assert frame_indices(60, 1) == [0]
    for total in range(10, 200, 7):
        assert frame_indices(total, 9) == np.linspace(0, total - 2, 9, dtype=int).tolist()


def test_a_short_video_repeats_frames():
    assert numbers(video_bytes("mp4", "libx264", frames=3), 8) == [0, 0, 0, 0, 1, 1, 1, 2]
    assert numbers(video_bytes("mp4", "libx264", frames=1), 3) == [0, 0, 0]


def test_a_long_video_is_not_decoded_completely(monkeypatch):
    data = video_bytes("matroska", "mpeg4", frames=1200, gop=10)
    decoded, decode = [], video._decode
    monkeypatch.setattr(video, "_decode", lambda packet: decoded.extend(frames := decode(packet)) or frames)
    assert numbers(data, 8) == frame_indices(1200, 8)
    assert len(decoded) <= 8 * 10
    decoded.clear()
    numbers(data, 400)
    assert len(decoded) <= 1200  # each group of images once, not once a frame
    decoded.clear()
    assert numbers(data, 1) == [0]
    assert len(decoded) == 1


@pytest.mark.parametrize(
    "matrix, turn",
    (
        ((1, 0, 0, 1), lambda a: a),
        ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
        ((-1, 0, 0, -1), lambda a: np.rot90(a, 2)),
        ((0, -1, 1, 0), lambda a: np.rot90(a, 1)),
        ((-1, 0, 0, 1), lambda a: a[:, ::-1]),
        ((1, 0, 0, -1), lambda a: a[::-1]),
        ((0, 1, 1, 0), lambda a: a.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda a: np.rot90(a, 2).swapaxes(0, 1)),
    ),
)
def test_frames_are_rotated_by_the_display_matrix(matrix, turn):
    plain = video_bytes("mp4", "libx264")
    a, b, c, d = (value * ONE for value in matrix)
    data = patched(plain, b"tkhd", 40, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))
    assert data != plain or matrix == (1, 0, 0, 1)
    whole = all_frames(plain)
    for image, index in zip(open_frames(Video(data), 3), frame_indices(30, 3), strict=True):
        np.testing.assert_array_equal(np.asarray(image), turn(whole[index]))


def test_odd_sizes_and_non_square_pixels_keep_their_stored_size():
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as container:
        track = container.add_stream("ffv1", rate=25)
        track.width, track.height, track.pix_fmt = 37, 21, "yuv444p"
        track.codec_context.sample_aspect_ratio = Fraction(2)
        container.mux(track.encode(av.VideoFrame.from_ndarray(np.full((21, 37, 3), 90, np.uint8), format="rgb24")))
        container.mux(track.encode(None))
    (image,) = open_frames(Video(stream.getvalue()), 1)
    assert image.size == (37, 21)
    assert np.abs(np.asarray(image).astype(int) - 90).max() <= 2


def test_a_cover_image_is_not_the_video():
    data = remuxed(video_bytes("mp4", "libx264"), "mp4", cover=True, audio=True)
    with av.open(io.BytesIO(data)) as container:
        assert len(container.streams.video) == 2
    assert numbers(data, 4) == frame_indices(30, 4)
    sound = video_bytes("mp4", "libx264")
    for cover in (False, True):
        extras = remuxed(sound, "mp4", audio=True, cover=cover, only="extras")
        assert refused(extras).file == f"<{len(extras)} bytes>"


@pytest.mark.parametrize("kind", ("GIF", "PNG", "WEBP"))
def test_animations_that_pillow_decodes(kind):
    frames = [PilImage.fromarray(barcode(number)).convert("RGB") for number in range(1, 11)]
    stream = io.BytesIO()
    frames[0].save(
        stream,
        kind,
        save_all=True,
        append_images=frames[1:],
        duration=40,
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    data = stream.getvalue()
    for num_frames in (1, 4, 9, 10, 25):
        images = open_frames(Video(data), num_frames)
        assert {image.mode for image in images} == {"RGB"}
        assert [number_of(image) for image in images] == [1 + index for index in frame_indices(10, num_frames)]
    assert refused(data[: len(data) * 2 // 3]).file == f"<{len(data) * 2 // 3} bytes>"


def test_the_fallback_image_of_an_apng_is_not_a_frame():
    frames = [PilImage.fromarray(barcode(number)) for number in range(5)]
    stream = io.BytesIO()
    frames[0].save(stream, "PNG", save_all=True, append_images=frames[1:], default_image=True)
    assert numbers(stream.getvalue(), 4) == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ("JPEG", "PNG", "BMP", "TIFF"))
def test_a_still_image_is_refused_but_a_gif_is_a_video_of_one_frame(kind):
    still, single = io.BytesIO(), io.BytesIO()
    PilImage.fromarray(barcode(7)).save(still, kind)
    assert "as an image" in refused(still.getvalue()).hint
    PilImage.fromarray(barcode(7)).save(single, "GIF")
    assert numbers(single.getvalue(), 3) == [7, 7, 7]


@dataclass(frozen=True)
class Member:
    """A video inside a larger file."""

    name: str

    def read(self) -> bytes:
        return video_bytes("mp4", "libx264")


def test_a_video_is_equal_from_every_source(tmp_path):
    data = video_bytes("mp4", "libx264")
    (tmp_path / "a.mp4").write_bytes(data)
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    for source in (tmp_path / "a.mp4", str(tmp_path / "a.mp4"), data, url, Member("a.tar, member 3")):
        assert numbers(source, 4) == [0, 9, 18, 28]
    assert numbers("a.mp4", 4, base=tmp_path) == [0, 9, 18, 28]


def test_a_url_is_fetched():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(
                video_bytes("mp4", "libx264") if self.path == "/a.mp4" else b"<!DOCTYPE html><title>Log in</title>"
            )

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        home = f"http://127.0.0.1:{server.server_port}"
        assert numbers(f"{home}/a.mp4", 2, allow_private=True) == [0, 28]
        assert refused(f"{home}/a.mp4").field == "host"
        assert refused(f"{home}/b.mp4", allow_private=True).file == f"{home}/b.mp4"
    finally:
        server.shutdown()
        server.server_close()


def test_paths_that_are_no_files_are_refused(tmp_path):
    assert refused(tmp_path / "no.mp4").file == str(tmp_path / "no.mp4")
    assert refused("no.mp4", base=tmp_path).file == str(tmp_path / "no.mp4")
    assert refused(tmp_path).file == str(tmp_path)
    assert refused("a\0b.mp4").file == r"'a\x00b.mp4'"
    assert refused("s3://bucket/a.mp4").field == "scheme"


@pytest.mark.parametrize(
    "content",
    (
        b"",
        b"hello, this is text\n" * 40,
        b"\0\xff\x13" * 500,
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<!DOCTYPE html><title>Log in</title>",
        b"ffconcat version 1.0\nfile 'other.mp4'\n",
        b"#EXTM3U\n#EXTINF:10,\nother.ts\n#EXT-X-ENDLIST\n",
        b"v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    ),
)
def test_a_file_that_is_no_video_is_refused_and_opens_no_other(tmp_path, content):
    for name, kind in (("other.mp4", "mp4"), ("other.ts", "mpegts")):
        (tmp_path / name).write_bytes(video_bytes(kind, "libx264", b_frames=3))
    (tmp_path / "video").write_bytes(content)
    for source, name in ((tmp_path / "video", str(tmp_path / "video")), (content, f"<{len(content)} bytes>")):
        error = refused(source)
        assert error.file == name
        assert error.hint or error.expected


FRAGMENTS = (("movflags", "frag_keyframe+empty_moov"),)
TO_CUT = {
    "index at the end": lambda: video_bytes("mp4", "libx264"),
    "fragments": lambda: video_bytes("mp4", "libx264", container=FRAGMENTS).partition(b"mfra")[0],
    "mkv": lambda: video_bytes("matroska", "libx264"),
    "avi": lambda: video_bytes("avi", "mjpeg", pixels="yuvj420p").partition(b"idx1")[0],
}


@pytest.mark.parametrize("share", (0.3, 0.7, 0.95))
@pytest.mark.parametrize("kind", TO_CUT)
def test_a_truncated_video_is_refused(tmp_path, kind, share):
    data = TO_CUT[kind]()
    (tmp_path / "cut").write_bytes(data[: int(len(data) * share)])
    error = refused(tmp_path / "cut")
    assert error.file == str(tmp_path / "cut")
    assert error.problem.startswith("truncated")


@pytest.mark.parametrize(
    "kind, codec", (("mp4", "libx264"), ("mp4", "libx265"), ("mp4", "mpeg4"), ("webm", "libvpx-vp9"), ("avi", "mjpeg"))
)
def test_damage_is_refused_if_a_sampled_frame_depends_on_it(kind, codec):
    options = (("x265-params", "log-level=none"),) if codec == "libx265" else ()
    data = video_bytes(kind, codec, pixels="yuvj420p" if codec == "mjpeg" else "yuv420p", options=options)
    with av.open(io.BytesIO(data)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][14]
    broken = bytearray(data)
    broken[packet.pos + 8 : packet.pos + packet.size] = b"\xff" * (packet.size - 8)
    assert numbers(bytes(broken), 2) == [0, 28]
    assert re.fullmatch(r"frame 1\d", refused(bytes(broken), 29).field)


def test_a_video_without_shown_frames_is_refused():
    data = video_bytes("mp4", "libx264", b_frames=3)
    assert refused(patched(data, b"elst", 8, struct.pack(">Ii", 0, 1 << 30))).file == f"<{len(data)} bytes>"


def test_limits_are_refused_before_decoding():
    data = video_bytes("mp4", "libx264")
    for number in (0, 4097):
        error = refused(data, number)
        assert (error.field, error.value) == ("num_frames", number)
    for size, field in (((20000, 10000), "frame_pixels"), ((70000, 2), "side")):
        head = f"YUV4MPEG2 W{size[0]} H{size[1]} F25:1 Ip C420\nFRAME\n".encode()
        error = refused(head.ljust(99999, b"\0"))
        assert (error.field, error.value) == (field, size)


def test_pyav_is_imported_lazily_and_named_if_missing(monkeypatch):
    code = "import sys, vila.media.video; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    data = video_bytes("mp4", "libx264")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError) as raised:
        numbers(data, 3)
    assert raised.value.hint == "pip install av"


def test_reading_prints_nothing_and_keeps_the_log_level_of_pyav(capfd):
    level = av.logging.get_level()
    data = video_bytes("mp4", "libx264", b_frames=3)
    numbers(data, 3)
    refused(data[:-200])
    assert capfd.readouterr() == ("", "")
    assert av.logging.get_level() == level
