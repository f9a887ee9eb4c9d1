"""Answers as the chat protocol writes them: a whole completion, or chunks of one."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vila.engine.request import Generation, TokenLogprob

if TYPE_CHECKING:
    from vila.engine.ticket import Ticket

Decode = Callable[[Sequence[int]], str]
_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Trim:
    """Pieces of a text without the white space around the whole: joined they are the text that is not streamed."""

    _held: str = ""
    _begun: bool = False

    def take(self, text: str) -> str:
        """What may be shown now."""
        text = self._held + text
        text = text if self._begun else text.lstrip()
        piece = text.rstrip()
        self._held = text[len(piece) :]
        self._begun = self._begun or bool(piece)
        return piece


@dataclass
class TokenReports:
    """Log-probabilities of one answer, with each token's text as it stands behind the one before it.

    decode: of the tokenizer. A token that is no whole character has a replacement character and no bytes.
    """

    decode: Decode
    top: int
    _before: list[int] = field(default_factory=list)

    def take(self, reports: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        """The next tokens of the answer."""
        out = []
        for report in reports:
            likeliest = [self._token(token, logprob) for token, logprob in report.top[: self.top]]
            out.append({**self._token(report.id, report.logprob), "top_logprobs": likeliest})
            self._before = [report.id]
        return out

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.decode([*self._before, token])[len(self.decode(self._before)) :] if self._before else ""
        text = text or self.decode([token])
        whole = _HALF_CHARACTER not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


@dataclass(frozen=True)
class Completion:
    """What all parts of one response share."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any]) -> dict[str, Any]:
        """A response that is not streamed."""
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    def chunk(
        self,
        choice: int,
        delta: Mapping[str, Any],
        *,
        finish: str | None = None,
        logprobs: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """A piece of an answer."""
        piece = {"index": choice, "delta": delta, "logprobs": reported(logprobs), "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [piece]}

    def last(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The chunk that holds the usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def choice_of(index: int, answer: Generation, logprobs: list[dict[str, Any]] | None) -> dict[str, Any]:
    """One answer of a whole response."""
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    return {"index": index, "message": message, "logprobs": reported(logprobs), "finish_reason": answer.finish}


def reported(logprobs: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    """Log-probabilities in their envelope."""
    return None if logprobs is None else {"content": logprobs, "refusal": None}


def usage_of(tickets: Sequence[Ticket]) -> dict[str, Any]:
    """Tokens of a request whose answers are complete: its prompt once, and all answers."""
    prompt = tickets[0].prompt_tokens
    new = sum(len(ticket.generation(0).ids) for ticket in tickets)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": tickets[0].cached_tokens},
    }
