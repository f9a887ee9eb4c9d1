"""Sampling parameters of a request, and the types of answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from vila.core.errors import ConfigError, near_names

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are sampled and what ends an answer. Raises ConfigError that lists every invalid field.

    The logits processors equal those of transformers, in its order: repetition penalty, temperature, top_k, top_p,
    min_p. The last three have an effect only with a temperature above 0.
    """

    max_new_tokens: int = 128
    """Maximum number of new tokens."""
    temperature: float = 0.0
    """0: greedy decoding. Above 0: logits are divided by it and tokens are sampled."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 disables it."""
    top_p: float = 1.0
    """Nucleus sampling: the most likely tokens with this total probability (arXiv 1904.09751); 1 disables it."""
    min_p: float = 0.0
    """Sample from tokens with at least this fraction of the maximum probability (arXiv 2407.01082); 0 disables it."""
    repetition_penalty: float = 1.0
    """Values above 1 penalize tokens of the prompt's text and the answer so far (arXiv 1909.05858); 1 disables it."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer and are not part of it, in addition to those of the template; one or several."""
    logprobs: int = 0
    """Number of most likely alternatives to report with log-probabilities for each token; 0 reports none."""
    seed: int = 0
    """Seed of the sampling. Random numbers depend only on the seed and the index of the conversation in the batch."""
    overlong: Literal["error", "truncate"] = "error"
    """For a prompt too long for the context: raise an error, or drop its oldest exchanges."""
    prompt_lookup_tokens: int = 0
    """Prompt-lookup decoding: maximum number of draft tokens per step; 0 disables it. Used for single conversations;
    does not change the output."""

    def __post_init__(self) -> None:
        given: Any = self.stop
        object.__setattr__(self, "stop", (given,) if isinstance(given, str) else tuple(given))
        if problems := list(self._problems()):
            raise ConfigError.collect("sampling", problems)

    def _problems(self) -> Iterator[str]:
        if not (_is_int(self.max_new_tokens) and self.max_new_tokens >= 1):
            yield f"max_new_tokens={self.max_new_tokens!r}: expected an integer from 1"
        if not (_is_real(self.temperature) and (self.temperature == 0 or self.temperature >= 1e-6)):
            yield f"temperature={self.temperature!r}: expected 0 (greedy) or a number from 0.000001"
        if not (_is_int(self.top_k) and self.top_k >= 0):
            yield f"top_k={self.top_k!r}: expected an integer from 1, or 0 to disable it"
        if not (_is_real(self.top_p) and 0 < self.top_p <= 1):
            yield f"top_p={self.top_p!r}: expected a number above 0 and at most 1 (disabled)"
        if not (_is_real(self.min_p) and 0 <= self.min_p <= 1):
            yield f"min_p={self.min_p!r}: expected a number from 0 (disabled) to 1"
        if not (_is_real(self.repetition_penalty) and self.repetition_penalty > 0):
            yield f"repetition_penalty={self.repetition_penalty!r}: expected a number above 0; 1 disables it"
        if any(not isinstance(stop, str) or not stop for stop in self.stop):
            yield f"stop={self.stop!r}: expected non-empty strings"
        if not (_is_int(self.logprobs) and self.logprobs >= 0):
            yield f"logprobs={self.logprobs!r}: expected an integer from 1, or 0 for none"
        if not (_is_int(self.seed) and 0 <= self.seed < 2**63):
            yield f"seed={self.seed!r}: expected an integer from 0 to 2**63 - 1"
        if not (_is_int(self.prompt_lookup_tokens) and self.prompt_lookup_tokens >= 0):
            yield f"prompt_lookup_tokens={self.prompt_lookup_tokens!r}: expected an integer from 1, or 0 to disable it"
        if self.overlong not in ("error", "truncate"):
            yield f"overlong={self.overlong!r}: expected 'error' or 'truncate'"


def choose_sampling(sampling: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
    """Return `sampling`, or SamplingParams from `options`. Raises ConfigError for both and for unknown names."""
    if sampling is not None and options:
        raise ConfigError(
            f"both sampling and {', '.join(options)} were given",
            hint="pass one SamplingParams, or only keyword options",
        )
    known = [field.name for field in fields(SamplingParams)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError.collect("sampling", [_unknown(name, known) for name in unknown])
    return sampling or SamplingParams(**options)


def _unknown(name: str, known: list[str]) -> str:
    near = near_names(name, known, 1)
    return f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else f" (known: {', '.join(known)})")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability, and the most likely tokens with theirs in descending order.

    Log-probabilities are those of the model, before penalties, temperature and truncation.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer.

    text:             stripped of whitespace at both ends.
    ids:              the new tokens without the final stop token.
    finish:           `stop`: a stop token or string; `length`: max_new_tokens.
    prompt_tokens:    tokens of the prompt, including image placeholders.
    logprobs:         one entry per token if `SamplingParams.logprobs` is set, else empty.
    dropped_messages: number of oldest messages that `overlong="truncate"` dropped.
    draft_tokens, accepted_tokens: tokens drafted by prompt lookup, and how many of them were accepted.
    """

    text: str
    ids: tuple[int, ...]
    finish: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    dropped_messages: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def completion_tokens(self) -> int:
        """Number of generated tokens."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """An event of a streamed answer: text that is final, and the finish reason on the last event."""

    text: str
    finish: FinishReason | None = None
