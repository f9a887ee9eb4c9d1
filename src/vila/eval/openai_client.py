"""Client of a chat server with OpenAI's API, and `RemoteEngine`, which evaluates a model behind such a server.

The user chooses the address, so private addresses are allowed; see `vila.media.http.api_client`.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
import tenacity
from PIL import Image as PilImage

from vila.core.errors import ConfigError, DataError, DownloadError, VilaError
from vila.core.reading import parse_json
from vila.core.types import Image, Message, Text, Video
from vila.core.vision_spec import ImageMode
from vila.engine.sampling_params import SamplingParams
from vila.media.http import api_client, retry_after_s
from vila.media.image import open_image, open_source, orientation_of
from vila.media.video import open_frames

OPENAI_URL = "https://api.openai.com/v1"
API_KEY_VARIABLE = "OPENAI_API_KEY"
_RETRIED_STATUS = (408, 409, 429, 500, 502, 503, 504, 529)
_FINAL_STATUS = (401, 403, 404)
"""Wrong key, no permission, unknown address or model: every further request would fail too."""
_OUT_OF_QUOTA = "insufficient_quota"
_MAX_REPLY_BYTES = 16 * 2**20

T = TypeVar("T")


class ServerError(DownloadError):
    """A request failed. `file` is the URL.

    status: HTTP status; None without a reply.
    final:  every further request would fail too.
    """

    def __init__(
        self, problem: str, *, file: str, status: int | None = None, final: bool = False, hint: str | None = None
    ) -> None:
        super().__init__(problem, file=file, hint=hint)
        self.status, self.final = status, final


class _RetryableError(Exception):
    def __init__(self, problem: str, status: int | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(problem)
        self.status, self.retry_after_s = status, retry_after_s


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Retries and timeouts of a client."""

    attempts: int = 6
    """Maximum number of attempts when the server is busy or does not reply; other failures are not retried."""
    backoff_s: float = 1.0
    """Pause before the second attempt; doubles each time, with up to 25 % of jitter."""
    max_wait_s: float = 120.0
    """Longest pause between attempts; a larger Retry-After is an error."""
    connect_timeout_s: float = 10.0
    """Timeout of the connection."""
    read_timeout_s: float = 600.0
    """Longest time without data; a server that does not stream sends nothing until its answer is complete."""


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """Reply of a server. Token counts are None if the server does not report them."""

    text: str
    finish: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class OpenAIClient:
    """HTTP client for chat completions with parallel requests and retries.

    url: of the API (`http://localhost:8000/v1`), of the server, or of `.../chat/completions`.
    key: API key; None reads `OPENAI_API_KEY`, "" sends none. It is never written to a file or a message.
    Raises ConfigError for an invalid address, and for OpenAI's own without a key.
    """

    def __init__(
        self,
        url: str = OPENAI_URL,
        *,
        key: str | None = None,
        concurrency: int = 8,
        retry_policy: RetryPolicy | None = None,
    ) -> None:
        if concurrency < 1:
            raise ConfigError(field="concurrency", value=concurrency, expected="at least 1")
        self.url = chat_completions_url(url)
        self.concurrency = concurrency
        self._key = os.environ.get(API_KEY_VARIABLE, "") if key is None else key
        if not self._key and self.url.startswith(OPENAI_URL):
            raise ConfigError(
                "needs an API key", file=self.url, hint=f"set the environment variable {API_KEY_VARIABLE}"
            )
        self._policy = retry_policy or RetryPolicy()
        self._http = api_client(
            max_connections=concurrency,
            connect_timeout_s=self._policy.connect_timeout_s,
            read_timeout_s=self._policy.read_timeout_s,
        )
        self._closed = threading.Event()
        self._resume_at = 0.0
        self._final_error: ServerError | None = None

    def complete(self, body: Mapping[str, Any]) -> ChatCompletion:
        """Send one request. Raises ServerError with the server's message after the last attempt.

        After a final error (key, address or model rejected), the same error is raised without a request.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_RetryableError),
            stop=tenacity.stop_after_attempt(self._policy.attempts),
            wait=self._wait_s,
            sleep=self._sleep,
            before=self._before_attempt,
            retry_error_callback=self._raise_last,
        )
        completion: ChatCompletion = retrying(self._request, json.dumps(body).encode())
        return completion

    def run_parallel(self, jobs: Sequence[Callable[[], T]]) -> Iterator[tuple[int, T | VilaError]]:
        """Run jobs on `concurrency` threads; yield the index of each and its result or error as they finish.

        When the caller stops iterating, jobs that wait are dropped.
        """
        closed = self._closed = threading.Event()
        todo, lock = iter(enumerate(jobs)), threading.Lock()
        done: queue.SimpleQueue[tuple[int, T | Exception]] = queue.SimpleQueue()

        def work() -> None:
            while not closed.is_set():
                with lock:
                    index, job = next(todo, (-1, None))
                if job is None:
                    return
                try:
                    done.put((index, job()))
                except Exception as error:  # noqa: BLE001 - yielded to the caller, or raised there
                    done.put((index, error))

        # Daemon threads: Ctrl-C would wait for the requests of an executor's threads.
        for _ in range(min(self.concurrency, len(jobs))):
            threading.Thread(target=work, name="vila-openai", daemon=True).start()
        try:
            for _ in jobs:
                index, result = done.get()
                if isinstance(result, Exception) and not isinstance(result, VilaError):
                    raise result
                yield index, result
        except BaseException:
            closed.set()
            raise

    def _before_attempt(self, state: tenacity.RetryCallState) -> None:
        """Wait until the time that a Retry-After of any thread has set."""
        if self._final_error is not None:
            raise self._final_error
        while (wait := self._resume_at - time.monotonic()) > 0:
            self._sleep(wait)

    def _sleep(self, seconds: float) -> None:
        if seconds > 0 and self._closed.wait(seconds):
            raise ServerError("cancelled", file=self.url)

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        """Return the pause before the next attempt. After a Retry-After all threads pause in `_before_attempt`."""
        wait = min(self._policy.backoff_s * 2 ** (state.attempt_number - 1), self._policy.max_wait_s)
        wait *= 1 + random.random() / 4
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, _RetryableError) or error.retry_after_s is None:
            return wait
        self._resume_at = max(self._resume_at, time.monotonic() + max(wait, error.retry_after_s))
        return 0.0

    def _raise_last(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        raise ServerError(
            f"{error}, {state.attempt_number} times",
            file=self.url,
            status=error.status if isinstance(error, _RetryableError) else None,
            hint="try later, or with fewer parallel requests",
        ) from error

    def _request(self, content: bytes) -> ChatCompletion:
        status, headers, body = self._exchange(content)
        if status == 200:
            return self._parse(body)
        code, message = _error_message(body)
        message = message.replace(self._key, "***") if self._key else message
        problem = f"the server replied with status {status}" + (f" ({message})" if message else "")
        if status in _RETRIED_STATUS and code != _OUT_OF_QUOTA:
            wait_s = retry_after_s(headers.get("retry-after"), time.time())
            if (wait_s or 0) > self._policy.max_wait_s:
                raise ServerError(
                    f"{problem} and Retry-After {wait_s:g} s", file=self.url, status=status, hint="try later"
                )
            raise _RetryableError(problem, status, wait_s)
        final = status in _FINAL_STATUS or code == _OUT_OF_QUOTA
        error = ServerError(problem, file=self.url, status=status, final=final)
        if final:
            self._final_error = error
        raise error

    def _exchange(self, content: bytes) -> tuple[int, Mapping[str, str], bytes]:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        body = bytearray()
        try:
            with self._http.stream("POST", self.url, headers=headers, content=content) as response:
                for chunk in response.iter_raw():
                    body += chunk
                    if len(body) > _MAX_REPLY_BYTES:
                        raise ServerError(f"the reply is larger than {_MAX_REPLY_BYTES:,} bytes", file=self.url)
        except httpx2.TimeoutException as error:
            raise _RetryableError(f"no reply in time ({type(error).__name__})") from error
        except httpx2.TransportError as error:
            raise _RetryableError(f"the connection failed ({str(error) or type(error).__name__})") from error
        return response.status_code, response.headers, bytes(body)

    def _parse(self, body: bytes) -> ChatCompletion:
        try:
            value = parse_json(body, file=self.url)
            choice = value["choices"][0]
            text, finish = choice["message"].get("content"), str(choice.get("finish_reason") or "")
            usage = value.get("usage") or {}
            counts = [None if usage.get(f"{name}_tokens") is None else int(usage[f"{name}_tokens"]) for name in _COUNTS]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            shown = body[:80].decode("utf-8", errors="replace")
            raise _RetryableError(f"the reply is not a chat completion: {shown!r}") from error
        if finish == "content_filter" or not isinstance(text, str):
            reason = choice["message"].get("refusal") or finish or "it has no text"
            raise ServerError(f"the server withheld its answer ({reason})", file=self.url)
        return ChatCompletion(text, finish, *counts)


_COUNTS = ("prompt", "completion")


def chat_completions_url(url: str) -> str:
    """Return the URL of chat completions. Raises ConfigError if `url` is not an http(s) address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise ConfigError(field="URL", value=url, expected=f"a server such as http://localhost:8000/v1 or {OPENAI_URL}")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = f"{path or '/v1'}/chat/completions"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _error_message(body: bytes) -> tuple[str, str]:
    """Return code and message of a server's error; empty where it has none."""
    try:
        value = parse_json(body, file=None, surrogates=True)
    except DataError:
        return "", " ".join(body[:200].decode("utf-8", errors="replace").split())
    error = value.get("error", value) if isinstance(value, dict) else value
    if not isinstance(error, dict):
        return "", str(error)[:300]
    return str(error.get("code") or ""), str(error.get("message") or error.get("detail") or "")[:300]


_SENT_UNCHANGED = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}
_DEFAULTS = SamplingParams()
_NUM_FRAMES = 8


class RemoteEngine:
    """Chat model behind a server; implements `vila.eval.runner.ChatModel`.

    model:          name of the model on the server.
    num_frames:     frames to send of a video that does not set its own number.
    max_tokens_key: `max_completion_tokens` for newer OpenAI models.
    url, key, concurrency, retry_policy: see `OpenAIClient`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        concurrency: int = 8,
        num_frames: int = _NUM_FRAMES,
        max_tokens_key: str = "max_tokens",
        retry_policy: RetryPolicy | None = None,
    ) -> None:
        if not model:
            raise ConfigError("no model name", file=url, hint="give the name that the server uses")
        self.model, self.num_frames, self.max_tokens_key = model, num_frames, max_tokens_key
        self.exif_orientation = True
        self.client = OpenAIClient(url, key=key, concurrency=concurrency, retry_policy=retry_policy)
        self._cached: dict[int, tuple[Sequence[Message], SamplingParams, ChatCompletion | VilaError]] = {}

    def check(self) -> None:
        """Send a short request. Raises ServerError for a wrong key, address or model."""
        self._complete((Message.of("user", "Say yes."),), SamplingParams(max_new_tokens=16))

    def with_vision(self, *, image_mode: ImageMode | None = None, exif_orientation: bool | None = None) -> RemoteEngine:
        """Return a copy that sends images rotated by their EXIF orientation or, with False, as stored.

        image_mode: ignored; the server preprocesses images itself.
        """
        other = copy.copy(self)
        other.exif_orientation = self.exif_orientation if exif_orientation is None else exif_orientation
        return other

    def complete(
        self, conversations: Sequence[Sequence[Message]], sampling: SamplingParams | None = None, *, template: str = ""
    ) -> list[ChatCompletion]:
        """Return the completions in the order of the conversations; texts are stripped at both ends.

        template: ignored; the server renders conversations itself.
        Raises the first error (ServerError, MediaError) if a conversation fails. The results of the others are cached:
        when the caller repeats the conversations one by one, they are not sent again.
        """
        chosen = sampling or _DEFAULTS
        jobs = [partial(self._complete, conversation, chosen) for conversation in conversations]
        results: dict[int, ChatCompletion | VilaError] = {}
        for index, result in self.client.run_parallel(jobs):
            if isinstance(result, ServerError) and result.final:
                raise result
            results[index] = result
        errors = [result for _, result in sorted(results.items()) if isinstance(result, VilaError)]
        if errors:
            if len(jobs) > 1:
                self._cached = {id(one): (one, chosen, results[index]) for index, one in enumerate(conversations)}
            raise errors[0]
        return [result for _, result in sorted(results.items()) if isinstance(result, ChatCompletion)]

    def _complete(self, conversation: Sequence[Message], sampling: SamplingParams) -> ChatCompletion:
        # The cache holds the conversation itself, so that its id stays unique.
        _, cached_sampling, result = self._cached.pop(id(conversation), (conversation, None, None))
        if cached_sampling == sampling and result is not None:
            if isinstance(result, VilaError):
                raise result
            return result
        body = request_body(
            conversation,
            self.model,
            sampling,
            num_frames=self.num_frames,
            max_tokens_key=self.max_tokens_key,
            exif_orientation=self.exif_orientation,
        )
        found = self.client.complete(body)
        return replace(found, text=found.text.strip())


def request_body(
    conversation: Sequence[Message],
    model: str,
    sampling: SamplingParams = _DEFAULTS,
    *,
    num_frames: int = _NUM_FRAMES,
    max_tokens_key: str = "max_tokens",
    exif_orientation: bool = True,
) -> dict[str, Any]:
    """Build the request of one conversation. Raises MediaError for media that cannot be read.

    JPEG and PNG files are sent unchanged as data URLs, other images as PNG, videos as their frames. The line break
    after an image in a prompt is left out: the server separates images itself.
    exif_orientation: False sends the pixels as stored, as PNG, if EXIF would rotate the image.
    top_k, min_p and repetition_penalty have the names of vLLM and are sent only if set.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": message.role, "content": _content(message, num_frames, exif_orientation)}
            for message in conversation
        ],
        "temperature": sampling.temperature,
        max_tokens_key: sampling.max_new_tokens,
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
    """Return the image as a data URL. Raises MediaError if it cannot be read."""
    if not isinstance(image.source, PilImage.Image):
        stream, _ = open_source(image.source, "an image")
        with stream:
            content = stream.read()
        media_type = next((name for magic, name in _SENT_UNCHANGED.items() if content.startswith(magic)), "")
        if media_type and (exif_orientation or orientation_of(content) == 1):
            return _url(media_type, content)
        image = Image(content)
    png = io.BytesIO()
    open_image(image, exif_orientation=exif_orientation).save(png, "PNG")
    return _url("image/png", png.getvalue())


def _url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


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
