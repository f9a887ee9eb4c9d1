"""Frames of a video, taken evenly and found by seeking. All problems are MediaErrors naming the video.

PyAV decodes; it is imported only when a video is read. What Pillow reads (GIF and the like) is in `animation.py`.
"""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, cast

import numpy as np
from PIL import Image as PilImage
from PIL import UnidentifiedImageError
from PIL.Image import Transpose

from vila.core.errors import MediaError
from vila.core.optional import require
from vila.core.types import Image, Video
from vila.media.container import COPY_AGAIN, announced_packets, missing_bytes, unreadable
from vila.media.image import check_scans, decode_image, open_source, pillow_errors
from vila.media.limits import DEFAULT_LIMITS, DecodeMeter, IsCancelled, MediaLimits, MeteredStream, never

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.container import InputContainer


# --- animation
# Animations that Pillow reads: GIF, APNG and animated WebP, one composed frame after the other.


_STILLS = ("JPEG", "BMP", "TIFF", "PPM", "JPEG2000")
# Pillow reads neither HEIC nor, in every build, AVIF; to FFmpeg they are videos of one frame.
_STILL_BRANDS = (b"avif", b"heic", b"heix", b"mif1")


class Animation:
    """An opened animation. A GIF or WebP of one image counts as one; a PNG has to be an APNG."""

    def __init__(self, image: PilImage.Image, meter: DecodeMeter) -> None:
        self._image, self._meter = image, meter
        # The image that an APNG shows where animations are not supported need not belong to the animation.
        self._hidden = 1 if getattr(image, "default_image", False) else 0
        meter.check_size(*image.size)
        with pillow_errors(meter.name):
            self.num_frames: int = getattr(image, "n_frames", 1) - self._hidden
        meter.check_frames(self.num_frames)

    @classmethod
    def open(cls, stream: MeteredStream, meter: DecodeMeter) -> Animation | None:
        """The animation in `stream`, or None when its format is not one of images. Raises MediaError on still ones."""
        head = stream.read(16)
        stream.seek(0)
        if head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS:
            raise _still(meter.name, head[8:12].decode("ascii").upper())
        with pillow_errors(meter.name):
            try:
                image = PilImage.open(cast("IO[bytes]", stream), formats=("GIF", "PNG", "WEBP", *_STILLS))
            except UnidentifiedImageError:
                return None
            kind = image.format or ""
            if kind in _STILLS or (kind == "PNG" and image.get_format_mimetype() != "image/apng"):
                raise _still(meter.name, kind)
        return cls(image, meter)

    def read(self, wanted: list[int], keep: Callable[[PilImage.Image], PilImage.Image]) -> dict[int, PilImage.Image]:
        """The frames `wanted` (ascending) in RGB, alpha dropped as `open_image` does it, and each passed to `keep`.

        Each frame builds on the one before, so every frame up to the last wanted one is decoded. The last frame of all
        is decoded too: it is what a file cut short lacks. Raises MediaError naming the frame.
        """
        frames: dict[int, PilImage.Image] = {}
        for index in range(self.num_frames):
            field = f"frame {index} of {self.num_frames}"
            with pillow_errors(self._meter.name, field):
                self._image.seek(index + self._hidden)
                # Frames of a GIF that reach beyond its canvas enlarge it.
                self._meter.count_frame(*self._image.size)
                self._image.load()
            if index in wanted:
                frame = decode_image(self._image, self._meter.name, field=field, limits=self._meter.limits)
                frames[index] = keep(frame)
        return frames


def _still(name: str, kind: str) -> MediaError:
    return MediaError(f"a still image ({kind}), not a video", file=name, hint="give it as an image")


Shrink = Callable[[PilImage.Image], PilImage.Image]
"""What is kept of a frame; called as soon as the frame is decoded, so that no two full frames stay in memory."""

# Other demuxers open further files or addresses (HLS, concat, SDP), or read any text as a film (tty). Those for audio
# are there to say that a file holds audio.
_DEMUXERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,h264,hevc,m4v,obu,ivf,flv,asf,ogg,nut,mxf,yuv4mpegpipe,rm,dv,wtv"
_OPTIONS = {"format_whitelist": f"{_DEMUXERS},mp3,wav,flac,aac", "protocol_whitelist": "none"}


def open_frames(
    video: Video,
    num_frames: int,
    *,
    base: Path | None = None,
    allow_private: bool = False,
    limits: MediaLimits = DEFAULT_LIMITS,
    cancelled: IsCancelled = never,
    shrink: Shrink | None = None,
) -> list[PilImage.Image]:
    """Exactly `num_frames` frames of the video in RGB, in the order of presentation, at `frame_indices`.

    num_frames:    1 to `limits.num_frames`; `video.num_frames` is not read here.
    base:          the folder that a relative path starts from.
    allow_private: also fetch URLs from this machine and its network.
    limits:        see `MediaLimits`.
    cancelled:     called between packets, frames and reads.
    shrink:        makes what is kept of each frame; None keeps the whole frame.

    The frames are those that decoding the whole video gives, but only from the key frame before each wanted frame is
    decoded, so time and memory grow with `num_frames`; all packets are read, to count the frames. Where a video's time
    stamps do not allow that, all of it is decoded, twice. Frames are counted, not timed: of a video of variable frame
    rate they are even in number. Frames that no key frame precedes do not count. A frame repeated in a short video is
    one object several times. Frames are turned upright as the file says; pixels stay as stored, square or not.
    Raises MediaError naming the video, the reason and the remedy, CancelledError once `cancelled` is true; no frame is
    made up for one that is missing.
    """
    if not 1 <= num_frames <= limits.num_frames:
        expected = f"1 to {limits.num_frames}"
        raise MediaError(file=_name_of(video), field="num_frames", value=num_frames, expected=expected)
    stream, name = open_source(
        video.source,
        "a video",
        base=base,
        allow_private=allow_private,
        max_bytes=limits.video_bytes,
        timeout_s=limits.video_fetch_s,
        cancelled=cancelled,
    )
    with stream:
        meter = DecodeMeter(name, limits, cancelled)
        metered = MeteredStream(stream, meter)
        if not metered.read(1):
            raise MediaError("not a video (the file is empty)", file=name, hint=COPY_AGAIN)
        metered.seek(0)
        keep = _Keep(meter, shrink)
        animation = Animation.open(metered, meter)
        if animation is None:
            return _VideoFile(metered, meter, keep).read(num_frames)
        indices = frame_indices(animation.num_frames, num_frames)
        frames = animation.read(sorted(set(indices)), keep)
        return [frames[index] for index in indices]


@dataclass(frozen=True, slots=True)
class _Keep:
    """Shrink a frame and count what stays of it in memory."""

    meter: DecodeMeter
    shrink: Shrink | None

    def __call__(self, frame: PilImage.Image) -> PilImage.Image:
        kept = frame if self.shrink is None else self.shrink(frame)
        self.meter.keep_frame(*kept.size)
        return kept


def _name_of(video: Video) -> str:
    return Image(video.source).name


def frame_indices(total: int, num_frames: int) -> list[int]:
    """Which of `total` frames to take: floor(linspace(0, last, num_frames)), ascending.

    last is total - 2 when total > num_frames, as in the original, whose sampler never takes the last frame; published
    models were trained and measured with it. Otherwise it is total - 1: every frame is taken, some of them repeatedly,
    where the original puts black frames in front.
    """
    last = total - 2 if total > num_frames else total - 1
    return [int(index) for index in np.floor(np.linspace(0, last, num_frames))]


class _Entry(NamedTuple):
    """What a packet says without being decoded; times in the stream's own unit."""

    shown_at: int | None
    decoded_at: int | None
    is_key: bool
    is_shown: bool


class _Timeline(NamedTuple):
    """Times, ascending: when each frame is shown; when each key frame is; and when the latter are decoded."""

    shown: list[int]
    keys: list[int]
    starts: list[int]


def _build_timeline(entries: list[_Entry]) -> _Timeline | None:
    """From packets in the order of decoding; None where times are missing or double, or no frame is a key, or shown."""
    first = next((place for place, entry in enumerate(entries) if entry.is_key), len(entries))
    usable = {entry.shown_at: entry for entry in entries[first:] if entry.shown_at is not None}
    if not usable or len(usable) < len(entries) - first:
        return None
    begin = next(iter(usable))  # frames shown before the first key frame lean on frames that are not there
    shown = sorted(time for time, entry in usable.items() if entry.is_shown and time >= begin)
    keys = sorted(time for time, entry in usable.items() if entry.is_key)
    starts = [time if (start := usable[time].decoded_at) is None else start for time in keys]
    return _Timeline(shown, keys, starts) if shown else None


class _Unreliable(Exception):
    """The time stamps do not tell which frame is number `index`, or it does not come out of the decoder."""


@dataclass(frozen=True, slots=True)
class _VideoFile:
    """A file that PyAV reads, held to the limits of `meter`; `keep` is applied to each frame taken."""

    stream: MeteredStream
    meter: DecodeMeter
    keep: _Keep

    def read(self, num_frames: int) -> list[PilImage.Image]:
        """The frames at `frame_indices`, by seeking where the time stamps allow it."""
        suspect, missing = None, missing_bytes(self.stream)
        self.meter.check_packets(announced_packets(self.stream))
        with self._opened() as (container, track):
            timeline = self._timeline(container, track, missing)
            if timeline is not None:
                indices = frame_indices(len(timeline.shown), num_frames)
                try:
                    frames = self._seek_frames(container, track, timeline, sorted(set(indices)))
                    return [frames[index] for index in indices]
                except _Unreliable as error:
                    suspect = int(error.args[0])
        total = sum(1 for _ in self._decode_all(suspect))
        if not total:
            raise self._error("none of its frames can be decoded; it may be damaged")
        indices = frame_indices(total, num_frames)
        wanted = set(indices)
        every = islice(self._decode_all(suspect), indices[-1] + 1)
        frames = {index: self.keep(self._picture(frame)) for index, frame in enumerate(every) if index in wanted}
        return [frames[index] for index in indices]

    def _error(self, problem: str, hint: str = COPY_AGAIN, field: str | None = None) -> MediaError:
        return MediaError(problem, file=self.meter.name, field=field, hint=hint)

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        """The container, at its start, and the first video stream that is no cover image."""
        av = require("av", "video")
        from av.stream import Disposition

        self.stream.seek(0)
        try:
            container = av.open(
                self.stream,
                mode="r",
                options=self._decoder_options(),
                container_options=_OPTIONS,
                metadata_errors="replace",
            )
        except (av.FFmpegError, OSError) as error:
            raise unreadable(self.stream, self.meter.name) from error
        covers = Disposition.attached_pic | Disposition.timed_thumbnails
        with container:
            track = next((track for track in container.streams.video if not track.disposition & covers), None)
            unusable = track is None or track.codec_context is None
            if unusable and (not len(container.streams) or missing_bytes(self.stream)):
                raise unreadable(self.stream, self.meter.name)
            if track is None:
                kinds = " and ".join(sorted({stream.type for stream in container.streams} - {"video"}))
                raise self._error(f"holds no video, only {kinds or 'a cover image'}", "check the file")
            if track.codec_context is None:
                raise self._error("PyAV cannot decode this kind of video", "convert it to H.264")
            self.meter.check_size(track.codec_context.width, track.codec_context.height)
            track.codec_context.options = self._decoder_options()
            try:
                yield container, track
            except (av.FFmpegError, IndexError) as error:  # IndexError: PyAV, where damage pretends another stream
                reason = getattr(error, "strerror", error)
                raise self._error(f"cannot be read ({reason})") from error

    def _decoder_options(self) -> dict[str, str]:
        # FFmpeg refuses larger frames before it allocates them, also when the size changes in mid-stream.
        return {"max_pixels": str(self.meter.limits.frame_pixels)}

    def _timeline(self, container: InputContainer, track: VideoStream, missing: str) -> _Timeline | None:
        """The video's timeline, from all its packets. Raises MediaError when frames are `missing` at the file's end."""
        entries: list[_Entry] = []
        is_cut = False
        for packet in container.demux(track):
            self.meter.check()
            if packet.size:
                self.meter.count_packet()
                entries.append(_Entry(packet.pts, packet.dts, packet.is_keyframe, not packet.is_discard))
                is_cut = packet.is_corrupt
        self.meter.check_frames(len(entries))
        if is_cut or (missing and not 0 < track.frames <= len(entries)):
            last = f"after frame {len(entries) - 1}" if entries else "before its first frame"
            raise self._error(f"cut short {last}{missing and f' ({missing})'}")
        return _build_timeline(entries)

    def _seek_frames(
        self, container: InputContainer, track: VideoStream, timeline: _Timeline, wanted: list[int]
    ) -> dict[int, PilImage.Image]:
        """The frames `wanted` (ascending), each decoded from the last key frame shown at or before it.

        Frame by frame, what comes out has to be what the time stamps announced, starting with a true key frame;
        AVI gives decoding times for time stamps, and some codecs have packets without a frame. Else raises _Unreliable.
        """
        pictures: dict[int, PilImage.Image] = {}
        decoder: Iterator[VideoFrame] = iter(())
        group, place = -1, 0
        for index in wanted:
            key = bisect_right(timeline.keys, timeline.shown[index]) - 1
            if key != group:
                group, place = key, bisect_left(timeline.shown, timeline.keys[key])
                decoder = self._decode_from(container, track, timeline.keys[key], timeline.starts[key])
            for frame in decoder:
                self.meter.count_frame(frame.width, frame.height)
                is_false_key = frame.pts == timeline.keys[key] and not frame.key_frame
                if [frame.pts] != timeline.shown[place : place + 1] or frame.is_corrupt or is_false_key:
                    raise _Unreliable(index)
                place += 1
                if place > index:
                    pictures[index] = self.keep(self._picture(frame))
                    break
            else:
                raise _Unreliable(index)
        return pictures

    def _decode_from(self, container: InputContainer, track: VideoStream, key: int, start: int) -> Iterator[VideoFrame]:
        """Frames from the one shown at `key` on, whose packet is decoded at `start`; none where seeking goes wrong."""
        from av import FFmpegError

        for offset in (
            start,
            key,
        ):  # MPEG-TS, AVI and FLV seek by the one; a MOV that starts without a key by the other
            try:
                container.seek(offset, stream=track)
            except FFmpegError:
                continue
            found = False
            for packet in container.demux(track):
                self.meter.check()
                found = found or packet.pts == key
                if found:
                    self._check_scans(track, packet)
                    yield from _decode(packet)
            if found:
                return

    def _decode_all(self, suspect: int | None) -> Iterator[VideoFrame]:
        """Every frame. Raises MediaError on damage, for what follows it is not exact; it names the frame `suspect`."""
        from av import FFmpegError

        with self._opened() as (container, track):
            track.codec_context.options = {**self._decoder_options(), "err_detect": "explode"}
            key: Packet[VideoStream] | None = None
            place = 0
            for packet in container.demux(track):
                self.meter.check()
                self._check_scans(track, packet)
                key = packet if key is None and packet.is_keyframe else key
                try:
                    frames = packet.decode()
                    reason = "it is damaged" if any(frame.is_corrupt for frame in frames) else None
                except FFmpegError as error:
                    frames, reason = [], error.strerror
                if reason and key is not None and not _leads(packet, key, place):
                    number = place if suspect is None else suspect
                    raise self._error(f"cannot be decoded ({reason})", field=f"frame {number}")
                for frame in frames:
                    self.meter.count_frame(frame.width, frame.height)
                place += len(frames)
                self.meter.check_frames(place)
                yield from frames

    def _check_scans(self, track: VideoStream, packet: Packet[VideoStream]) -> None:
        """Raise MediaError for a frame of Motion JPEG with too many scans: decoding it cannot be interrupted."""
        if track.codec_context.name == "mjpeg" and packet.size:
            check_scans(io.BytesIO(bytes(packet)), self.meter.name, self.meter.limits)

    def _picture(self, frame: VideoFrame) -> PilImage.Image:
        """One frame in RGB, upright."""
        from av import FFmpegError
        from av.sidedata.sidedata import SideData

        try:
            picture = PilImage.fromarray(frame.to_ndarray(format="rgb24"))
        except FFmpegError as error:
            problem = f"{frame.format.name} pixels cannot be converted to RGB"
            raise self._error(problem, "convert it to H.264") from error
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if not isinstance(matrix, SideData):
            return picture
        a, b, _, c, d, *_ = np.sign(np.frombuffer(bytes(matrix), np.int32)).tolist()
        turn = _UPRIGHT.get((a, b, c, d))
        return picture if turn is None else picture.transpose(turn)


_UPRIGHT = {
    (0, 1, -1, 0): Transpose.ROTATE_270,  # clockwise by 90 degrees
    (-1, 0, 0, -1): Transpose.ROTATE_180,
    (0, -1, 1, 0): Transpose.ROTATE_90,
    (-1, 0, 0, 1): Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Transpose.TRANSPOSE,
    (0, -1, -1, 0): Transpose.TRANSVERSE,
}
"""By the signs of a, b, c, d in x' = a x + c y, y' = b x + d y, the display matrix of ISO/IEC 14496-12."""


def _decode(packet: Packet[VideoStream]) -> list[VideoFrame]:
    """The frames that the decoder gives out for `packet`; none when it is damaged, and the caller misses them."""
    from av import FFmpegError

    try:
        return packet.decode()
    except FFmpegError:
        return []


def _leads(packet: Packet[VideoStream], key: Packet[VideoStream], place: int) -> bool:
    """Whether `packet` is shown before the first `key` packet; without time stamps, whether no frame has come out."""
    if packet.pts is None or key.pts is None:
        return place == 0 and not packet.is_keyframe
    return packet.pts < key.pts
