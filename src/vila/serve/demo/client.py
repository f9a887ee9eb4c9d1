"""OpenAI client of the demo: streams answers, and builds requests from the page's chats."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vila.core.errors import ConfigError, MediaError
from vila.core.optional import require

IMAGE_TYPES = {f".{name}": f"image/{name}" for name in ("png", "jpeg", "webp", "gif", "bmp")} | {".jpg": "image/jpeg"}
VIDEO_TYPES = {".mp4": "video/mp4", ".webm": "video/webm", ".mov": "video/quicktime", ".mkv": "video/x-matroska"}
MAX_BYTES = 20 << 20
"""Upload limit per file; the server has its own limits."""
_TIMEOUT_S = 600.0

Turns = Sequence[Mapping[str, Any]]
"""A chat in Gradio's format: turns of `role`, `content` (a text, or a list of texts and files) and `metadata`."""


def sampling_parameters(max_tokens: float, temperature: float, top_p: float, seed: float | None) -> dict[str, Any]:
    """Return request parameters; top_p and seed are sent only with a temperature. seed: None for an empty field."""
    sampled = {"top_p": top_p, "seed": int(seed or 0)} if temperature else {}
    return {"max_tokens": int(max_tokens), "temperature": temperature, **sampled}


@dataclass(frozen=True, slots=True)
class StreamState:
    """State of a streamed answer. Times are seconds since the request was sent."""

    text: str = ""
    tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    done: bool = False
    problem: str = ""

    def speed(self) -> str:
        """Return time to first token and tokens per second as text; empty before the first token."""
        if not self.first:
            return ""
        text = f"first token {self.first:.2f} s"
        # The first token measures prefill; the rate is that of the others.
        if self.done and self.tokens > 1 and self.last > self.first:
            text += f" · {(self.tokens - 1) / (self.last - self.first):.1f} tokens/s"
        return text + (f" · {self.tokens} token{'s' * (self.tokens > 1)}" if self.done and self.tokens else "")


class ApiClient:
    """Client of one server.

    base: URL of the server, with or without `/v1`.
    key:  API key, empty for none.
    """

    def __init__(self, base: str, key: str = "") -> None:
        openai = require("openai", "vila demo", extra="demo")
        self.base = base.rstrip("/").removesuffix("/v1") + "/v1"
        options = {"base_url": self.base, "api_key": key or "none", "max_retries": 0, "timeout": _TIMEOUT_S}
        self._client, self._async_client = openai.OpenAI(**options), openai.AsyncOpenAI(**options)

    def models(self) -> list[str]:
        """Return the names of the server's models. Raises ConfigError if they cannot be read."""
        import openai

        try:
            return [model.id for model in self._client.models.list()]
        except openai.OpenAIError as error:
            raise ConfigError(self._error_text(error)) from error

    async def stream(
        self, model: str, turns: Turns, system: str, parameters: Mapping[str, Any]
    ) -> AsyncGenerator[StreamState, None]:
        """Yield the growing answer to a chat; the last state is `done`. Errors become its `problem`.

        Closing the iterator cancels the request.
        """
        state, start = StreamState(), time.perf_counter()
        try:
            messages = await asyncio.to_thread(conversation, turns, system)
            async with await self._async_client.chat.completions.create(
                model=model,
                messages=messages,
                stream=True,
                stream_options={"include_usage": True},
                **parameters,
            ) as stream:
                async for event in stream:
                    now = time.perf_counter() - start
                    if event.usage is not None:
                        state = replace(state, tokens=event.usage.completion_tokens)
                    text = event.choices[0].delta.content if event.choices else ""
                    if text:
                        state = replace(state, text=state.text + text, first=state.first or now, last=now)
                        yield state
            yield replace(state, done=True)
        except Exception as error:  # noqa: BLE001 - the page shows any error of an answer
            yield replace(state, done=True, problem=self._error_text(error))

    def _error_text(self, error: Exception) -> str:
        import openai

        if isinstance(error, openai.APITimeoutError):
            return f"{self.base} timed out; try again, or request fewer tokens"
        if isinstance(error, openai.APIConnectionError):
            return f"no server at {self.base}; start one with vila serve, or correct --base-url"
        if isinstance(error, openai.APIStatusError):
            body = error.body if isinstance(error.body, dict) else {}
            message = str(body.get("message") or error.message)
            if error.status_code == 503:
                return f"{message} (the model is loading or the server is shutting down; retry later)"
            return message
        return str(error) or type(error).__name__


async def side_by_side(answers: Sequence[AsyncGenerator[StreamState, None]]) -> AsyncGenerator[list[StreamState], None]:
    """Yield the states of several answers while they are streamed concurrently. Closing it cancels them all."""
    updates: asyncio.Queue[tuple[int, StreamState]] = asyncio.Queue()

    async def follow(index: int, answer: AsyncGenerator[StreamState, None]) -> None:
        async for state in answer:
            updates.put_nowait((index, state))

    states = [StreamState()] * len(answers)
    tasks = [asyncio.create_task(follow(index, answer)) for index, answer in enumerate(answers)]
    try:
        while not all(state.done for state in states):
            index, state = await updates.get()
            states[index] = state
            yield [*states]
    finally:
        for task in tasks:
            task.cancel()


def data_url(path: str | Path) -> str:
    """Return a file as a data URL. Raises MediaError for unsupported, empty and too large files."""
    file = Path(path)
    media_type = (IMAGE_TYPES | VIDEO_TYPES).get(file.suffix.lower())
    if media_type is None:
        known = ", ".join(sorted(suffix[1:] for suffix in IMAGE_TYPES | VIDEO_TYPES))
        raise MediaError("not a supported image or video", file=file.name, expected=known)
    size = file.stat().st_size
    if not 0 < size <= MAX_BYTES:
        problem = f"{size / 2**20:.0f} MiB are too large" if size else "the file is empty"
        raise MediaError(problem, file=file.name, expected=f"at most {MAX_BYTES >> 20} MiB")
    return f"data:{media_type};base64,{base64.b64encode(file.read_bytes()).decode()}"


def user_message(text: str, files: Sequence[str]) -> dict[str, Any]:
    """Return a user message: images and videos in order, then the text."""
    parts: list[dict[str, Any]] = []
    for file in files:
        kind = "video_url" if Path(file).suffix.lower() in VIDEO_TYPES else "image_url"
        parts.append({"type": kind, kind: {"url": data_url(file)}})
    if text or not parts:
        parts.append({"type": "text", "text": encodable(text)})
    return {"role": "user", "content": parts}


def conversation(turns: Turns, system: str = "") -> list[dict[str, Any]]:
    """Return the messages of a chat that ends with a question.

    Turns with a `metadata` title are notices of the page. They and earlier questions without an answer are left out.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": encodable(system)}] if system.strip() else []
    question: Any = None
    for turn in turns:
        if (turn.get("metadata") or {}).get("title"):
            continue
        if turn["role"] == "user":
            question = turn["content"]
        elif question is not None:
            answer = {"role": "assistant", "content": encodable(content_of(turn["content"])[0])}
            messages += [user_message(*content_of(question)), answer]
            question = None
    return [*messages, user_message(*content_of(question or ""))]


def encodable(text: str) -> str:
    """Join surrogate pairs, and replace unpaired surrogates, which cannot be encoded, with U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def content_of(content: Any) -> tuple[str, list[str]]:
    """Return text and files of a turn, from any of Gradio's content formats."""
    texts, files = [], []
    for part in [content] if isinstance(content, str | Mapping) else content:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type") == "text":
            texts.append(str(part["text"]))
        else:
            files.append(str((part.get("file") or part)["path"]))
    return "\n".join(text for text in texts if text), files
