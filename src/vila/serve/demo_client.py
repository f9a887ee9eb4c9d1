"""What the demo asks of a server: which models there are, whether it is ready, and streamed answers with their pace."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vila.core.errors import ConfigError
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
class Told:
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

    def ask(self, model: str, messages: Sequence[dict[str, Any]], settings: Settings) -> Iterator[Told]:
        """An answer as it grows. A refusal is its `problem`, in the server's words. Closing the iterator cancels it."""
        import openai

        told, start = Told(), time.perf_counter()
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
            return f"no server answers at {self.base}; start one with vila serve, or correct --api"
        if isinstance(error, openai.APIStatusError):
            body = error.body if isinstance(error.body, dict) else {}
            said = str(body.get("message") or error.message)
            if error.status_code == 503:
                return f"{said} (the model is still loading, or the server is stopping; try again in a moment)"
            return said
        return str(error)
