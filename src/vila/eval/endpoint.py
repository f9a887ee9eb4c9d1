"""One chat server that speaks OpenAI's API: requests in parallel, pauses when it asks for them, errors in its words.

The address is the user's own choice, so it may be on this machine. Redirects are not followed: the key would go along.
"""

from __future__ import annotations

import json
import os
import queue
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpcore2

from vila.core.errors import ConfigError, DataError, DownloadError, VilaError
from vila.core.reading import parse_json
from vila.media.politeness import retry_after_s

PUBLIC = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
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
class Patience:
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
class Reply:
    """What a server answered: the text, why it ended, and the tokens that it counted (0: it did not say)."""

    text: str
    finish: str = ""
    prompt_tokens: int = 0
    reply_tokens: int = 0


class _TryAgain(Exception):
    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Endpoint:
    """`url`: of the API (`http://localhost:8000/v1`), of the server alone, or of `.../chat/completions` itself.

    key: None takes that of the environment (`OPENAI_API_KEY`); "" sends none. It is never written anywhere.
    Raises ConfigError for an address that is none, and for OpenAI's own without a key.
    """

    def __init__(
        self, url: str = PUBLIC, *, key: str | None = None, concurrency: int = 8, patience: Patience | None = None
    ) -> None:
        if concurrency < 1:
            raise ConfigError(f"concurrency={concurrency}: requests at once, from 1")
        self.url = chat_url(url)
        self.concurrency = concurrency
        self._key = os.environ.get(KEY_VARIABLE, "") if key is None else key
        if not self._key and self.url.startswith(PUBLIC):
            raise ConfigError(f"{self.url} needs a key; put it into the environment variable {KEY_VARIABLE}")
        self._patience = patience or Patience()
        self._pool = httpcore2.ConnectionPool(ssl_context=ssl.create_default_context(), max_connections=concurrency)
        self._closed = threading.Event()
        self._resume_at = 0.0
        self._refusal: ServerError | None = None

    def complete(self, body: Mapping[str, Any]) -> Reply:
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

    def _ask(self, content: bytes) -> Reply:
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

    def _reply(self, body: bytes) -> Reply:
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
        return Reply(text, finish, *tokens)


def chat_url(url: str) -> str:
    """The address that chat requests go to. Raises ConfigError for what is no http(s) address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise ConfigError(f"{url!r}: not the address of a server; write http://localhost:8000/v1 or {PUBLIC}")
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
