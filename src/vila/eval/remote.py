"""Any model behind a chat server that speaks OpenAI's API, asked the same questions as our own engine."""

from __future__ import annotations

import base64
import copy
import io
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

from PIL import Image as PilImage

from vila.core.errors import ConfigError, VilaError
from vila.core.types import Image, Message, Text, Video
from vila.core.vision_spec import ImageMode
from vila.engine.request import Sampling
from vila.eval.endpoint import Endpoint, Patience, Reply, ServerError
from vila.media.image import open_image, orientation_of
from vila.media.source import open_source
from vila.media.video import open_frames

_SENT_AS_THEY_ARE = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}
_DEFAULTS = Sampling()
_NUM_FRAMES = 8


class RemoteEngine:
    """Answers through a server. What the runner needs of an engine, and the tokens that were counted.

    url, key, concurrency, patience: as `Endpoint` takes them. model: as the server names it.
    num_frames: pictures that stand for a clip which does not say how many itself.
    limit_key:  newer models of OpenAI's want `max_completion_tokens`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        concurrency: int = 8,
        num_frames: int = _NUM_FRAMES,
        limit_key: str = "max_tokens",
        patience: Patience | None = None,
    ) -> None:
        if not model:
            raise ConfigError(f"{url}: no model is named; give the name that the server knows it by")
        self.model, self.num_frames, self.limit_key = model, num_frames, limit_key
        self.exif_orientation = True
        self.endpoint = Endpoint(url, key=key, concurrency=concurrency, patience=patience)
        self.prompt_tokens = self.reply_tokens = 0
        self._kept: dict[int, tuple[Sequence[Message], Sampling, str | VilaError]] = {}
        self._counting = threading.Lock()

    def check(self) -> None:
        """Ask for one word. Raises ServerError for a wrong key, address or model, before anything long begins."""
        self._ask((Message.of("user", "Say yes."),), Sampling(max_new_tokens=16))

    def with_vision(self, *, image_mode: ImageMode | None = None, exif_orientation: bool | None = None) -> RemoteEngine:
        """This engine, sending images whose EXIF orientation a server cannot see, if that is False.

        image_mode: has no effect; the server makes images square in its own way.
        """
        other = copy.copy(self)
        other.exif_orientation = self.exif_orientation if exif_orientation is None else exif_orientation
        return other

    def generate_batch(
        self, conversations: Sequence[Sequence[Message]], sampling: Sampling | None = None, *, template: str = ""
    ) -> list[str]:
        """The answers, stripped at both ends, in the order of the conversations.

        template: not sent; the server writes conversations as its model wants them.
        Raises the first error (ServerError, MediaError) when a conversation cannot be answered. What came of the others
        is kept: the same conversations asked one by one, as the runner does, are not sent a second time.
        """
        chosen = sampling or _DEFAULTS
        jobs = [partial(self._ask, conversation, chosen) for conversation in conversations]
        results: list[str | VilaError] = [""] * len(jobs)
        for number, result in self.endpoint.each(jobs):
            if isinstance(result, ServerError) and result.final:
                raise result
            results[number] = result
        if len(jobs) > 1 and any(isinstance(result, VilaError) for result in results):
            self._kept = {
                id(conversation): (conversation, chosen, result)
                for conversation, result in zip(conversations, results, strict=True)
            }
        for result in results:
            if isinstance(result, VilaError):
                raise result
        return [result for result in results if isinstance(result, str)]

    def _ask(self, conversation: Sequence[Message], sampling: Sampling) -> str:
        # The conversation itself is kept too, so its id belongs to no other.
        _, asked_with, result = self._kept.pop(id(conversation), (conversation, None, ""))
        if asked_with == sampling:
            if isinstance(result, VilaError):
                raise result
            return result
        body = request_body(
            conversation,
            self.model,
            sampling,
            num_frames=self.num_frames,
            limit_key=self.limit_key,
            exif_orientation=self.exif_orientation,
        )
        reply: Reply = self.endpoint.complete(body)
        with self._counting:
            self.prompt_tokens += reply.prompt_tokens
            self.reply_tokens += reply.reply_tokens
        return reply.text.strip()


def request_body(
    conversation: Sequence[Message],
    model: str,
    sampling: Sampling = _DEFAULTS,
    *,
    num_frames: int = _NUM_FRAMES,
    limit_key: str = "max_tokens",
    exif_orientation: bool = True,
) -> dict[str, Any]:
    """The request for one conversation. Media are opened here, and only here; raises MediaError naming them.

    An image is a data URL of its own bytes when they are JPEG or PNG, of a PNG otherwise; a video is its frames. The
    line break that follows an image in a prompt is left out: the server separates images in its own way.
    exif_orientation: False sends a PNG of the pixels as stored where the EXIF of an image would turn it.
    top_k, min_p and repetition_penalty go by the names that open servers use, and only when they are set.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": message.role, "content": _content(message, num_frames, exif_orientation)}
            for message in conversation
        ],
        "temperature": sampling.temperature,
        limit_key: sampling.max_new_tokens,
    }
    if sampling.temperature:
        body["seed"] = sampling.seed
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
        if getattr(sampling, name) != getattr(_DEFAULTS, name):
            body[name] = getattr(sampling, name)
    return body


def data_url(image: Image, *, exif_orientation: bool = True) -> str:
    """The image as a data URL. Raises MediaError when it cannot be read."""
    if not isinstance(image.source, PilImage.Image):
        stream, _ = open_source(image.source, "an image")
        with stream:
            content = stream.read()
        kind = next((kind for magic, kind in _SENT_AS_THEY_ARE.items() if content.startswith(magic)), "")
        if kind and (exif_orientation or orientation_of(content) == 1):
            return _url(kind, content)
        image = Image(content)
    png = io.BytesIO()
    open_image(image, exif_orientation=exif_orientation).save(png, "PNG")
    return _url("image/png", png.getvalue())


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _content(message: Message, num_frames: int, exif_orientation: bool) -> str | list[dict[str, Any]]:
    if all(isinstance(part, Text) for part in message.parts):
        return message.text
    content: list[dict[str, Any]] = []
    after_media = False
    for part in message.parts:
        if isinstance(part, Text):
            text = part.text.removeprefix("\n") if after_media else part.text
            if text:
                content.append({"type": "text", "text": text})
            after_media = False
            continue
        images = [part] if isinstance(part, Image) else _frames(part, num_frames)
        urls = [data_url(image, exif_orientation=exif_orientation) for image in images]
        content += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        after_media = True
    return content


def _frames(video: Video, num_frames: int) -> list[Image]:
    return [Image(frame) for frame in open_frames(video, video.num_frames or num_frames)]
