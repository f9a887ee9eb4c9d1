"""Images and videos of a request: read from their addresses under limits, and messages made of them."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vila.core.errors import DataError, MediaError
from vila.core.types import Image, Message, Role, Text, Video
from vila.media.http import redact_url
from vila.media.image import LoadedMedia, check_size, encoded_size, open_source
from vila.media.limits import IsCancelled, MediaLimits, never
from vila.serve.schema import ChatRequest, ImagePart, TextPart, VideoPart

_STARTS = ("http://", "https://", "data:")

SERVER_MEDIA = MediaLimits(
    image_bytes=20 * 2**20,
    image_pixels=50_000_000,
    video_bytes=128 * 2**20,
    num_frames=64,
    frame_pixels=2**24,  # 4096 x 4096, thus 4K video
    video_frames=250_000,  # more than two hours at 30 frames per second
    video_packets=250_000,
    decoded_pixels=2**35,  # 16,000 frames of 1920 x 1080
    kept_pixels=2**28,
    decode_s=20.0,
)
"""Limits on one image or video of a request. Its frames are shrunk while they are decoded, so few pixels are kept."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on the cost of a request.

    body:      bytes of a request.
    images:    images and videos of a request.
    media:     of one image or video, wherever it comes from.
    fetch_s:   for everything that is fetched for a request together.
    request_s: from a request to the last token of its answer.
    allow_private: also fetch from this machine and its network.
    allowed_domains: hosts to fetch from, see `vila.media.http.is_allowed`; empty: all that are public.
    """

    body: int = 32 * 2**20
    images: int = 16
    media: MediaLimits = SERVER_MEDIA
    fetch_s: float = 20.0
    request_s: float = 600.0
    allow_private: bool = False
    allowed_domains: tuple[str, ...] = ()


async def read_messages(
    request: ChatRequest, limits: Limits, threads: Threads, cancelled: IsCancelled = never
) -> list[Message]:
    """The conversation with its media read, all of them at the same time; they are decoded later.

    cancelled: ends fetching, between reads.
    Raises DataError for too many media, for media outside the user's turns
    and for addresses of other kinds, MediaError for what cannot be read.
    """
    placed = [
        (part, f"messages[{at}].content[{number}]", message.role)
        for at, message in enumerate(request.messages)
        for number, part in enumerate(message.parts)
        if not isinstance(part, TextPart)
    ]
    if len(placed) > limits.images:
        where = placed[limits.images][1]
        raise DataError(f"{where}: {len(placed)} images and videos; this server takes {limits.images} in a request")
    if aside := next((place for _, place, role in placed if role != "user"), ""):
        raise DataError(f"{aside}: images and videos belong into the turns of the user")
    if not placed and not any(message.text for message in request.messages):
        raise DataError("messages: there is neither text nor an image in them")
    loop, until = asyncio.get_running_loop(), time.monotonic() + limits.fetch_s
    reading = [
        loop.run_in_executor(threads.of(part), _read, part, place, limits, until, cancelled)
        for part, place, _ in placed
    ]
    media = iter(await asyncio.gather(*reading))
    out: list[Message] = []
    for message in request.messages:
        role: Role = "system" if message.role == "developer" else message.role
        parts = tuple(Text(part.text) if isinstance(part, TextPart) else next(media) for part in message.parts)
        out.append(Message(role, parts))
    return out


class Threads:
    """Threads in which requests are made ready, by what they may wait for: addresses, videos, or neither.

    Slow addresses and long videos hold up their own kind alone.
    """

    def __init__(self, fetching: int = 32, working: int = 4, decoding: int = 2) -> None:
        self.fetching = ThreadPoolExecutor(fetching, thread_name_prefix="vila-fetch")
        self.working = ThreadPoolExecutor(working, thread_name_prefix="vila-prepare")
        self.decoding = ThreadPoolExecutor(decoding, thread_name_prefix="vila-video")
        self.parsing = ThreadPoolExecutor(2, thread_name_prefix="vila-parse")

    def of(self, part: ImagePart | VideoPart) -> ThreadPoolExecutor:
        """Those that read this medium."""
        return self.working if _is_data(_url(part)) else self.fetching

    def preparing(self, messages: list[Message]) -> ThreadPoolExecutor:
        """Those that decode the media of these messages."""
        has_video = any(isinstance(part, Video) for message in messages for part in message.parts)
        return self.decoding if has_video else self.working

    def close(self) -> None:
        """Let go of the threads without waiting for them."""
        for pool in (self.fetching, self.working, self.decoding, self.parsing):
            pool.shutdown(wait=False, cancel_futures=True)


def _read(
    part: ImagePart | VideoPart, place: str, limits: Limits, until: float, cancelled: IsCancelled
) -> Image | Video:
    url, is_image = _url(part), isinstance(part, ImagePart)
    if not url.lower().startswith(_STARTS):
        raise DataError(
            f"{place}: {redact_url(url)!r} is not an address; give http(s)://... or data:image/png;base64,..."
        )
    left = until - time.monotonic()
    if left <= 0:
        raise MediaError(
            f"{place}: {redact_url(url)}: not read within {limits.fetch_s:g} s; try again, or send a data URL"
        )
    try:
        stream, name = open_source(
            url,
            "an image" if is_image else "a video",
            allow_private=limits.allow_private,
            allowed_domains=limits.allowed_domains,
            max_bytes=limits.media.image_bytes if is_image else limits.media.video_bytes,
            timeout_s=left,
            cancelled=cancelled,
        )
    except MediaError as error:
        raise MediaError(f"{place}: {error}") from error
    with stream:
        received = LoadedMedia(f"{place} ({name})", stream.read())
    if isinstance(part, VideoPart):
        return Video(received, part.video_url.num_frames)
    # A damaged image, which has no size, is refused by its decoder.
    if size := encoded_size(received.content):
        check_size(size, received.name, limits.media)
    return Image(received)


def _url(part: ImagePart | VideoPart) -> str:
    return part.image_url.url if isinstance(part, ImagePart) else part.video_url.url


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"
