"""What is asked of the engine, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vila.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; otherwise logits are divided by it.

    max_new_tokens: most tokens an answer may have.
    seed:           of the random draws; equal seeds give equal text for equal batches.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: an answer has at least one token")
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature}: it is 0 (greedy) or more")


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer. `ids` are the new tokens, an ending stop token left out; `text` is stripped at both ends.

    finish: `stop` when the model ended the answer, `length` when max_new_tokens did.
    """

    text: str
    ids: tuple[int, ...]
    finish: FinishReason
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A piece of a streamed answer: text that became certain, and the reason on the last event."""

    text: str
    finish: FinishReason | None = None
