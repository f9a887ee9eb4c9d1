"""Resource limits: each is enforced before memory is allocated, and decoding stops when it is cancelled."""

import io
import struct
import time
import weakref

import av
import numpy as np
import pytest
from PIL import Image as PilImage

from tests.media.test_image import random_image
from tests.media.test_video import FRAGMENTS, HEIGHT, WIDTH, patched, video_bytes
from vila.core.errors import CancelledError, MediaError
from vila.core.types import Image, Video
from vila.media.container import jpeg_scans
from vila.media.image import open_image
from vila.media.limits import MediaLimits
from vila.media.video import frame_indices, open_frames

PIXELS = WIDTH * HEIGHT


def animation(kind: str = "GIF", frames: int = 10, size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    images = [PilImage.new("L", size, 20 * number) for number in range(frames)]
    stream = io.BytesIO()
    images[0].save(stream, kind, save_all=True, append_images=images[1:], duration=40)
    return stream.getvalue()


VIDEOS = {
    "gif": animation,
    "apng": lambda: animation("PNG"),
    "webp": lambda: animation("WEBP"),
    "h264 mp4": lambda: video_bytes("mp4", "libx264", 10, b_frames=3),
    "h264 raw, decoded whole": lambda: video_bytes("h264", "libx264", 10, b_frames=3),
}


@pytest.fixture(params=VIDEOS)
def data(request) -> bytes:
    return VIDEOS[request.param]()


def refused(data: bytes, taken: int = 4, **limits: float) -> MediaError:
    with pytest.raises(MediaError) as caught:
        open_frames(Video(data), taken, limits=MediaLimits(**limits))
    assert caught.value.file == f"<{len(data)} bytes>"
    return caught.value


@pytest.mark.parametrize(
    "limits, value",
    (
        ({"frame_pixels": PIXELS - 1}, (WIDTH, HEIGHT)),
        ({"side": WIDTH - 1}, (WIDTH, HEIGHT)),
        ({"num_frames": 3}, 4),
    ),
)
def test_a_size_limit_is_named_with_the_value(data, limits, value):
    error = refused(data, **limits)
    assert [error.field] == list(limits)
    assert error.value == value


@pytest.mark.parametrize(
    "limits", ({"video_frames": 9}, {"decoded_pixels": 2 * PIXELS}, {"kept_pixels": 3 * PIXELS}, {"decode_s": 0.0})
)
def test_a_decoding_limit_is_named(data, limits):
    assert [refused(data, **limits).field] == list(limits)


def test_a_video_exactly_at_the_limits_is_read(data):
    limits = MediaLimits(
        frame_pixels=PIXELS,
        side=WIDTH,
        num_frames=4,
        video_frames=10,
        decoded_pixels=20 * PIXELS,
        kept_pixels=4 * PIXELS,
    )
    assert len(open_frames(Video(data), 4, limits=limits)) == 4


def test_packets_are_limited():
    for kind in ("mp4", "h264"):
        assert refused(video_bytes(kind, "libx264", 10), video_packets=9).field == "video_packets"


def test_at_most_one_full_frame_is_in_memory_while_frames_are_resized(data):
    whole: list[weakref.ref[PilImage.Image]] = []

    def shrink(frame: PilImage.Image) -> PilImage.Image:
        assert [ref for ref in whole if ref() is not None] == []
        whole.append(weakref.ref(frame))
        return frame.resize((8, 8))

    frames = open_frames(Video(data), 8, shrink=shrink, limits=MediaLimits(kept_pixels=8 * 64))
    assert {frame.size for frame in frames} == {(8, 8)}
    assert len(whole) == 8
    for small, frame in zip(frames, open_frames(Video(data), 8), strict=True):
        np.testing.assert_array_equal(np.asarray(small), np.asarray(frame.resize((8, 8))))


def test_decoding_stops_when_it_is_cancelled(data):
    calls = 0

    def count() -> bool:
        nonlocal calls
        calls += 1
        return False

    open_frames(Video(data), 4, cancelled=count)
    assert calls > 10  # between the reads, packets and frames
    for last in range(1, calls, 7):
        left = iter(range(last))
        with pytest.raises(CancelledError) as caught:
            open_frames(Video(data), 4, cancelled=lambda left=left: next(left, None) is None)
        assert caught.value.file == f"<{len(data)} bytes>"


def test_a_growing_gif_is_refused_before_its_large_frame():
    data = bytearray(animation(frames=2))
    second = data.index(b",", data.index(b",") + 1)
    # The descriptor of the second frame: left, top, width, height.
    data[second + 1 : second + 9] = struct.pack("<4H", 0, 0, 300, 300)
    error = refused(bytes(data), frame_pixels=10_000)
    assert (error.field, error.value) == ("frame_pixels", (300, 300))


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow's own warning
def test_a_small_file_of_large_frames_is_refused_at_once():
    begun = time.monotonic()
    data = animation(size=(1, 1))
    data = data[:6] + struct.pack("<2H", 12_000, 12_000) + data[10:]  # ten frames of 144 megapixels
    assert len(data) < 1000
    assert refused(data).field == "frame_pixels"
    assert time.monotonic() - begun < 0.5


def test_frames_that_grow_in_mid_stream_are_refused():
    large, stream = io.BytesIO(), io.BytesIO()
    PilImage.new("L", (2000, 2000)).save(large, "JPEG")
    small = io.BytesIO()
    random_image(WIDTH, HEIGHT).save(small, "JPEG")
    with av.open(stream, "w", format="avi") as container:
        track = container.add_stream("mjpeg", rate=25)
        track.width, track.height, track.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        for number in range(6):
            packet = av.Packet((large if number == 4 else small).getvalue())
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = track, number, number, True
            container.mux(packet)
    data = stream.getvalue()
    assert len(open_frames(Video(data), 6)) == 6
    assert refused(data, 6, frame_pixels=10_000).field == "frame 4"


def announcing(count: int) -> bytes:
    """An MP4 of 2 KB whose sample tables announce `count` samples of one byte each."""
    data = video_bytes("mp4", "libx264", 3)
    data = patched(data, b"stsz", 4, struct.pack(">II", 1, count))
    data = patched(data, b"stsc", 12, struct.pack(">I", count))
    return patched(data, b"stts", 8, struct.pack(">I", count))


def test_sample_tables_over_the_packet_limit_are_refused_before_ffmpeg_builds_them():
    begun = time.monotonic()
    assert refused(announcing(100_000_000)).field == "video_packets"  # FFmpeg takes 24 bytes for each
    fragments = video_bytes("mp4", "libx264", container=FRAGMENTS)
    assert refused(patched(fragments, b"trun", 4, struct.pack(">I", 100_000_000))).field == "video_packets"
    assert time.monotonic() - begun < 0.5
    assert len(open_frames(Video(fragments), 4, limits=MediaLimits(video_packets=30))) == 4


def test_uncompressed_audio_announces_no_packets():
    stream = io.BytesIO()
    with av.open(stream, "w", format="mov") as container:
        track = container.add_stream("libx264", rate=25)
        track.width, track.height, track.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        tone = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(np.zeros((HEIGHT, WIDTH), np.uint8), format="gray").reformat(
                format="yuv420p"
            )
            frame.pts = number
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), format="s16", layout="mono")
        sound.rate, sound.pts = 8000, 0
        container.mux(tone.encode(sound))
        container.mux(tone.encode(None))
    data = stream.getvalue()
    assert len(open_frames(Video(data), 3, limits=MediaLimits(video_packets=100))) == 3
    as_video = data.replace(b"soun", b"vide")
    assert refused(as_video, video_packets=100).field == "video_packets"


def test_indices_do_not_depend_on_limits():
    data = animation(frames=30)
    plain = open_frames(Video(data), 7)
    limited = open_frames(Video(data), 7, limits=MediaLimits(decoded_pixels=30 * PIXELS, video_frames=30))
    assert [frame.getpixel((0, 0)) for frame in plain] == [frame.getpixel((0, 0)) for frame in limited]
    assert len(plain) == len(frame_indices(30, 7))


def with_scans(more: int, size: tuple[int, int] = (WIDTH, HEIGHT), behind: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan is repeated `more` times."""
    stream = io.BytesIO()
    PilImage.new("L", size, 128).save(stream, "JPEG", progressive=True, exif=b"Exif\0\0" + b"\xff\xda\0\2" * 500)
    data = stream.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * more + data[-2:] + behind


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded():
    begun = time.monotonic()
    with pytest.raises(MediaError) as caught:
        open_image(Image(with_scans(5000, (5000, 5000))))  # a minute or more of decoding
    assert caught.value.field == "jpeg_scans"
    assert time.monotonic() - begun < 1
    behind = b"\xff\xda\0\2" * 500  # such as the video of a motion photo
    assert open_image(Image(with_scans(50, behind=behind))).size == (WIDTH, HEIGHT)
    plain = io.BytesIO()
    random_image(WIDTH, HEIGHT).save(plain, "JPEG")
    assert jpeg_scans(plain, 10) == 1
    assert open_image(Image(plain.getvalue()), limits=MediaLimits(jpeg_scans=1)).size == (WIDTH, HEIGHT)


def test_a_frame_of_many_scans_is_refused_before_it_is_decoded():
    for more, is_good in ((0, True), (200, False)):
        stream = io.BytesIO()
        with av.open(stream, "w", format="avi") as container:
            track = container.add_stream("mjpeg", rate=25)
            track.width, track.height, track.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
            packet = av.Packet(with_scans(more))
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = track, 0, 0, True
            container.mux(packet)
        if is_good:
            assert len(open_frames(Video(stream.getvalue()), 1)) == 1
        else:
            assert refused(stream.getvalue(), 1).field == "jpeg_scans"
