"""Frames of a clip, taken evenly and found by seeking. Whatever is wrong becomes a MediaError naming the clip.

PyAV decodes; it is imported only when a clip is read. What Pillow reads (GIF and the like) is in `animation.py`.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image as PilImage
from PIL.Image import Transpose

from vila.core.errors import MediaError
from vila.core.optional import require
from vila.core.types import Video
from vila.media.animation import Animation
from vila.media.image import MAX_PIXELS, MAX_SIDE
from vila.media.source import open_source

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.container import InputContainer

MAX_FRAMES = 4096
"""The most frames that one call returns."""
MAX_BYTES = 512 * 2**20
"""The largest clip that comes from a URL, within `TIMEOUT_S`; a file may be of any size."""
TIMEOUT_S = 300

# Other demuxers open further files or addresses (HLS, concat, SDP), or read any text as a film (tty). Those for audio
# are there to say that a file holds audio.
_DEMUXERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,h264,hevc,m4v,obu,ivf,flv,asf,ogg,nut,mxf,yuv4mpegpipe,rm,dv,wtv"
_OPTIONS = {"format_whitelist": f"{_DEMUXERS},mp3,wav,flac,aac", "protocol_whitelist": "none"}
_COPY_AGAIN = "download or copy it again"


def open_frames(
    video: Video, num_frames: int, *, base: Path | None = None, allow_private: bool = False
) -> list[PilImage.Image]:
    """Exactly `num_frames` frames of the clip in RGB, in the order of presentation, at `frame_indices`.

    num_frames:    1 to 4096; the caller has settled it, `video.num_frames` is not read here.
    base:          the folder that a relative path starts from.
    allow_private: also fetch URLs from this machine and its network.

    The frames are those that decoding the whole clip gives, but only from the key frame before each wanted frame is
    decoded, so time and memory grow with `num_frames`; all packets are read, to count the frames. Where a clip's time
    stamps do not allow that, all of it is decoded, twice. Frames are counted, not timed: of a clip of variable frame
    rate they are even in number. Frames that no key frame precedes do not count. A frame repeated in a short clip is
    one object several times. Frames are turned upright as the file says; pixels stay as stored, square or not.
    Raises MediaError naming the clip, the reason and what to do; nothing is made up for frames that are missing.
    """
    if not 1 <= num_frames <= MAX_FRAMES:
        raise MediaError(f"num_frames is {num_frames}, expected 1 to {MAX_FRAMES}")
    stream, name = open_source(
        video.source, "a clip", base=base, allow_private=allow_private, max_bytes=MAX_BYTES, timeout_s=TIMEOUT_S
    )
    with stream:
        if not stream.read(1):
            raise MediaError(f"{name}: not a clip (the file is empty); {_COPY_AGAIN}")
        stream.seek(0)
        animation = Animation.open(stream, name)
        if animation is None:
            return _Clip(stream, name).read(num_frames)
        indices = frame_indices(animation.num_frames, num_frames)
        frames = animation.read(sorted(set(indices)))
        return [frames[index] for index in indices]


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
class _Clip:
    """A file that PyAV reads; `name` is for messages."""

    stream: IO[bytes]
    name: str

    def read(self, num_frames: int) -> list[PilImage.Image]:
        """The frames at `frame_indices`, by seeking where the time stamps allow it."""
        suspect, missing = None, _missing(self.stream)
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
            raise MediaError(f"{self.name}: none of its frames can be decoded; it may be damaged, {_COPY_AGAIN}")
        indices = frame_indices(total, num_frames)
        wanted = set(indices)
        every = islice(self._decode_all(suspect), indices[-1] + 1)
        frames = {index: self._picture(frame) for index, frame in enumerate(every) if index in wanted}
        return [frames[index] for index in indices]

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        """The container, at its start, and the first video stream that is no cover picture."""
        av = require("av", "video")
        from av.stream import Disposition

        self.stream.seek(0)
        try:
            container = av.open(self.stream, mode="r", container_options=_OPTIONS, metadata_errors="replace")
        except (av.FFmpegError, OSError) as error:
            raise _unreadable(self.stream, self.name) from error
        covers = Disposition.attached_pic | Disposition.timed_thumbnails
        with container:
            track = next((track for track in container.streams.video if not track.disposition & covers), None)
            if (track is None or track.codec_context is None) and (not len(container.streams) or _missing(self.stream)):
                raise _unreadable(self.stream, self.name)
            if track is None:
                kinds = " and ".join(sorted({stream.type for stream in container.streams} - {"video"}))
                raise MediaError(f"{self.name}: holds no video, only {kinds or 'a cover picture'}; check the file")
            if track.codec_context is None:
                raise MediaError(f"{self.name}: PyAV cannot decode this kind of video; convert it to H.264")
            self._check_size(track.codec_context.width, track.codec_context.height)
            try:
                yield container, track
            except (av.FFmpegError, IndexError) as error:  # IndexError: PyAV, where damage pretends another stream
                reason = getattr(error, "strerror", error)
                raise MediaError(f"{self.name}: cannot be read ({reason}); {_COPY_AGAIN}") from error

    def _check_size(self, width: int, height: int) -> None:
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            limit = f"over the limit of {MAX_PIXELS:,} or of {MAX_SIDE:,} a side"
            raise MediaError(f"{self.name}: frames of {width} x {height} pixels, {limit}; shrink it first")

    def _timeline(self, container: InputContainer, track: VideoStream, missing: str) -> _Timeline | None:
        """The clip's timeline, from all its packets. Raises MediaError when frames are `missing` at the file's end."""
        entries: list[_Entry] = []
        is_cut = False
        for packet in container.demux(track):
            if packet.size:
                entries.append(_Entry(packet.pts, packet.dts, packet.is_keyframe, not packet.is_discard))
                is_cut = packet.is_corrupt
        if is_cut or (missing and not 0 < track.frames <= len(entries)):
            last = f"after frame {len(entries) - 1}" if entries else "before its first frame"
            raise MediaError(f"{self.name}: cut short {last}{missing and f' ({missing})'}; {_COPY_AGAIN}")
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
                decoder = _decode_from(container, track, timeline.keys[key], timeline.starts[key])
            for frame in decoder:
                is_false_key = frame.pts == timeline.keys[key] and not frame.key_frame
                if [frame.pts] != timeline.shown[place : place + 1] or frame.is_corrupt or is_false_key:
                    raise _Unreliable(index)
                place += 1
                if place > index:
                    pictures[index] = self._picture(frame)
                    break
            else:
                raise _Unreliable(index)
        return pictures

    def _decode_all(self, suspect: int | None) -> Iterator[VideoFrame]:
        """Every frame. Raises MediaError on damage, for what follows it is not exact; it names the frame `suspect`."""
        from av import FFmpegError

        with self._opened() as (container, track):
            track.codec_context.options = {"err_detect": "explode"}
            key: Packet[VideoStream] | None = None
            place = 0
            for packet in container.demux(track):
                key = packet if key is None and packet.is_keyframe else key
                try:
                    frames = packet.decode()
                    reason = "it is damaged" if any(frame.is_corrupt for frame in frames) else None
                except FFmpegError as error:
                    frames, reason = [], error.strerror
                if reason and key is not None and not _leads(packet, key, place):
                    number = place if suspect is None else suspect
                    raise MediaError(f"{self.name}: frame {number} cannot be decoded ({reason}); {_COPY_AGAIN}")
                place += len(frames)
                yield from frames

    def _picture(self, frame: VideoFrame) -> PilImage.Image:
        """One frame in RGB, upright."""
        from av import FFmpegError
        from av.sidedata.sidedata import SideData

        self._check_size(frame.width, frame.height)
        try:
            picture = PilImage.fromarray(frame.to_ndarray(format="rgb24"))
        except FFmpegError as error:
            raise MediaError(f"{self.name}: {frame.format.name} pixels cannot be converted to RGB") from error
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


def _decode_from(container: InputContainer, track: VideoStream, key: int, start: int) -> Iterator[VideoFrame]:
    """Frames from the one shown at `key` on, whose packet is decoded at `start`; none where seeking goes wrong."""
    from av import FFmpegError

    for offset in (start, key):  # MPEG-TS, AVI and FLV seek by the one; a MOV that starts without a key by the other
        try:
            container.seek(offset, stream=track)
        except FFmpegError:
            continue
        found = False
        for packet in container.demux(track):
            found = found or packet.pts == key
            if found:
                yield from _decode(packet)
        if found:
            return


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


def _unreadable(stream: IO[bytes], name: str) -> MediaError:
    """Why FFmpeg cannot open it, from what its first bytes say."""
    missing = _missing(stream)
    stream.seek(0)
    head = stream.read(64)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if missing:
        return MediaError(f"{name}: cut short ({missing}); {_COPY_AGAIN}")
    if start.startswith(b"version https://git-lfs"):
        return MediaError(f"{name}: not a clip (a Git LFS pointer); run `git lfs pull`")
    if start.startswith((b"<!doctype", b"<html")):
        return MediaError(f"{name}: not a clip (a web page); give the address of the clip itself")
    expected = "MP4, MOV, WebM, MKV, AVI, MPEG, FLV, GIF, APNG or animated WebP"
    return MediaError(f"{name}: damaged or not a clip (starts with {head[:12]!r}); expected {expected}")


def _missing(stream: IO[bytes]) -> str:
    """How much of the file is there, if its own headers promise more; else the empty string."""
    size = stream.seek(0, os.SEEK_END)
    promised = _promised_bytes(stream, size)
    return f"{size:,} of {promised:,} bytes are there" if promised > size else ""


def _promised_bytes(stream: IO[bytes], size: int) -> int:
    """How long a file of `size` bytes is by its own headers, 0 if they do not say: RIFF, Matroska, or boxes."""
    stream.seek(0)
    head = stream.read(8)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:], "little")
    if head[:4] != b"\x1a\x45\xdf\xa3":
        return _boxes_bytes(stream, size)
    stream.seek(4)
    stream.seek(min(_ebml_size(stream), size), os.SEEK_CUR)
    segment = _ebml_size(stream) if stream.read(4) == b"\x18\x53\x80\x67" else 0
    return stream.tell() + segment if segment else 0


def _ebml_size(stream: IO[bytes]) -> int:
    """A length of 1 to 8 bytes, as many as the first has leading zero bits and one more. All ones, unknown, give 0."""
    first = stream.read(1)
    extra = 8 - first[0].bit_length() if first else 0
    ones = (1 << 7 * (extra + 1)) - 1
    value = int.from_bytes(first + stream.read(extra), "big") & ones
    return 0 if value == ones else value


def _boxes_bytes(stream: IO[bytes], size: int) -> int:
    """Where the last of the boxes that an MP4 or MOV file needs ends, 0 for any other file."""
    place = end = 0
    while place < size:
        stream.seek(place)
        head = stream.read(16)
        length = int.from_bytes(head[:4], "big")
        length = int.from_bytes(head[8:], "big") if length == 1 else length
        if length < 8 or not head[4:8].isalnum():
            break
        place += length
        end = place if head[4:8] in (b"moov", b"mdat", b"moof") else end
    return end
