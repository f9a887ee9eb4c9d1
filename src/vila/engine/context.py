"""Making a prompt fit the model's context, or saying that it does not, before any work."""

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
    """The prompt of a conversation, and how many of its messages were left out to make room.

    context:  tokens that the model can hold.
    answer:   tokens that the answer may have.
    overlong: `truncate` leaves out the oldest exchanges (a user's turn and what answers it) until the rest fits; the
              system text and the last question always stay, and no turn is cut.
    Raises ContextOverflowError with the numbers when the prompt, or what may not be left out of it, does not fit.
    """
    cuts = droppable(messages) if overlong == "truncate" else [0]
    for dropped in cuts:
        tokens = tokenize(without_oldest(messages, dropped))
        if len(tokens.ids) + answer <= context:
            return tokens, dropped
    what = "the prompt" if dropped == 0 else "the prompt without its earlier turns"
    truncate = "" if overlong == "truncate" else ', set overlong="truncate"'
    raise ContextOverflowError(
        f"{what} has {len(tokens.ids)} tokens and the answer up to {answer}, but the model's context holds {context}",
        hint=f"shorten the prompt{truncate} or lower max_new_tokens",
    )


def droppable(messages: Sequence[Message]) -> list[int]:
    """How many messages may go, from none to all before the last question: every number ends with a whole exchange."""
    start = _system(messages)
    questions = [place - start for place, message in enumerate(messages) if message.role == "user"]
    return sorted({0, *(place for place in questions if place > 0)})


def without_oldest(messages: Sequence[Message], count: int) -> Sequence[Message]:
    """The conversation without the `count` messages that follow its system text."""
    start = _system(messages)
    return [*messages[:start], *messages[start + count :]] if count else messages


def _system(messages: Sequence[Message]) -> int:
    """The number of system messages at the beginning."""
    return next((place for place, message in enumerate(messages) if message.role != "system"), len(messages))
