"""One chat server that speaks OpenAI's API: requests in parallel, pauses when it asks for them, errors in its words.

The address is the user's own choice, so it may be on this machine. Redirects are not followed: the key would go along.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import queue
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpcore2
from PIL import Image as PilImage

from vila.core.errors import ConfigError, DataError, DownloadError, VilaError
from vila.core.reading import parse_json
from vila.core.types import Image, Message, Text, Video
from vila.core.vision_spec import ImageMode
from vila.engine.request import SamplingParams
from vila.media.http import retry_after_s
from vila.media.image import open_image, open_source, orientation_of
from vila.media.video import open_frames

OPENAI_URL = "https://api.openai.com/v1"
API_KEY_VARIABLE = "OPENAI_API_KEY"
_BUSY = (408, 409, 429, 500, 502, 503, 504, 529)
_REFUSED = (401, 403, 404)
"""Answers that every further request would get too: a wrong key, no permission, no such address or model."""
_OUT_OF_MONEY = "insufficient_quota"
_MAX_REPLY = 16 * 2**20

T = TypeVar("T")


class ServerError(DownloadError):
    """A request was not answered. `final`: no other request would be either."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to wait, and how often to ask again."""

    attempts: int = 6
    """Tries in all for servers that are busy or do not answer; other failures are final at once."""
    backoff_s: float = 1.0
    """Pause before the second try; it doubles each time, with up to a quarter of chance added."""
    longest_wait_s: float = 120.0
    """Longest pause; a server that asks for a longer one with Retry-After has failed."""
    connect_s: float = 10.0
    """For a connection."""
    reply_s: float = 600.0
    """Longest silence: a server that does not stream is silent until its answer is complete."""


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """What a server answered: the text, why it ended, and the tokens that it counted (0: it did not say)."""

    text: str
    finish: str = ""
    prompt_tokens: int = 0
    reply_tokens: int = 0


class _TryAgain(Exception):
    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class OpenAIClient:
    """`url`: of the API (`http://localhost:8000/v1`), of the server alone, or of `.../chat/completions` itself.

    key: None takes that of the environment (`OPENAI_API_KEY`); "" sends none. It is never written anywhere.
    Raises ConfigError for an address that is none, and for OpenAI's own without a key.
    """

    def __init__(
        self,
        url: str = OPENAI_URL,
        *,
        key: str | None = None,
        concurrency: int = 8,
        patience: RetryPolicy | None = None,
    ) -> None:
        if concurrency < 1:
            raise ConfigError(f"concurrency={concurrency}: requests at once, from 1")
        self.url = chat_completions_url(url)
        self.concurrency = concurrency
        self._key = os.environ.get(API_KEY_VARIABLE, "") if key is None else key
        if not self._key and self.url.startswith(OPENAI_URL):
            raise ConfigError(f"{self.url} needs a key; put it into the environment variable {API_KEY_VARIABLE}")
        self._patience = patience or RetryPolicy()
        self._pool = httpcore2.ConnectionPool(ssl_context=ssl.create_default_context(), max_connections=concurrency)
        self._closed = threading.Event()
        self._resume_at = 0.0
        self._refusal: ServerError | None = None

    def complete(self, body: Mapping[str, Any]) -> ChatCompletion:
        """The reply to one request. Raises ServerError with the server's reason, after as many tries as are allowed.

        Once the key, the address or the model was refused, the same error comes at once.
        """
        content = json.dumps(body).encode()
        for attempt in range(1, self._patience.attempts + 1):
            self._wait_for_turn()
            try:
                return self._ask(content)
            except _TryAgain as error:
                reason = f"{self.url}: {error}"
                wait = min(self._patience.backoff_s * 2 ** (attempt - 1), self._patience.longest_wait_s)
                wait = max(wait * (1 + random.random() / 4), error.wait_s or 0)
                if (error.wait_s or 0) > self._patience.longest_wait_s:
                    raise ServerError(f"{reason}, and wants no request for {error.wait_s:g} s; try later") from error
                if attempt == self._patience.attempts:
                    raise ServerError(f"{reason}, {attempt} times; try later, or fewer at once") from error
                if error.wait_s is not None:
                    self._resume_at = max(self._resume_at, time.monotonic() + wait)
                elif self._closed.wait(wait):
                    break
        raise ServerError(f"{self.url}: stopped before it answered")

    def each(self, jobs: Sequence[Callable[[], T]]) -> Iterator[tuple[int, T | VilaError]]:
        """Run jobs in parallel; the number of each and its result or error, as they end.

        When the caller stops half-way, requests that wait are dropped.
        """
        closed = self._closed = threading.Event()
        todo, lock = iter(enumerate(jobs)), threading.Lock()
        done: queue.SimpleQueue[tuple[int, T | Exception]] = queue.SimpleQueue()

        def work() -> None:
            while not closed.is_set():
                with lock:
                    number, job = next(todo, (-1, None))
                if job is None:
                    return
                try:
                    done.put((number, job()))
                except Exception as error:  # noqa: BLE001 - handed to the caller, or raised there
                    done.put((number, error))

        # Daemons: an executor's threads would keep Ctrl-C waiting for answers that nobody wants any more.
        for _ in range(min(self.concurrency, len(jobs))):
            threading.Thread(target=work, name="vila-endpoint", daemon=True).start()
        try:
            for _ in jobs:
                number, result = done.get()
                if isinstance(result, Exception) and not isinstance(result, VilaError):
                    raise result
                yield number, result
        except BaseException:
            closed.set()
            raise

    def _wait_for_turn(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        while (wait := self._resume_at - time.monotonic()) > 0:
            if self._closed.wait(wait):
                raise ServerError(f"{self.url}: stopped before it answered")

    def _ask(self, content: bytes) -> ChatCompletion:
        status, headers, body = self._exchange(content)
        if status == 200:
            return self._reply(body)
        code, words = _reason(body)
        words = words.replace(self._key, "***") if self._key else words
        reason = f"the server answered {status}" + (f" ({words})" if words else "")
        if status in _BUSY and code != _OUT_OF_MONEY:
            raise _TryAgain(reason, retry_after_s(headers.get("retry-after"), time.time()))
        error = ServerError(f"{self.url}: {reason}", final=status in _REFUSED or code == _OUT_OF_MONEY)
        if error.final:
            self._refusal = error
        raise error

    def _exchange(self, content: bytes) -> tuple[int, dict[str, str], bytes]:
        headers: list[tuple[bytes | str, bytes | str]] = [
            ("Content-Type", "application/json"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", "vila"),
        ]
        if self._key:
            headers.append(("Authorization", f"Bearer {self._key}"))
        connect, reply = self._patience.connect_s, self._patience.reply_s
        timeouts = {"connect": connect, "read": reply, "write": reply, "pool": None}
        try:
            with self._pool.stream(
                "POST", self.url, headers=headers, content=content, extensions={"timeout": timeouts}
            ) as answer:
                body = bytearray()
                for chunk in answer.iter_stream():
                    body += chunk
                    if len(body) > _MAX_REPLY:
                        raise ServerError(f"{self.url}: its reply is larger than {_MAX_REPLY:,} bytes")
                named = {name.decode("latin-1").lower(): text.decode("latin-1") for name, text in answer.headers}
                return answer.status, named, bytes(body)
        except httpcore2.TimeoutException as error:
            raise _TryAgain(f"no answer in time ({type(error).__name__})") from error
        except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
            if isinstance(error, VilaError):
                raise
            raise _TryAgain(f"the connection failed ({str(error) or type(error).__name__})") from error

    def _reply(self, body: bytes) -> ChatCompletion:
        try:
            value = parse_json(body, file=self.url)
            choice = value["choices"][0]
            text, finish = choice["message"].get("content"), str(choice.get("finish_reason") or "")
            used = value.get("usage") or {}
            tokens = int(used.get("prompt_tokens") or 0), int(used.get("completion_tokens") or 0)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            shown = body[:80].decode("utf-8", errors="replace")
            raise _TryAgain(f"the server's reply is no chat completion: {shown!r}") from error
        if finish == "content_filter" or not isinstance(text, str):
            why = choice["message"].get("refusal") or finish or "it holds no text"
            raise ServerError(f"{self.url}: the server withheld its answer ({why})")
        return ChatCompletion(text, finish, *tokens)


def chat_completions_url(url: str) -> str:
    """The address that chat requests go to. Raises ConfigError for what is no http(s) address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise ConfigError(f"{url!r}: not the address of a server; write http://localhost:8000/v1 or {OPENAI_URL}")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = f"{path or '/v1'}/chat/completions"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _reason(body: bytes) -> tuple[str, str]:
    """The code and the words of a server's error, as far as it gives them."""
    try:
        value = parse_json(body, file=None, surrogates=True)
    except DataError:
        return "", " ".join(body[:200].decode("utf-8", errors="replace").split())
    error = value.get("error", value) if isinstance(value, dict) else value
    if not isinstance(error, dict):
        return "", str(error)[:300]
    return str(error.get("code") or ""), str(error.get("message") or error.get("detail") or "")[:300]


# --- remote
# Any model behind a chat server that speaks OpenAI's API, asked the same questions as our own engine.


_SENT_AS_THEY_ARE = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}
_DEFAULTS = SamplingParams()
_NUM_FRAMES = 8


class RemoteEngine:
    """Answers through a server. What the runner needs of an engine, and the tokens that were counted.

    url, key, concurrency, patience: as `OpenAIClient` takes them. model: as the server names it.
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
        patience: RetryPolicy | None = None,
    ) -> None:
        if not model:
            raise ConfigError(f"{url}: no model is named; give the name that the server knows it by")
        self.model, self.num_frames, self.limit_key = model, num_frames, limit_key
        self.exif_orientation = True
        self.endpoint = OpenAIClient(url, key=key, concurrency=concurrency, patience=patience)
        self.prompt_tokens = self.reply_tokens = 0
        self._kept: dict[int, tuple[Sequence[Message], SamplingParams, str | VilaError]] = {}
        self._counting = threading.Lock()

    def check(self) -> None:
        """Ask for one word. Raises ServerError for a wrong key, address or model, before anything long begins."""
        self._ask((Message.of("user", "Say yes."),), SamplingParams(max_new_tokens=16))

    def with_vision(self, *, image_mode: ImageMode | None = None, exif_orientation: bool | None = None) -> RemoteEngine:
        """This engine, sending images whose EXIF orientation a server cannot see, if that is False.

        image_mode: has no effect; the server makes images square in its own way.
        """
        other = copy.copy(self)
        other.exif_orientation = self.exif_orientation if exif_orientation is None else exif_orientation
        return other

    def generate_batch(
        self, conversations: Sequence[Sequence[Message]], sampling: SamplingParams | None = None, *, template: str = ""
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

    def _ask(self, conversation: Sequence[Message], sampling: SamplingParams) -> str:
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
        reply: ChatCompletion = self.endpoint.complete(body)
        with self._counting:
            self.prompt_tokens += reply.prompt_tokens
            self.reply_tokens += reply.reply_tokens
        return reply.text.strip()


def request_body(
    conversation: Sequence[Message],
    model: str,
    sampling: SamplingParams = _DEFAULTS,
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
