"""What is asked of the engine, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from vila.core.errors import ConfigError, near_names

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and what ends an answer. Raises ConfigError listing every field that is impossible.

    The transforms of the logits are those of transformers, applied in its order: repetition penalty, temperature,
    top_k, top_p, min_p. The last three need a temperature above 0 to matter.
    """

    max_new_tokens: int = 128
    """Most tokens that an answer may have."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, logits are divided by it and tokens are drawn."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability (arXiv 1904.09751); 1 is off."""
    min_p: float = 0.0
    """Draw from tokens at least this fraction as likely as the likeliest (arXiv 2407.01082); 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt's text and of the answer so far less likely (arXiv 1909.05858); 1 is off."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer and are not part of it, besides those of the template; one string or several."""
    logprobs: int = 0
    """How many of the likeliest tokens to report beside each chosen one, with log-probabilities; 0 reports none."""
    seed: int = 0
    """Of the random draws. A conversation's draws depend on the seed and its place in the batch alone."""
    overlong: Literal["error", "truncate"] = "error"
    """What to do with a prompt that leaves no room for the answer: refuse it, or drop its oldest exchanges."""
    prompt_lookup_tokens: int = 0
    """Most tokens that a step tries ahead, taken from what followed the last few where they stood before; 0 is off.
    It changes the speed of an answer that is made alone, and nothing else."""

    def __post_init__(self) -> None:
        given: Any = self.stop
        object.__setattr__(self, "stop", (given,) if isinstance(given, str) else tuple(given))
        if problems := list(self._problems()):
            raise ConfigError.collect("sampling", problems)

    def _problems(self) -> Iterator[str]:
        if not (_is_int(self.max_new_tokens) and self.max_new_tokens >= 1):
            yield f"max_new_tokens={self.max_new_tokens!r}: a whole number from 1"
        if not (_is_real(self.temperature) and (self.temperature == 0 or self.temperature >= 1e-6)):
            yield f"temperature={self.temperature!r}: 0 (greedy), or a number from 0.000001"
        if not (_is_int(self.top_k) and self.top_k >= 0):
            yield f"top_k={self.top_k!r}: a whole number from 1, or 0 for off"
        if not (_is_real(self.top_p) and 0 < self.top_p <= 1):
            yield f"top_p={self.top_p!r}: above 0 and at most 1 (off)"
        if not (_is_real(self.min_p) and 0 <= self.min_p <= 1):
            yield f"min_p={self.min_p!r}: between 0 (off) and 1"
        if not (_is_real(self.repetition_penalty) and self.repetition_penalty > 0):
            yield f"repetition_penalty={self.repetition_penalty!r}: above 0; 1 is off"
        if any(not isinstance(stop, str) or not stop for stop in self.stop):
            yield f"stop={self.stop!r}: strings that are not empty"
        if not (_is_int(self.logprobs) and self.logprobs >= 0):
            yield f"logprobs={self.logprobs!r}: a whole number from 1, or 0 for none"
        if not (_is_int(self.seed) and 0 <= self.seed < 2**63):
            yield f"seed={self.seed!r}: a whole number from 0 to 2**63 - 1"
        if not (_is_int(self.prompt_lookup_tokens) and self.prompt_lookup_tokens >= 0):
            yield f"prompt_lookup_tokens={self.prompt_lookup_tokens!r}: a whole number from 1, or 0 for off"
        if self.overlong not in ("error", "truncate"):
            yield f"overlong={self.overlong!r}: 'error' or 'truncate'"


def choose_sampling(sampling: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
    """`sampling`, or one made of `options`. Raises ConfigError for both at once and for names that are no fields."""
    if sampling is not None and options:
        raise ConfigError(
            f"both sampling and {', '.join(options)} were given; put everything into one SamplingParams, "
            f"or give the options alone"
        )
    known = [field.name for field in fields(SamplingParams)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError.collect("sampling", [_unknown(name, known) for name in unknown])
    return sampling or SamplingParams(**options)


def _unknown(name: str, known: list[str]) -> str:
    near = near_names(name, known, 1)
    return f"no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else f" (known: {', '.join(known)})")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token with its log-probability, and the likeliest tokens with theirs, likeliest first.

    They are of the model's own distribution: before penalty, temperature and the cuts of the sampling.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer. `text` is stripped at both ends.

    ids:              the new tokens, an ending stop token left out.
    finish:           `stop` when the model ended the answer, `length` when max_new_tokens did.
    prompt_tokens:    tokens of the prompt, slots of pictures included.
    logprobs:         one for each of `ids` when `SamplingParams.logprobs` asked for them, else none.
    dropped_messages: how many of the oldest messages `overlong="truncate"` left out.
    tried, accepted:  tokens that `lookup` tried ahead, and how many of them were the model's own.
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
    """A piece of a streamed answer: text that became certain, and the reason on the last event."""

    text: str
    finish: FinishReason | None = None
