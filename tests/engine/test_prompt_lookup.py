"""Tokens tried ahead change nothing but the number of steps."""

import random

import pytest

from tests.engine.fixtures import MODELS, QUESTIONS, ask
from tests.engine.onnx_fixtures import onnx_engine, torch_engine
from vila.core.errors import ConfigError
from vila.core.types import Message
from vila.engine.engine import Engine
from vila.engine.prefix_cache import DEFAULT_BYTES
from vila.engine.prompt_lookup import PromptLookup
from vila.engine.request import SamplingParams

WORDS = ["red", "blue", "circle", "square", "the", "of", "what", "is", "it", "1", "22", "333"]


def some_prompts(seed, count):
    """Prompts of few words, so that they repeat themselves; every third with a picture."""
    draw = random.Random(seed)
    for number in range(count):
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(2, 20)))
        yield ask(text, *([draw.randrange(4)] if number % 3 == 0 else []))


def same(engine, messages, **options):
    """The answers with and without lookup; both have the same tokens, reports and end."""
    plain = engine.complete([messages], **options)[0]
    ahead = engine.complete([messages], prompt_lookup_tokens=6, **options)[0]
    assert (ahead.text, ahead.ids, ahead.finish) == (plain.text, plain.ids, plain.finish)
    for one, other in zip(ahead.logprobs, plain.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    return ahead


@pytest.fixture(scope="module", params=[*MODELS, "onnx"])
def engine(request):
    return onnx_engine() if request.param == "onnx" else torch_engine(request.param)


def test_greedy_answers_are_those_of_single_steps(engine):
    answers = [same(engine, messages, max_new_tokens=40) for messages in [*some_prompts(1, 8), *QUESTIONS[:5]]]
    # Random models fall into repetition, which is what lookup lives on.
    assert sum(answer.accepted_tokens for answer in answers) > 2
    assert all(answer.accepted_tokens <= answer.draft_tokens for answer in answers)


def test_stop_strings_end_the_answer_at_the_same_token(engine):
    for messages in some_prompts(2, 4):
        text = engine.generate(messages, max_new_tokens=40)
        for stop in {text[10:12], text[20:23], text[-2:]} - {""}:
            assert same(engine, messages, max_new_tokens=40, stop=(stop,)).finish in ("stop", "length")


def test_draws_penalties_and_reports_are_those_of_single_steps(engine):
    for messages in some_prompts(3, 4):
        same(engine, messages, max_new_tokens=24, temperature=0.7, seed=5, logprobs=2)
        same(engine, messages, max_new_tokens=24, repetition_penalty=1.2, logprobs=2)


def test_every_length_of_answer_is_kept_to(engine):
    for most in range(1, 12):
        assert len(same(engine, ask("one one one one", 1), max_new_tokens=most).ids) == most


def test_steps_are_saved(monkeypatch):
    engine = torch_engine()
    calls = []
    decoder = engine.model.get_decoder()
    hook = decoder.register_forward_hook(lambda *arguments: calls.append(1))
    answer = engine.complete([ask("x")], max_new_tokens=60, prompt_lookup_tokens=8)[0]
    hook.remove()
    assert answer.accepted_tokens > 3
    assert len(calls) == len(answer.ids) - answer.accepted_tokens


def test_a_chat_with_lookup_goes_on_from_what_was_kept(engine):
    kept = Engine(engine.model, engine.processor, engine._program, prefix_cache_bytes=DEFAULT_BYTES)
    kept._stop_ids = frozenset()
    talk = [*ask("one?", 1)]
    for _ in range(3):
        answer = kept.complete([talk], max_new_tokens=20, prompt_lookup_tokens=5)[0]
        assert answer.ids == engine.complete([talk], max_new_tokens=20)[0].ids
        talk = [*talk, Message.of("assistant", answer.text), *ask("again?")]
    assert kept.prefix_cache.reused_tokens > 40


def test_in_a_batch_it_is_off():
    engine = torch_engine()
    assert engine.complete(QUESTIONS, max_new_tokens=12, prompt_lookup_tokens=4) == engine.complete(
        QUESTIONS, max_new_tokens=12
    )


def test_a_draft_is_what_followed_last_time():
    lookup = PromptLookup([1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 7, 8, 1, 2, 3], 3)
    assert lookup.draft(10) == [5, 6, 7]
    assert lookup.draft(2) == [5, 6]
    lookup.append(4)
    assert lookup.draft(1) == [9]
    lookup.append(11)
    assert lookup.draft(3) == []


def test_a_repeating_text_is_drafted_to_repeat_on():
    assert PromptLookup([5, 6, 5, 6, 5, 6], 4).draft(4) == [5, 6, 5, 6]


def test_drafts_end_before_a_picture():
    assert PromptLookup([1, 2, 3, -1, -1, 4, 1, 2], 4).draft(4) == [3]
    assert PromptLookup([-1, -1, -1, -1], 4).draft(4) == []


def test_drafts_grow_with_success_and_shrink_without():
    lookup = PromptLookup([1, 2] * 20, 16)
    assert len(lookup.draft(99)) == 4
    lookup.update(4, 4)
    lookup.update(8, 8)
    assert len(lookup.draft(99)) == 16
    lookup.update(16, 2)
    assert len(lookup.draft(99)) == 3


def test_an_impossible_lookup_is_refused():
    with pytest.raises(ConfigError, match="prompt_lookup_tokens=-1"):
        SamplingParams(prompt_lookup_tokens=-1)
