"""Resource limits for reading images and videos, and the meter that enforces them while a video is decoded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Protocol

from vila.core.errors import MISSING, CancelledError, MediaError

IsCancelled = Callable[[], bool]
"""Returns True once the result is no longer needed. Called between packets, frames and reads; must be cheap."""


def never() -> bool:
    """Return False: the default of every `cancelled` argument."""
    return False


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """Maximum cost of one image or one video. Sizes are checked before memory is allocated.

    The defaults suit files that the user chose: they admit ordinary images and hours of video, and stop files made to
    exhaust memory. `vila serve` has stricter ones.
    """

    image_bytes: int = 50 * 2**20
    """Encoded bytes of an image from a URL or a `data:` URL; files may have any size."""
    image_pixels: int = 178_956_970
    """Pixels of an image. The default is Pillow's own limit, which a larger value does not raise."""
    side: int = 65_535
    """Longest side in pixels of an image or a video frame; the default is the maximum of JPEG.
    An image of 1 x 100,000,000 has few pixels, but the square that it is padded to has not."""
    jpeg_scans: int = 100
    """Scans of a JPEG image or frame, each of which takes a pass over all pixels; common encoders write 3 to 20."""
    image_fetch_s: float = 20.0
    """Seconds for downloading an image."""
    video_bytes: int = 512 * 2**20
    """Encoded bytes of a video from a URL or a `data:` URL; files may have any size."""
    video_fetch_s: float = 300.0
    """Seconds for downloading a video."""
    num_frames: int = 4096
    """Frames sampled from one video."""
    frame_pixels: int = 2**26
    """Pixels of one video frame (8192 x 8192)."""
    video_frames: int = 4_000_000
    """Total frames of a video: 18 hours at 60 frames per second."""
    video_packets: int = 8_000_000
    """Packets that are read from a video container, and that its index may announce."""
    decoded_pixels: int = 2**41
    """Pixels of all decoded frames of one video (a million frames of 1920 x 1080), including frames that are decoded
    only to reach another one."""
    kept_pixels: int = 2**30
    """Pixels of all frames sampled from one video, after resizing; 4 bytes of memory each."""
    decode_s: float = 3600.0
    """Seconds of wall-clock time for decoding one video."""


DEFAULT_LIMITS = MediaLimits()


class DecodeMeter:
    """Count packets, frames, pixels and seconds while one video is decoded.

    name:      name of the video, for errors.
    cancelled: see `IsCancelled`.
    Every method raises MediaError (`field`: the limit) when a limit is exceeded, `check` also CancelledError.
    """

    def __init__(self, name: str, limits: MediaLimits = DEFAULT_LIMITS, cancelled: IsCancelled = never) -> None:
        self.name, self.limits = name, limits
        self.packets = self.decoded_pixels = self.kept_pixels = 0
        self._cancelled = cancelled
        self._until = time.monotonic() + limits.decode_s

    def check(self) -> None:
        """Raise if decoding was cancelled or has taken too long."""
        if self._cancelled():
            raise CancelledError("decoding was cancelled", file=self.name)
        if time.monotonic() > self._until:
            raise self._over("decode_s", "decoding takes too long, in seconds", "shorten or resize the video")

    def count_packet(self) -> None:
        """Count one packet read."""
        self.packets += 1
        self.check_packets(self.packets)

    def count_frame(self, width: int, height: int) -> None:
        """Count one decoded frame; where possible, call it before memory is allocated."""
        self.check()
        self.check_size(width, height)
        self.decoded_pixels += width * height
        if self.decoded_pixels > self.limits.decoded_pixels:
            hint = "re-encode it with a key frame every second, or resize it"
            raise self._over("decoded_pixels", "too many pixels to decode for the sampled frames", hint)

    def keep_frame(self, width: int, height: int) -> None:
        """Count one frame that stays in memory."""
        self.kept_pixels += width * height
        if self.kept_pixels > self.limits.kept_pixels:
            raise self._over(
                "kept_pixels", "too many pixels in the sampled frames", "sample fewer, or resize the video"
            )

    def check_size(self, width: int, height: int) -> None:
        """Raise if a frame is too large."""
        limits = self.limits
        if width * height > limits.frame_pixels or max(width, height) > limits.side:
            raise MediaError(
                "frames are too large",
                file=self.name,
                field="frame_pixels" if width * height > limits.frame_pixels else "side",
                value=(width, height),
                expected=f"at most {limits.frame_pixels:,} pixels and {limits.side:,} on a side",
                hint="resize the video",
            )

    def check_packets(self, count: int) -> None:
        """Raise if a container has, or announces, too many packets."""
        if count > self.limits.video_packets:
            raise self._over("video_packets", "too many packets", "split the video", count)

    def check_frames(self, count: int) -> None:
        """Raise if a video has, or announces, too many frames."""
        if count > self.limits.video_frames:
            raise self._over("video_frames", "too many frames", "split the video", count)

    def _over(self, field: str, problem: str, hint: str, value: Any = MISSING) -> MediaError:
        expected = f"at most {getattr(self.limits, field):,}"
        return MediaError(problem, file=self.name, field=field, value=value, expected=expected, hint=hint)


class Readable(Protocol):
    """Minimal binary stream for header checks."""

    def read(self, size: int = -1, /) -> bytes:
        """Read up to `size` bytes."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move to a position and return it."""

    def tell(self) -> int:
        """Return the position."""


class MeteredStream:
    """Stream that checks a meter at every read, so that libraries reading it can be cancelled."""

    def __init__(self, stream: IO[bytes], meter: DecodeMeter) -> None:
        self._stream, self._meter = stream, meter

    def read(self, size: int = -1, /) -> bytes:
        """Read up to `size` bytes; raises if the meter does."""
        self._meter.check()
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move to a position and return it."""
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._stream.tell()
