"""Generation: cached equals uncached, batched equals single, streamed equals whole, shared prefixes change nothing."""

import pytest
import torch

from tests import tiny
from vila.core.errors import ConfigError, ContextOverflowError
from vila.core.types import Message
from vila.engine.answer import Answer
from vila.engine.batch import group_prompts
from vila.engine.engine import Engine
from vila.engine.request import Sampling

NEW = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def engine(request):
    engine = Engine(*tiny.vila(request.param))
    engine._stop_ids = frozenset()  # random models end at once or never: look at every token
    return engine


def ask(text, *pictures):
    return [Message.of("user", *(tiny.picture(n) for n in pictures), text)]


QUESTIONS = [
    ask("text only"),
    ask("one?", 1),
    ask("a longer question about the same picture?", 1),
    ask("again?", 1),
    ask("two pictures", 1, 2),
    ask("two pictures, exchanged", 2, 1),
    ask("x"),
]


def uncached(engine, messages, count):
    """Greedy ids from full forwards, no cache and no batch."""
    prompt = engine.processor.prompt(messages)
    pixels = engine.processor.pixels(prompt.media)
    ids = list(prompt.ids)
    for _ in range(count):
        logits = engine.model(input_ids=torch.tensor([ids]), pixel_values=pixels, use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return tuple(ids[len(prompt.ids) :])


@torch.no_grad()
def test_cached_and_batched_decoding_equals_full_forwards(engine):
    answers = engine.generate(QUESTIONS, NEW)
    assert [answer.ids for answer in answers] == [uncached(engine, messages, 12) for messages in QUESTIONS]


def test_batched_equals_single(engine):
    together = [answer.ids for answer in engine.generate(QUESTIONS, NEW)]
    assert together == [engine.generate([messages], NEW)[0].ids for messages in QUESTIONS]


def test_permuting_a_batch_permutes_its_answers(engine):
    ahead = [a.ids for a in engine.generate(QUESTIONS, NEW)]
    assert [a.ids for a in engine.generate(QUESTIONS[::-1], NEW)] == ahead[::-1]


def test_exchanged_pictures_give_another_answer(engine):
    one, two = engine.generate([ask("same words", 1, 2), ask("same words", 2, 1)], NEW)
    assert one.ids != two.ids


def test_questions_about_one_picture_share_its_prefix(engine):
    prompts = [engine.processor.prompt(messages) for messages in QUESTIONS]
    groups = {group.members: group.shared for group in group_prompts(prompts)}
    assert groups[(1, 2, 3)] == 4
    assert groups[(4,)] == groups[(5,)] == groups[(0,)] == 0


def test_streamed_pieces_joined_are_the_whole_answer(engine):
    for messages in QUESTIONS:
        whole = engine.generate([messages], NEW)[0]
        events = list(engine.stream(messages, NEW))
        assert "".join(event.text for event in events).strip() == whole.text
        assert [event.finish for event in events if event.finish] == ["length"]


def grown(text, stops=(), stop_ids=frozenset()):
    """What is certain after each token of `text` (one a byte), and the answer."""
    tokenizer = tiny.tokenizer()
    answer = Answer(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), stop_ids, tuple(stops))
    seen = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        going = answer.take(token)
        seen.append(answer.certain_text)
        if not going:
            break
    return seen, answer


def test_half_a_character_waits_for_its_other_bytes():
    # e-acute takes two tokens of one byte each.
    assert grown("a\u00e9b")[0] == ["a", "a", "a\u00e9", "a\u00e9b"]


def test_a_stop_string_ends_the_answer_across_token_borders_and_is_never_shown():
    seen, answer = grown("ab###c", stops=["###"])
    assert seen == ["a", "ab", "ab", "ab", "ab"]
    assert (answer.text, answer.finish) == ("ab", "stop")


def test_what_only_looked_like_a_stop_string_is_shown_after_all():
    assert grown("a##b", stops=["###"])[0] == ["a", "a", "a", "a##b"]


def test_captions_end_at_the_newline_of_their_template(engine):
    assert engine._answer("caption").stop_texts == ("\n",)
    assert engine._answer("starter_qa").stop_texts == ()


def test_a_stop_token_ends_the_answer_and_is_left_out():
    engine = Engine(*tiny.vila())
    engine._stop_ids = frozenset()
    first = engine.generate([ask("one?", 1)], NEW)[0]
    engine._stop_ids = frozenset({first.ids[4]})
    again = engine.generate([ask("one?", 1)], NEW)[0]
    assert again.finish == "stop"
    assert again.ids == first.ids[: first.ids.index(first.ids[4])]


def test_rows_that_end_early_do_not_disturb_the_others(engine):
    free = engine.generate(QUESTIONS, NEW)
    engine._stop_ids = frozenset({free[1].ids[2]})
    try:
        stopped = engine.generate(QUESTIONS, NEW)
        for before, after in zip(free, stopped, strict=True):
            assert before.ids[: len(after.ids)] == after.ids
        assert stopped[1].finish == "stop"
    finally:
        engine._stop_ids = frozenset()


def test_temperature_draws_are_fixed_by_the_seed(engine):
    def drawn(seed):
        return engine.generate([ask("x")], Sampling(max_new_tokens=20, temperature=1.5, seed=seed))[0].ids

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_scores_are_the_log_probabilities_of_a_full_forward(engine):
    talk = [*ask("one?", 1), Message.of("assistant", "ab")]
    others = [[*ask("text"), Message.of("assistant", "longer answer")], talk]
    alone = engine.score([talk])[0]
    assert engine.score(others)[1] == pytest.approx(alone, abs=1e-5)
    assert len(alone) == len(" ab") + 1
    prompt = engine.processor.prompt(talk[:1])
    ids = [*prompt.ids, *engine.processor.tokenizer(" ab")["input_ids"], engine.processor.span_tokenizer.eos_id]
    with torch.no_grad():
        logits = engine.model(input_ids=torch.tensor([ids]), pixel_values=engine.processor.pixels(prompt.media)).logits
    reference = logits[0].log_softmax(-1)[range(len(prompt.ids) - 1, len(ids) - 1), ids[len(prompt.ids) :]]
    assert alone == pytest.approx(reference.tolist(), abs=1e-5)


def test_a_prompt_that_does_not_fit_is_refused_before_any_work(engine, monkeypatch):
    monkeypatch.setattr(engine, "_encode", None)
    with pytest.raises(
        ContextOverflowError, match="the prompt has 600 tokens and the answer may have 12, .* holds 512"
    ):
        engine.generate([ask("x" * 600)], NEW)


@pytest.mark.parametrize("facts", [{"max_new_tokens": 0}, {"temperature": -1.0}])
def test_impossible_settings_are_refused(facts):
    with pytest.raises(ConfigError, match=next(iter(facts))):
        Sampling(**facts)
