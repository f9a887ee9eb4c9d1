"""What the demo asks of a server: which models there are, whether it is ready, and streamed answers with their pace."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vila.core.errors import ConfigError, MediaError
from vila.core.optional import require

_PATIENCE = 600.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are made; what is left at its default is not sent."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def request(self) -> dict[str, Any]:
        """Fields of the request."""
        out: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        if self.temperature:
            out |= {"top_p": self.top_p, "seed": self.seed}
        return out


@dataclass(frozen=True, slots=True)
class StreamState:
    """An answer as far as it has come. Times are seconds since the question was sent."""

    text: str = ""
    tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    done: bool = False
    problem: str = ""

    def pace(self) -> str:
        """Time to the first token and tokens a second after it, in words; empty before the first."""
        if not self.first:
            return ""
        words = f"first token {self.first:.2f} s"
        # The first token is the prompt's work; the pace is that of the others.
        if self.done and self.tokens > 1 and self.last > self.first:
            words += f" · {(self.tokens - 1) / (self.last - self.first):.1f} tokens/s"
        return words + (f" · {self.tokens} tokens" if self.done and self.tokens else "")


@dataclass(frozen=True)
class ApiClient:
    """A client of one server.

    base: of the server, with or without `/v1`.
    """

    base: str
    key: str = ""
    _client: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        openai = require("openai", "vila demo", extra="demo")
        client = openai.OpenAI(base_url=self._base(), api_key=self.key or "none", max_retries=0, timeout=_PATIENCE)
        object.__setattr__(self, "_client", client)

    def models(self) -> list[str]:
        """Names of the models that the server has. Raises ConfigError in its words, or saying that it is not there."""
        import openai

        try:
            return [model.id for model in self._client.models.list()]
        except openai.OpenAIError as error:
            raise ConfigError(self._words(error)) from error

    def waiting_for(self) -> str:
        """A line on the server for the page: that it is ready, or what it says of why not."""
        import httpx

        root = self._base().removesuffix("/v1")
        try:
            answer = httpx.get(f"{root}/ready", timeout=5)
        except httpx.HTTPError:
            return f"**Not ready.** No server answers at {root}."
        if answer.status_code == 503:
            return "**Loading.** The model is being read; questions are answered as soon as it is there."
        return f"Ready at `{root}`."

    def _base(self) -> str:
        base = self.base.rstrip("/")
        return base if base.endswith("/v1") else f"{base}/v1"

    def ask(self, model: str, messages: Sequence[dict[str, Any]], settings: Settings) -> Iterator[StreamState]:
        """An answer as it grows. A refusal is its `problem`, in the server's words. Closing the iterator cancels it."""
        import openai

        told, start = StreamState(), time.perf_counter()
        try:
            with self._client.chat.completions.create(
                model=model,
                messages=list(messages),
                stream=True,
                stream_options={"include_usage": True},
                **settings.request(),
            ) as stream:
                for event in stream:
                    now = time.perf_counter() - start
                    if event.usage is not None:
                        told = replace(told, tokens=event.usage.completion_tokens)
                    text = event.choices[0].delta.content if event.choices else ""
                    if text:
                        told = replace(told, text=told.text + text, first=told.first or now, last=now)
                        yield told
            yield replace(told, done=True)
        except openai.OpenAIError as error:
            yield replace(told, done=True, problem=self._words(error))

    def _words(self, error: Exception) -> str:
        import openai

        if isinstance(error, openai.APITimeoutError):
            return f"{self.base} did not answer in time; ask again, or for fewer tokens"
        if isinstance(error, openai.APIConnectionError):
            return f"no server answers at {self.base}; start one with vila serve, or correct --base-url"
        if isinstance(error, openai.APIStatusError):
            body = error.body if isinstance(error.body, dict) else {}
            said = str(body.get("message") or error.message)
            if error.status_code == 503:
                return f"{said} (the model is still loading, or the server is stopping; try again in a moment)"
            return said
        return str(error)


# --- demo_messages
# From what a page of the demo holds to messages of the chat protocol: pure functions over text and files.


PICTURES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
}
CLIPS = {".mp4": "video/mp4", ".webm": "video/webm", ".mov": "video/quicktime", ".mkv": "video/x-matroska"}
MOST_BYTES = 20 << 20
"""Of one file; the server has limits of its own, and says so itself."""


@dataclass(frozen=True, slots=True)
class FewShotExample:
    """A worked example. An empty `question` stands for the one that is asked after the examples."""

    picture: str
    answer: str
    question: str = ""


def data_url(path: str | Path) -> str:
    """A file as a `data:` URL. Raises MediaError for a kind of file that is no picture or clip, or one too large."""
    file = Path(path)
    kind = (PICTURES | CLIPS).get(file.suffix.lower())
    if kind is None:
        known = ", ".join(sorted(suffix[1:] for suffix in PICTURES | CLIPS))
        raise MediaError(f"{file.name}: neither a picture nor a clip; upload one of {known}")
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise MediaError(f"{file.name}: {size / 2**20:.0f} MiB; upload at most {MOST_BYTES >> 20} MiB")
    if size == 0:
        raise MediaError(f"{file.name}: the file is empty")
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def user_message(text: str, files: Sequence[str | Path]) -> dict[str, Any]:
    """A question: its pictures and clips, in their order, then the text."""
    parts: list[dict[str, Any]] = []
    for file in files:
        kind = "video_url" if Path(file).suffix.lower() in CLIPS else "image_url"
        parts.append({"type": kind, kind: {"url": data_url(file)}})
    if text or not parts:
        parts.append({"type": "text", "text": encodable(text)})
    return {"role": "user", "content": parts}


def shot_messages(shots: Sequence[FewShotExample], question: str) -> list[dict[str, Any]]:
    """Examples as earlier turns, as `vila run --shot` writes them."""
    out: list[dict[str, Any]] = []
    for shot in shots:
        out.append(user_message(shot.question or question, [shot.picture] if shot.picture else []))
        out.append({"role": "assistant", "content": encodable(shot.answer)})
    return out


def conversation(
    turns: Sequence[Mapping[str, Any]], shots: Sequence[FewShotExample] = (), system: str = ""
) -> list[dict[str, Any]]:
    """What is sent for a chat that ends with the user's turn.

    turns: the chat as the page shows it; each has `role` and `content`, a text or a list of texts and files. Turns of
           one role that follow each other are one message. Turns of the page itself, with a `metadata` title, are
           notices: a question that has no answer but one was refused or left without an answer, and is left out too.
    """
    told: list[tuple[str, str, list[str]]] = []
    for turn in turns:
        if (turn.get("metadata") or {}).get("title"):
            if told and told[-1][0] == "user":
                told.pop()
            continue
        text, files = content_of(turn["content"])
        if told and told[-1][0] == turn["role"]:
            role, before, earlier = told.pop()
            text, files = "\n".join(part for part in (before, text) if part), earlier + files
        told.append((str(turn["role"]), text, files))
    messages: list[dict[str, Any]] = [{"role": "system", "content": encodable(system)}] if system.strip() else []
    question = next((text for role, text, _ in told if role == "user"), "")
    messages += shot_messages(shots, question)
    for role, text, files in told:
        messages.append(user_message(text, files) if role == "user" else {"role": role, "content": encodable(text)})
    return messages


def encodable(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which no request can carry; whole pairs are joined."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def content_of(content: Any) -> tuple[str, list[str]]:
    """Text and files of a turn, in whichever of its forms the page hands it over."""
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
