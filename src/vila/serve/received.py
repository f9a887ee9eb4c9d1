"""Pictures and clips of a request: read from their addresses under limits, and messages made of them."""

from __future__ import annotations

import asyncio
import io
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from PIL import Image as PilImage

from vila.core.errors import DataError, MediaError
from vila.core.types import Image, Message, Role, Text, Video
from vila.media.fetch import shown
from vila.media.source import open_source
from vila.serve.schema import ChatRequest, ImagePart, TextPart, VideoPart

_STARTS = ("http://", "https://", "data:")
_LARGE = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may cost.

    body:     bytes of a request.
    images:   pictures and clips of a request.
    pixels:   of one picture.
    bytes, video_bytes: of one picture and one clip, wherever it comes from.
    fetch_s:  for everything that is fetched for a request together.
    request_s: from a request to the last token of its answer.
    allow_private: also fetch from this machine and its network.
    """

    body: int = 32 * 2**20
    images: int = 16
    pixels: int = 50_000_000
    bytes: int = 20 * 2**20
    video_bytes: int = 128 * 2**20
    fetch_s: float = 20.0
    request_s: float = 600.0
    allow_private: bool = False


@dataclass(frozen=True, slots=True)
class Received:
    """Encoded media that came with a request; `name` says where in it."""

    name: str
    content: bytes

    def read(self) -> bytes:
        """The encoded bytes."""
        return self.content


async def read_messages(request: ChatRequest, limits: Limits, threads: Threads) -> list[Message]:
    """The conversation with its media read, all of them at the same time; they are decoded later.

    System turns one after the other become one. Raises DataError for too many media, for media outside the user's turns
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
        raise DataError(f"{where}: {len(placed)} pictures and clips; this server takes {limits.images} in a request")
    if aside := next((place for _, place, role in placed if role != "user"), ""):
        raise DataError(f"{aside}: pictures and clips belong into the turns of the user")
    if not placed and not any(message.text for message in request.messages):
        raise DataError("messages: there is neither text nor a picture in them")
    loop, until = asyncio.get_running_loop(), time.monotonic() + limits.fetch_s
    reading = [loop.run_in_executor(threads.of(part), _read, part, place, limits, until) for part, place, _ in placed]
    media = iter(await asyncio.gather(*reading))
    out: list[Message] = []
    for message in request.messages:
        role: Role = "system" if message.role == "developer" else message.role
        parts = tuple(Text(part.text) if isinstance(part, TextPart) else next(media) for part in message.parts)
        if out and role == "system" and out[-1].role == "system":
            # Clients write several instructions one after the other; a template has one place for them.
            parts = (*out.pop().parts, Text("\n"), *parts)
        out.append(Message(role, parts))
    return out


class Threads:
    """Threads in which requests are made ready. Slow addresses do not keep those waiting that bring their pictures."""

    def __init__(self, fetching: int = 32, working: int = 4) -> None:
        self.fetching = ThreadPoolExecutor(fetching, thread_name_prefix="vila-fetch")
        self.working = ThreadPoolExecutor(working, thread_name_prefix="vila-prepare")

    def of(self, part: ImagePart | VideoPart) -> ThreadPoolExecutor:
        """Those that read this medium."""
        return self.working if _is_data(_url(part)) else self.fetching

    def close(self) -> None:
        """Let go of the threads, not waiting for what they do."""
        self.fetching.shutdown(wait=False, cancel_futures=True)
        self.working.shutdown(wait=False, cancel_futures=True)


def _read(part: ImagePart | VideoPart, place: str, limits: Limits, until: float) -> Image | Video:
    url, is_image = _url(part), isinstance(part, ImagePart)
    if not url.lower().startswith(_STARTS):
        raise DataError(f"{place}: {shown(url)!r} is not an address; give http(s)://... or data:image/png;base64,...")
    left = until - time.monotonic()
    if left <= 0:
        raise MediaError(f"{place}: {shown(url)}: not read within {limits.fetch_s:g} s; try again, or send a data URL")
    most = limits.bytes if is_image else limits.video_bytes
    try:
        stream, name = open_source(url, "a picture", allow_private=limits.allow_private, max_bytes=most, timeout_s=left)
    except MediaError as error:
        raise MediaError(f"{place}: {error}") from error
    with stream:
        received = Received(f"{place} ({name})", stream.read())
    if isinstance(part, VideoPart):
        return Video(received, part.video_url.num_frames)
    _check_pixels(received, limits.pixels)
    return Image(received)


def _check_pixels(received: Received, most: int) -> None:
    """Raises MediaError for a picture that is too large to be decoded; a damaged one is refused by the decoder."""
    width = height = 0
    with suppress(Exception), PilImage.open(io.BytesIO(received.content), formats=_LARGE) as picture:
        width, height = picture.size
    if width * height > most:
        raise MediaError(f"{received.name}: {width} x {height} pixels; this server takes {most:,}, so shrink it first")


def _url(part: ImagePart | VideoPart) -> str:
    return part.image_url.url if isinstance(part, ImagePart) else part.video_url.url


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"
