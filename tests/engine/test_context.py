"""What does not fit is refused with the numbers, or loses its oldest exchanges and nothing else."""

import pytest

from vila.chat.tokenize import Tokens
from vila.core.errors import ContextOverflowError
from vila.core.types import Message
from vila.engine.context import droppable, fit_prompt, without_oldest


def said(*roles_and_lengths):
    return [Message.of(role, "x" * length) for role, length in roles_and_lengths]


SYSTEM, FIRST, SECOND, LAST = (
    ("system", 5),
    [("user", 40), ("assistant", 3)],
    [("user", 20), ("assistant", 2)],
    ("user", 9),
)
TALK = said(SYSTEM, *FIRST, *SECOND, LAST)


def count(messages):
    """One token a character."""
    return Tokens(ids=[0] * sum(len(message.text) for message in messages))


@pytest.mark.parametrize(("context", "dropped"), [(89, 0), (88, 2), (46, 2), (45, 4), (24, 4)])
def test_whole_exchanges_go_oldest_first_until_the_rest_fits(context, dropped):
    tokens, gone = fit_prompt(TALK, count, context=context, answer=10, overlong="truncate")
    assert gone == dropped
    assert len(tokens.ids) + 10 <= context


def test_the_system_text_and_the_last_question_stay():
    assert list(without_oldest(TALK, 4)) == said(SYSTEM, LAST)
    assert list(without_oldest(TALK[1:], 2)) == said(*SECOND, LAST)
    assert droppable(TALK) == [0, 2, 4]
    assert droppable(TALK[-1:]) == [0]


def test_without_being_asked_nothing_is_left_out():
    with pytest.raises(ContextOverflowError) as caught:
        fit_prompt(TALK, count, context=88, answer=10)
    assert all(number in caught.value.problem for number in ("79", "10", "88"))
    assert 'overlong="truncate"' in caught.value.hint and "max_new_tokens" in caught.value.hint


def test_a_last_question_that_does_not_fit_alone_is_refused():
    with pytest.raises(ContextOverflowError, match="14 tokens .* 20") as caught:
        fit_prompt(TALK, count, context=20, answer=10, overlong="truncate")
    assert "overlong" not in caught.value.hint
