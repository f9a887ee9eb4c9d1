"""What ends an answer, and what of it may be shown before it has ended."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.engine.fixtures import sentencepiece
from vila.chat.detokenize import detokenizer_of
from vila.engine.request import Answer
from vila.engine.sampling_params import TokenLogprob

TOKENIZERS = {"byte-level": tiny.tokenizer, "sentencepiece": sentencepiece}


def feed(tokenizer, ids, stops=(), stop_ids=frozenset()):
    """What is certain after each token until the answer ends, and the answer."""
    answer = Answer(detokenizer_of(tokenizer), frozenset(stop_ids), tuple(stops))
    seen = []
    for token in ids:
        going = answer.take(token)
        seen.append(answer.final_text)
        if not going:
            break
    return seen, answer


def grown(text, **stops):
    """The same for text, one token a byte."""
    tokenizer = tiny.tokenizer()
    return feed(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], **stops)


def test_half_a_character_waits_for_its_other_bytes():
    # e-acute takes two tokens of one byte each.
    assert grown("a\u00e9b")[0] == ["a", "a", "a\u00e9", "a\u00e9b"]


def test_an_answer_cut_inside_a_character_shows_that_it_was():
    seen, answer = grown("a\u00e9")
    answer = feed(tiny.tokenizer(), answer.ids[:-1])[1]
    assert answer.generation(3).text == "a\ufffd"
    assert answer.generation(3).finish == "length"


def test_a_stop_string_ends_the_answer_across_token_borders_and_is_never_shown():
    seen, answer = grown("ab###c", stops=["###"])
    assert seen == ["a", "ab", "ab", "ab", "ab"]
    assert (answer.text, answer.finish) == ("ab", "stop")


def test_what_only_looked_like_a_stop_string_is_shown_after_all():
    assert grown("a##b", stops=["###"])[0] == ["a", "a", "a", "a##b"]


def test_the_first_of_several_stop_strings_counts():
    seen, answer = grown("one END two STOP", stops=["STOP", "END"])
    assert (answer.text, answer.finish) == ("one ", "stop")


def test_a_newline_that_is_a_byte_token_stops_at_once():
    tokenizer = sentencepiece()
    ids = tokenizer("he\nllo", add_special_tokens=False)["input_ids"]
    assert "<0x0A>" in tokenizer.convert_ids_to_tokens(ids)
    seen, answer = feed(tokenizer, ids, stops=["\n"])
    assert (answer.text, answer.finish, seen[-1]) == ("he", "stop", "he")


def test_a_stop_token_ends_the_answer_and_is_no_part_of_it():
    token = tiny.tokenizer()("c")["input_ids"][0]
    seen, answer = grown("abcd", stop_ids=[token])
    assert (answer.text, answer.finish, len(answer.ids)) == ("ab", "stop", 2)


def test_log_probabilities_are_kept_for_kept_tokens_alone():
    answer = Answer(detokenizer_of(tiny.tokenizer()), frozenset({9}), ())
    reports = [TokenLogprob(token, -0.5, ()) for token in (7, 8, 9)]
    assert [answer.take(report.id, report) for report in reports] == [True, True, False]
    assert answer.generation(1).logprobs == tuple(reports[:2])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_final_text_only_grows_and_ends_as_the_answer(name, data):
    tokenizer = TOKENIZERS[name]()
    stops = data.draw(st.lists(st.text("ab\n\ufffd \u00e9", min_size=1, max_size=3), max_size=2))
    ids = data.draw(st.lists(st.integers(0, 258), max_size=25))
    seen, answer = feed(tokenizer, ids, stops=stops)
    shown = ""
    for text in [*seen, answer.text]:
        assert text.startswith(shown)
        shown = text
    assert answer.text == detokenizer_of(tokenizer).decode(answer.ids)[: len(answer.text)]
    assert not any(stop in answer.text for stop in stops)
    assert answer.finish == "stop" or answer.text == detokenizer_of(tokenizer).decode(ids)
