"""Prompts longer than the context are rejected, or lose their oldest exchanges and nothing else."""

import pytest

from vila.chat.fit import droppable, fit_prompt, without_oldest
from vila.chat.tokenize import Tokens
from vila.core.errors import ContextOverflowError
from vila.core.types import Message


def conversation(*roles_and_lengths):
    return [Message.of(role, "x" * length) for role, length in roles_and_lengths]


SYSTEM, FIRST, SECOND, LAST = (
    ("system", 5),
    [("user", 40), ("assistant", 3)],
    [("user", 20), ("assistant", 2)],
    ("user", 9),
)
MESSAGES = conversation(SYSTEM, *FIRST, *SECOND, LAST)


def count(messages):
    """Return one token per character."""
    return Tokens(ids=[0] * sum(len(message.text) for message in messages))


@pytest.mark.parametrize(("context", "expected"), [(89, 0), (88, 2), (46, 2), (45, 4), (24, 4)])
def test_fit_prompt_drops_the_oldest_exchanges_until_the_rest_fits(context, expected):
    tokens, dropped = fit_prompt(MESSAGES, count, context=context, answer=10, overlong="truncate")
    assert dropped == expected
    assert len(tokens.ids) + 10 <= context


def test_the_system_message_and_the_last_question_are_never_dropped():
    assert list(without_oldest(MESSAGES, 4)) == conversation(SYSTEM, LAST)
    assert list(without_oldest(MESSAGES[1:], 2)) == conversation(*SECOND, LAST)
    assert droppable(MESSAGES) == [0, 2, 4]
    assert droppable(MESSAGES[-1:]) == [0]


def test_fit_prompt_drops_nothing_by_default():
    with pytest.raises(ContextOverflowError) as caught:
        fit_prompt(MESSAGES, count, context=88, answer=10)
    assert all(number in caught.value.problem for number in ("79", "10", "88"))
    assert 'overlong="truncate"' in caught.value.hint and "max_new_tokens" in caught.value.hint


def test_a_last_question_longer_than_the_context_is_rejected():
    with pytest.raises(ContextOverflowError) as caught:
        fit_prompt(MESSAGES, count, context=20, answer=10, overlong="truncate")
    assert all(number in caught.value.problem for number in ("14", "10", "20"))
    assert "overlong" not in caught.value.hint
