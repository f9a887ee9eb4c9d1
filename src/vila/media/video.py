"""Sample frames evenly from a video, by seeking. Problems raise MediaError naming the video.

PyAV decodes videos and is imported only when one is read; Pillow decodes animations (GIF, APNG, animated WebP).
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


_STILLS = ("JPEG", "BMP", "TIFF", "PPM", "JPEG2000")
# Pillow does not read HEIC, and AVIF only in some builds; FFmpeg treats them as videos of one frame.
_STILL_BRANDS = (b"avif", b"heic", b"heix", b"mif1")


class Animation:
    """Animation opened by Pillow. A GIF or WebP of one image counts as an animation; a PNG must be an APNG."""

    def __init__(self, image: PilImage.Image, meter: DecodeMeter) -> None:
        self._image, self._meter = image, meter
        # The fallback image of an APNG may not belong to the animation.
        self._hidden = 1 if getattr(image, "default_image", False) else 0
        meter.check_size(*image.size)
        with pillow_errors(meter.name):
            self.num_frames: int = getattr(image, "n_frames", 1) - self._hidden
        meter.check_frames(self.num_frames)

    @classmethod
    def open(cls, stream: MeteredStream, meter: DecodeMeter) -> Animation | None:
        """Open an animation; None if the format is not an image format. Raises MediaError for still images."""
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

    def read(self, wanted: list[int], keep: Shrink) -> dict[int, PilImage.Image]:
        """Decode the frames at `wanted` (ascending) to RGB without alpha, like `open_image`, each mapped by `keep`.

        Frames depend on earlier ones, so all frames are decoded, also those after the last wanted one: a truncated file
        lacks the last frame. Raises MediaError naming the frame.
        """
        frames: dict[int, PilImage.Image] = {}
        for index in range(self.num_frames):
            field = f"frame {index} of {self.num_frames}"
            with pillow_errors(self._meter.name, field):
                self._image.seek(index + self._hidden)
                # GIF frames that extend beyond the canvas enlarge it.
                self._meter.count_frame(*self._image.size)
                self._image.load()
            if index in wanted:
                frame = decode_image(self._image, self._meter.name, field=field, limits=self._meter.limits)
                frames[index] = keep(frame)
        return frames


def _still(name: str, kind: str) -> MediaError:
    return MediaError(f"a still image ({kind}), not a video", file=name, hint="pass it as an image")


Shrink = Callable[[PilImage.Image], PilImage.Image]
"""Maps a frame to what stays in memory. Called right after decoding, so at most one full-size frame is in memory."""

# Other demuxers open further files or URLs (HLS, concat, SDP), or decode any text as a video (tty). The audio demuxers
# serve the message that a file contains audio only.
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
    """Decode `num_frames` frames to RGB, in presentation order, at `frame_indices`.

    num_frames:    1 to `limits.num_frames`; `video.num_frames` is ignored here.
    base:          directory that relative paths are resolved against.
    allow_private: also fetch URLs from private addresses.
    limits:        see `MediaLimits`.
    cancelled:     called between packets, frames and reads.
    shrink:        maps each frame to what is returned, such as a smaller image; None returns the full frame.

    The frames equal those of decoding the whole video, but decoding starts at the key frame before each wanted frame,
    so time and memory grow with `num_frames`. All packets are read to count the frames. If the timestamps do not allow
    seeking, the whole video is decoded, twice. Frames are spaced evenly by number, not by time (variable frame rate).
    Frames before the first key frame are not counted. A frame repeated for a short video is the same object. Frames are
    rotated as the file's display matrix says; the pixel aspect ratio is not applied.
    Raises MediaError, and CancelledError once `cancelled` returns True; missing frames are never invented.
    """
    if not 1 <= num_frames <= limits.num_frames:
        expected = f"1 to {limits.num_frames}"
        raise MediaError(file=Image(video.source).name, field="num_frames", value=num_frames, expected=expected)
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
            raise MediaError("empty file", file=name, hint=COPY_AGAIN)
        metered.seek(0)

        def keep(frame: PilImage.Image) -> PilImage.Image:
            kept = frame if shrink is None else shrink(frame)
            meter.keep_frame(*kept.size)
            return kept

        animation = Animation.open(metered, meter)
        if animation is None:
            return _VideoFile(metered, meter, keep).read(num_frames)
        indices = frame_indices(animation.num_frames, num_frames)
        frames = animation.read(sorted(set(indices)), keep)
        return [frames[index] for index in indices]


def frame_indices(total: int, num_frames: int) -> list[int]:
    """Return the indices of the frames to sample from `total`: floor(linspace(0, last, num_frames)), ascending.

    last = total - 2 if total > num_frames: the released sampler never takes the last frame, and published models were
    trained and evaluated with it. Otherwise last = total - 1: all frames are taken, some repeatedly, where the released
    code prepends black frames.
    """
    last = total - 2 if total > num_frames else total - 1
    return [int(index) for index in np.floor(np.linspace(0, last, num_frames))]


class _Entry(NamedTuple):
    """Metadata of a packet, available without decoding; times in the stream's time base."""

    shown_at: int | None
    decoded_at: int | None
    is_key: bool
    is_shown: bool


class _Timeline(NamedTuple):
    """Ascending timestamps: of all frames (`shown`), of key frames (`keys`), and decoding times of these (`starts`)."""

    shown: list[int]
    keys: list[int]
    starts: list[int]


def _build_timeline(entries: list[_Entry]) -> _Timeline | None:
    """Build the timeline from packets in decoding order; None without key frames, or if timestamps are not unique."""
    first = next((number for number, entry in enumerate(entries) if entry.is_key), len(entries))
    usable = {entry.shown_at: entry for entry in entries[first:] if entry.shown_at is not None}
    if not usable or len(usable) < len(entries) - first:
        return None
    begin = next(iter(usable))  # frames shown before the first key frame depend on frames that are absent
    shown = sorted(time for time, entry in usable.items() if entry.is_shown and time >= begin)
    keys = sorted(time for time, entry in usable.items() if entry.is_key)
    starts = [time if (start := usable[time].decoded_at) is None else start for time in keys]
    return _Timeline(shown, keys, starts) if shown else None


class _UnreliableTimestamps(Exception):
    """The timestamps do not identify frame `args[0]`, or the decoder does not return it."""


@dataclass(frozen=True, slots=True)
class _VideoFile:
    """Video file decoded by PyAV within the limits of `meter`; `keep` is applied to each sampled frame."""

    stream: MeteredStream
    meter: DecodeMeter
    keep: Shrink

    def read(self, num_frames: int) -> list[PilImage.Image]:
        """Decode the frames at `frame_indices`, by seeking if the timestamps allow it."""
        suspect, missing = None, missing_bytes(self.stream)
        self.meter.check_packets(announced_packets(self.stream))
        with self._opened() as (container, track):
            timeline = self._timeline(container, track, missing)
            if timeline is not None:
                indices = frame_indices(len(timeline.shown), num_frames)
                try:
                    frames = self._seek_frames(container, track, timeline, sorted(set(indices)))
                    return [frames[index] for index in indices]
                except _UnreliableTimestamps as error:
                    suspect = int(error.args[0])
        total = sum(1 for _ in self._decode_all(suspect))
        if not total:
            raise self._error("no frame can be decoded")
        indices = frame_indices(total, num_frames)
        wanted = set(indices)
        every = islice(self._decode_all(suspect), indices[-1] + 1)
        frames = {index: self.keep(self._to_image(frame)) for index, frame in enumerate(every) if index in wanted}
        return [frames[index] for index in indices]

    def _error(self, problem: str, hint: str = COPY_AGAIN, field: str | None = None) -> MediaError:
        return MediaError(problem, file=self.meter.name, field=field, hint=hint)

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        """Open the container; yields it and the first video stream that is not a cover image."""
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
                raise self._error(f"no video stream, only {kinds or 'a cover image'}", "check the file")
            if track.codec_context is None:
                raise self._error("PyAV has no decoder for this codec", "convert it to H.264")
            self.meter.check_size(track.codec_context.width, track.codec_context.height)
            track.codec_context.options = self._decoder_options()
            try:
                yield container, track
            except (av.FFmpegError, IndexError) as error:  # IndexError: a damaged packet names a stream that is absent
                reason = getattr(error, "strerror", error)
                raise self._error(f"cannot be read ({reason})") from error

    def _decoder_options(self) -> dict[str, str]:
        # FFmpeg rejects larger frames before it allocates them, also when the size changes in mid-stream.
        return {"max_pixels": str(self.meter.limits.frame_pixels)}

    def _timeline(self, container: InputContainer, track: VideoStream, missing: str) -> _Timeline | None:
        """Read all packets and build the timeline. Raises MediaError if frames are `missing` at the end of the file."""
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
            raise self._error(f"truncated {last}{missing and f' ({missing})'}")
        return _build_timeline(entries)

    def _seek_frames(
        self, container: InputContainer, track: VideoStream, timeline: _Timeline, wanted: list[int]
    ) -> dict[int, PilImage.Image]:
        """Decode the frames at `wanted` (ascending), each from the last key frame shown at or before it.

        Every decoded frame must have the announced timestamp, starting with a true key frame; AVI stores decoding times
        as timestamps, and some codecs have packets without a frame. Raises _UnreliableTimestamps otherwise.
        """
        images: dict[int, PilImage.Image] = {}
        decoder: Iterator[VideoFrame] = iter(())
        group, position = -1, 0
        for index in wanted:
            key = bisect_right(timeline.keys, timeline.shown[index]) - 1
            if key != group:
                group, position = key, bisect_left(timeline.shown, timeline.keys[key])
                decoder = self._decode_from(container, track, timeline.keys[key], timeline.starts[key])
            for frame in decoder:
                self.meter.count_frame(frame.width, frame.height)
                is_false_key = frame.pts == timeline.keys[key] and not frame.key_frame
                if [frame.pts] != timeline.shown[position : position + 1] or frame.is_corrupt or is_false_key:
                    raise _UnreliableTimestamps(index)
                position += 1
                if position > index:
                    images[index] = self.keep(self._to_image(frame))
                    break
            else:
                raise _UnreliableTimestamps(index)
        return images

    def _decode_from(self, container: InputContainer, track: VideoStream, key: int, start: int) -> Iterator[VideoFrame]:
        """Yield frames from the key frame shown at `key` and decoded at `start`; nothing if seeking fails."""
        from av import FFmpegError

        # MPEG-TS, AVI and FLV seek by decoding time, a MOV that starts without a key frame by presentation time.
        for offset in (start, key):
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
        """Yield every frame. Raises MediaError on damage, naming frame `suspect`: later frames would be inexact."""
        from av import FFmpegError

        with self._opened() as (container, track):
            track.codec_context.options = {**self._decoder_options(), "err_detect": "explode"}
            key: Packet[VideoStream] | None = None
            num_decoded = 0
            for packet in container.demux(track):
                self.meter.check()
                self._check_scans(track, packet)
                key = packet if key is None and packet.is_keyframe else key
                try:
                    frames = packet.decode()
                    reason = "damaged" if any(frame.is_corrupt for frame in frames) else None
                except FFmpegError as error:
                    frames, reason = [], error.strerror
                if reason and key is not None and not _precedes(packet, key, num_decoded):
                    number = num_decoded if suspect is None else suspect
                    raise self._error(f"cannot be decoded ({reason})", field=f"frame {number}")
                for frame in frames:
                    self.meter.count_frame(frame.width, frame.height)
                num_decoded += len(frames)
                self.meter.check_frames(num_decoded)
                yield from frames

    def _check_scans(self, track: VideoStream, packet: Packet[VideoStream]) -> None:
        """Raise MediaError for a Motion JPEG frame with too many scans, whose decoding could not be interrupted."""
        if track.codec_context.name == "mjpeg" and packet.size:
            check_scans(io.BytesIO(bytes(packet)), self.meter.name, self.meter.limits)

    def _to_image(self, frame: VideoFrame) -> PilImage.Image:
        """Convert a frame to RGB and apply the display matrix."""
        from av import FFmpegError
        from av.sidedata.sidedata import SideData

        try:
            image = PilImage.fromarray(frame.to_ndarray(format="rgb24"))
        except FFmpegError as error:
            problem = f"{frame.format.name} pixels cannot be converted to RGB"
            raise self._error(problem, "convert it to H.264") from error
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if not isinstance(matrix, SideData):
            return image
        a, b, _, c, d, *_ = np.sign(np.frombuffer(bytes(matrix), np.int32)).tolist()
        turn = _TURNS.get((a, b, c, d))
        return image if turn is None else image.transpose(turn)


_TURNS = {
    (0, 1, -1, 0): Transpose.ROTATE_270,  # clockwise by 90 degrees
    (-1, 0, 0, -1): Transpose.ROTATE_180,
    (0, -1, 1, 0): Transpose.ROTATE_90,
    (-1, 0, 0, 1): Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Transpose.TRANSPOSE,
    (0, -1, -1, 0): Transpose.TRANSVERSE,
}
"""Transpositions by the signs of a, b, c, d in x' = a x + c y, y' = b x + d y (display matrix, ISO/IEC 14496-12)."""


def _decode(packet: Packet[VideoStream]) -> list[VideoFrame]:
    """Decode a packet. Returns no frames if it is damaged; the caller notices that they are missing."""
    from av import FFmpegError

    try:
        return packet.decode()
    except FFmpegError:
        return []


def _precedes(packet: Packet[VideoStream], key: Packet[VideoStream], num_decoded: int) -> bool:
    """Return whether `packet` precedes the first key packet; without timestamps, whether no frame is decoded yet."""
    if packet.pts is None or key.pts is None:
        return num_decoded == 0 and not packet.is_keyframe
    return packet.pts < key.pts
