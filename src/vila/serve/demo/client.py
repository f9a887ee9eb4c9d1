"""OpenAI client of the demo: lists models, streams answers, and builds messages from the page's chats."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vila.core.errors import ConfigError, MediaError
from vila.core.optional import require

_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Sampling settings of the page. top_p and seed are sent only with a temperature."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def parameters(self) -> dict[str, Any]:
        """Return the request parameters."""
        out: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        if self.temperature:
            out |= {"top_p": self.top_p, "seed": self.seed}
        return out


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
        return text + (f" · {self.tokens} tokens" if self.done and self.tokens else "")


@dataclass(frozen=True)
class ApiClient:
    """Client of one server.

    base: URL of the server, with or without `/v1`.
    key:  API key, empty for none.
    """

    base: str
    key: str = ""
    _client: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        openai = require("openai", "vila demo", extra="demo")
        client = openai.OpenAI(base_url=self._base(), api_key=self.key or "none", max_retries=0, timeout=_TIMEOUT_S)
        object.__setattr__(self, "_client", client)

    def models(self) -> list[str]:
        """Return the names of the server's models. Raises ConfigError if they cannot be read."""
        import openai

        try:
            return [model.id for model in self._client.models.list()]
        except openai.OpenAIError as error:
            raise ConfigError(self._error_text(error)) from error

    def status(self) -> str:
        """Return the readiness of the server as a line of Markdown."""
        import httpx

        root = self._base().removesuffix("/v1")
        try:
            answer = httpx.get(f"{root}/ready", timeout=5)
        except httpx.HTTPError:
            return f"**Not ready.** No server at {root}."
        if answer.status_code == 503:
            return "**Loading.** The model is being loaded."
        return f"Ready at `{root}`."

    def _base(self) -> str:
        base = self.base.rstrip("/")
        return base if base.endswith("/v1") else f"{base}/v1"

    def stream(self, model: str, messages: Sequence[dict[str, Any]], settings: Settings) -> Iterator[StreamState]:
        """Yield the growing answer. Errors become its `problem`. Closing the iterator cancels the request."""
        import openai

        state, start = StreamState(), time.perf_counter()
        try:
            with self._client.chat.completions.create(
                model=model,
                messages=list(messages),
                stream=True,
                stream_options={"include_usage": True},
                **settings.parameters(),
            ) as stream:
                for event in stream:
                    now = time.perf_counter() - start
                    if event.usage is not None:
                        state = replace(state, tokens=event.usage.completion_tokens)
                    text = event.choices[0].delta.content if event.choices else ""
                    if text:
                        state = replace(state, text=state.text + text, first=state.first or now, last=now)
                        yield state
            yield replace(state, done=True)
        except openai.OpenAIError as error:
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
        return str(error)


IMAGE_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
}
VIDEO_TYPES = {".mp4": "video/mp4", ".webm": "video/webm", ".mov": "video/quicktime", ".mkv": "video/x-matroska"}
MAX_BYTES = 20 << 20
"""Upload limit per file; the server has its own limits."""


@dataclass(frozen=True, slots=True)
class FewShotExample:
    """A few-shot example. An empty `question` is replaced by the user's question."""

    image: str
    answer: str
    question: str = ""


def data_url(path: str | Path) -> str:
    """Return a file as a data URL. Raises MediaError for unsupported, empty and too large files."""
    file = Path(path)
    media_type = (IMAGE_TYPES | VIDEO_TYPES).get(file.suffix.lower())
    if media_type is None:
        known = ", ".join(sorted(suffix[1:] for suffix in IMAGE_TYPES | VIDEO_TYPES))
        raise MediaError("not a supported image or video", file=file.name, expected=known)
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise MediaError(
            f"{size / 2**20:.0f} MiB are too large", file=file.name, expected=f"at most {MAX_BYTES >> 20} MiB"
        )
    if size == 0:
        raise MediaError("the file is empty", file=file.name)
    return f"data:{media_type};base64,{base64.b64encode(file.read_bytes()).decode()}"


def user_message(text: str, files: Sequence[str | Path]) -> dict[str, Any]:
    """Return a user message: images and videos in order, then the text."""
    parts: list[dict[str, Any]] = []
    for file in files:
        kind = "video_url" if Path(file).suffix.lower() in VIDEO_TYPES else "image_url"
        parts.append({"type": kind, kind: {"url": data_url(file)}})
    if text or not parts:
        parts.append({"type": "text", "text": encodable(text)})
    return {"role": "user", "content": parts}


def shot_messages(shots: Sequence[FewShotExample], question: str) -> list[dict[str, Any]]:
    """Return few-shot examples as earlier turns, as `vila run --shot` does."""
    out: list[dict[str, Any]] = []
    for shot in shots:
        out.append(user_message(shot.question or question, [shot.image] if shot.image else []))
        out.append({"role": "assistant", "content": encodable(shot.answer)})
    return out


def conversation(
    turns: Sequence[Mapping[str, Any]], shots: Sequence[FewShotExample] = (), system: str = ""
) -> list[dict[str, Any]]:
    """Return the messages of a chat that ends with a user turn.

    turns: the chat in Gradio's format: `role` and `content`, a text or a list of texts and files. Consecutive turns of
           one role are merged. Turns with a `metadata` title are notices of the page: they are skipped, together with
           a question that was followed by nothing but a notice.
    """
    merged: list[tuple[str, str, list[str]]] = []
    for turn in turns:
        if (turn.get("metadata") or {}).get("title"):
            if merged and merged[-1][0] == "user":
                merged.pop()
            continue
        text, files = content_of(turn["content"])
        if merged and merged[-1][0] == turn["role"]:
            role, before, earlier = merged.pop()
            text, files = "\n".join(part for part in (before, text) if part), earlier + files
        merged.append((str(turn["role"]), text, files))
    messages: list[dict[str, Any]] = [{"role": "system", "content": encodable(system)}] if system.strip() else []
    question = next((text for role, text, _ in merged if role == "user"), "")
    messages += shot_messages(shots, question)
    for role, text, files in merged:
        messages.append(user_message(text, files) if role == "user" else {"role": role, "content": encodable(text)})
    return messages


def encodable(text: str) -> str:
    """Join surrogate pairs, and replace unpaired surrogates, which cannot be encoded, with U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def content_of(content: Any) -> tuple[str, list[str]]:
    """Return text and files of a turn, from any of Gradio's content formats."""
    if isinstance(content, str):
        return content, []
    parts = content if isinstance(content, Sequence) else [content]
    texts, files = [], []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type") == "text":
            texts.append(str(part["text"]))
        else:
            files.append(str((part.get("file") or part)["path"]))
    return "\n".join(text for text in texts if text), files
