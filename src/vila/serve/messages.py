"""Images and videos of a chat request: fetched or decoded from data URLs under limits, and put into `Message`s."""

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
"""Limits of one image or video in a request. Video frames are resized while they are decoded."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one request.

    body:            bytes of the body.
    images:          images and videos.
    media:           limits of each image or video.
    fetch_s:         seconds for fetching all of its URLs.
    request_s:       seconds from its arrival to the last token.
    allow_private:   whether to fetch from private and loopback addresses.
    allowed_domains: hosts to fetch from, see `vila.media.ssrf.is_allowed`; empty: every public host.
    """

    body: int = 32 * 2**20
    images: int = 16
    media: MediaLimits = SERVER_MEDIA
    fetch_s: float = 20.0
    request_s: float = 600.0
    allow_private: bool = False
    allowed_domains: tuple[str, ...] = ()


class Threads:
    """Thread pools for request preparation, one per kind of work, so that slow URLs or long videos block only others
    of their kind.
    """

    def __init__(self, fetching: int = 32, working: int = 4, decoding: int = 2) -> None:
        self.fetching = ThreadPoolExecutor(fetching, thread_name_prefix="vila-fetch")
        self.working = ThreadPoolExecutor(working, thread_name_prefix="vila-prepare")
        self.decoding = ThreadPoolExecutor(decoding, thread_name_prefix="vila-video")
        self.parsing = ThreadPoolExecutor(2, thread_name_prefix="vila-parse")

    def for_reading(self, part: ImagePart | VideoPart) -> ThreadPoolExecutor:
        """Return the pool that reads an image or video."""
        return self.working if part.url[:5].lower() == "data:" else self.fetching

    def for_preparing(self, messages: list[Message]) -> ThreadPoolExecutor:
        """Return the pool that decodes and tokenizes a conversation."""
        has_video = any(isinstance(part, Video) for message in messages for part in message.parts)
        return self.decoding if has_video else self.working

    def close(self) -> None:
        """Shut the pools down without waiting for running work."""
        for pool in (self.fetching, self.working, self.decoding, self.parsing):
            pool.shutdown(wait=False, cancel_futures=True)


async def read_messages(
    request: ChatRequest, limits: Limits, threads: Threads, cancelled: IsCancelled = never
) -> list[Message]:
    """Return the conversation with the encoded bytes of its media, which are read concurrently and decoded later.

    cancelled: checked between reads; stops fetching.
    Raises DataError for too many media, media outside user turns and unsupported URL schemes, and MediaError for media
    that cannot be read. `field` of both is the part of `messages`.
    """
    media_parts = [
        (part, f"messages[{index}].content[{number}]", message.role)
        for index, message in enumerate(request.messages)
        for number, part in enumerate(message.parts)
        if not isinstance(part, TextPart)
    ]
    if len(media_parts) > limits.images:
        problem = f"the request has {len(media_parts)} images and videos, the limit is {limits.images}"
        raise DataError(problem, field=media_parts[limits.images][1])
    if misplaced := next((field for _, field, role in media_parts if role != "user"), ""):
        raise DataError("images and videos are supported in user turns only", field=misplaced)
    if not media_parts and not any(message.text for message in request.messages):
        raise DataError("contains neither text nor an image", field="messages")
    loop, deadline = asyncio.get_running_loop(), time.monotonic() + limits.fetch_s
    reading = [
        loop.run_in_executor(threads.for_reading(part), _read, part, field, limits, deadline, cancelled)
        for part, field, _ in media_parts
    ]
    media = iter(await asyncio.gather(*reading))
    messages: list[Message] = []
    for message in request.messages:
        role: Role = "system" if message.role == "developer" else message.role
        parts = tuple(Text(part.text) if isinstance(part, TextPart) else next(media) for part in message.parts)
        messages.append(Message(role, parts))
    return messages


def _read(
    part: ImagePart | VideoPart, field: str, limits: Limits, deadline: float, cancelled: IsCancelled
) -> Image | Video:
    is_image, address = isinstance(part, ImagePart), redact_url(part.url)
    if not part.url.lower().startswith(("http://", "https://", "data:")):
        expected = "http(s)://... or data:image/png;base64,..."
        raise DataError("not a supported URL", field=field, value=address, expected=expected)
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        problem = f"{address}: not read within {limits.fetch_s:g} s"
        raise MediaError(problem, field=field, hint="retry, or send a data URL")
    try:
        stream, name = open_source(
            part.url,
            "an image" if is_image else "a video",
            allow_private=limits.allow_private,
            allowed_domains=limits.allowed_domains,
            max_bytes=limits.media.image_bytes if is_image else limits.media.video_bytes,
            timeout_s=remaining,
            cancelled=cancelled,
        )
    except MediaError as error:
        raise MediaError(str(error), field=field) from error
    with stream:
        media = LoadedMedia(f"{field} ({name})", stream.read())
    if isinstance(part, VideoPart):
        return Video(media, part.video_url.num_frames)
    # Damaged images without a size are rejected by the decoder.
    if size := encoded_size(media.content):
        check_size(size, media.name, limits.media)
    return Image(media)
