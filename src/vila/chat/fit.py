"""Checks a prompt against the context length, or drops its oldest turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from vila.chat.tokenize import Tokens
from vila.core.errors import ContextOverflowError
from vila.core.types import Message


def fit_prompt(
    messages: Sequence[Message],
    tokenize: Callable[[Sequence[Message]], Tokens],
    *,
    context: int,
    answer: int,
    overlong: Literal["error", "truncate"] = "error",
) -> tuple[Tokens, int]:
    """Return the tokens of a prompt that fits the context, and the number of dropped messages.

    context:  context length of the model in tokens.
    answer:   maximum number of new tokens.
    overlong: `truncate` drops the oldest exchanges (a user turn and its answer) until the rest fits. The system
              message and the last question are never dropped, and turns are never cut.
    Raises ContextOverflowError if the prompt does not fit.
    """
    cuts = droppable(messages) if overlong == "truncate" else [0]
    for dropped in cuts:
        tokens = tokenize(without_oldest(messages, dropped))
        if len(tokens.ids) + answer <= context:
            return tokens, dropped
    what = "the prompt" if dropped == 0 else "the prompt without its earlier turns"
    truncate = "" if overlong == "truncate" else ', set overlong="truncate"'
    raise ContextOverflowError(
        f"{what} has {len(tokens.ids)} tokens and the answer up to {answer}, but the context length is {context}",
        hint=f"shorten the prompt{truncate} or lower max_new_tokens",
    )


def droppable(messages: Sequence[Message]) -> list[int]:
    """Return the numbers of leading messages that can be dropped: 0 and every end of an exchange."""
    start = _num_system(messages)
    questions = [place - start for place, message in enumerate(messages) if message.role == "user"]
    return sorted({0, *(place for place in questions if place > 0)})


def without_oldest(messages: Sequence[Message], count: int) -> Sequence[Message]:
    """Return the conversation without the `count` messages after its system messages."""
    start = _num_system(messages)
    return [*messages[:start], *messages[start + count :]] if count else messages


def _num_system(messages: Sequence[Message]) -> int:
    """Return the number of leading system messages."""
    return next((place for place, message in enumerate(messages) if message.role != "system"), len(messages))
