"""Limits on reading images and videos, and the meter that holds one video to them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Protocol

from vila.core.errors import CancelledError, MediaError

IsCancelled = Callable[[], bool]
"""Whether the result is no longer wanted. Called between packets, frames and reads, so it has to be cheap."""


def never() -> bool:
    """Cancel nothing; the default of every `cancelled` argument."""
    return False


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """Limits on the cost of one image or one video. All sizes are checked before memory is allocated for them.

    The defaults suit files that the user chose: they admit every ordinary image and hours of video, and stop files
    that were made to exhaust memory. `vila serve` has tighter ones.
    """

    image_bytes: int = 50 * 2**20
    """Encoded bytes of an image from a URL or a `data:` URL; a file may have any size."""
    image_pixels: int = 178_956_970
    """Pixels of an image; the limit of Pillow itself, which cannot be raised here."""
    side: int = 65_535
    """Longest side in pixels of an image or a video frame, which is the most that a JPEG file can have.
    An image of 1 x 100,000,000 holds few pixels, but the square that it is padded to does not."""
    jpeg_scans: int = 100
    """Scans of a JPEG image or frame; progressive ones of ordinary programs have 3 to 20. Each takes a pass over all
    pixels."""
    image_fetch_s: float = 20.0
    """Seconds for fetching an image from its URL."""
    video_bytes: int = 512 * 2**20
    """Encoded bytes of a video from a URL or a `data:` URL; a file may have any size."""
    video_fetch_s: float = 300.0
    """Seconds for fetching a video from its URL."""
    num_frames: int = 4096
    """Frames taken from one video."""
    frame_pixels: int = 2**26
    """Pixels of one video frame (8192 x 8192)."""
    video_frames: int = 4_000_000
    """Frames that a video may have: 18 hours at 60 frames per second."""
    video_packets: int = 8_000_000
    """Packets of a video's container that are read, and that its index may announce."""
    decoded_pixels: int = 2**41
    """Pixels of all frames of one video that are decoded: a million frames of 1920 x 1080.
    Frames that are decoded only to reach another one count too."""
    kept_pixels: int = 2**30
    """Pixels of all frames taken from one video, after they were shrunk; 4 bytes of memory each."""
    decode_s: float = 3600.0
    """Seconds of wall-clock time for decoding one video."""


DEFAULT_LIMITS = MediaLimits()


class DecodeMeter:
    """Count the packets, frames, pixels and seconds of decoding one video. Every method raises at a limit.

    name:      of the video, for errors.
    cancelled: see `IsCancelled`.
    Raises MediaError naming the limit, and CancelledError once `cancelled` returns True.
    """

    def __init__(self, name: str, limits: MediaLimits = DEFAULT_LIMITS, cancelled: IsCancelled = never) -> None:
        self.name, self.limits = name, limits
        self.packets = self.frames = self.decoded_pixels = self.kept_pixels = 0
        self._cancelled = cancelled
        self._until = time.monotonic() + limits.decode_s

    def check(self) -> None:
        """Raise if the result is not wanted any more, or the time is up."""
        if self._cancelled():
            raise CancelledError("decoding was cancelled", file=self.name)
        if time.monotonic() > self._until:
            limit = self.limits.decode_s
            raise self._over("decode_s", f"decoding takes longer than {limit:g} s", "shorten the video or shrink it")

    def count_packet(self) -> None:
        """Count a packet that was read."""
        self.packets += 1
        self.check_packets(self.packets)

    def count_frame(self, width: int, height: int) -> None:
        """Count a frame that was or will be decoded; call it before memory is allocated where that is possible."""
        self.check()
        self.check_size(width, height)
        self.frames += 1
        self.decoded_pixels += width * height
        if self.decoded_pixels > self.limits.decoded_pixels:
            most = f"reaching its frames decodes more than {self.limits.decoded_pixels:,} pixels"
            raise self._over("decoded_pixels", most, "re-encode it with a key frame every second, or shrink it")

    def keep_frame(self, width: int, height: int) -> None:
        """Count a frame that stays in memory."""
        self.kept_pixels += width * height
        if self.kept_pixels > self.limits.kept_pixels:
            most = f"the frames taken hold more than {self.limits.kept_pixels:,} pixels"
            raise self._over("kept_pixels", most, "take fewer frames, or shrink the video")

    def check_size(self, width: int, height: int) -> None:
        """Raise if a frame of this size is too large."""
        limits = self.limits
        if width * height > limits.frame_pixels or max(width, height) > limits.side:
            raise MediaError(
                "frames are too large",
                file=self.name,
                field="frame_pixels" if width * height > limits.frame_pixels else "side",
                value=(width, height),
                expected=f"at most {limits.frame_pixels:,} pixels and {limits.side:,} on a side",
                hint="shrink the video",
            )

    def check_packets(self, count: int) -> None:
        """Raise if a container has, or announces, too many packets."""
        if count > self.limits.video_packets:
            most = f"holds more than {self.limits.video_packets:,} packets"
            raise self._over("video_packets", most, "cut the video into parts")

    def check_frames(self, count: int) -> None:
        """Raise if a video has, or announces, too many frames."""
        if count > self.limits.video_frames:
            raise MediaError(
                "too many frames",
                file=self.name,
                field="video_frames",
                value=count,
                expected=f"at most {self.limits.video_frames:,}",
                hint="cut the video into parts",
            )

    def _over(self, field: str, problem: str, hint: str) -> MediaError:
        return MediaError(problem, file=self.name, field=field, hint=hint)


class Readable(Protocol):
    """What the header checks need of a stream."""

    def read(self, size: int = -1, /) -> bytes:
        """Read up to `size` bytes."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move to a position and return it."""

    def tell(self) -> int:
        """The position."""


class MeteredStream:
    """A stream that checks a meter at every read: libraries that read it can be cancelled wherever they are."""

    def __init__(self, stream: IO[bytes], meter: DecodeMeter) -> None:
        self._stream, self._meter = stream, meter

    def read(self, size: int = -1, /) -> bytes:
        """Read from the stream, unless the meter raises."""
        self._meter.check()
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move to a position of the stream and return it."""
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """The position in the stream."""
        return self._stream.tell()
