"""Prompt lookup changes the number of steps and nothing else."""

import random

import pytest
import torch

from tests.engine.fixtures import MODELS, QUESTIONS, ask
from tests.engine.onnx_fixtures import onnx_engine, torch_engine
from vila.core.errors import ConfigError
from vila.core.types import Message
from vila.engine.batcher import Batcher
from vila.engine.engine import Engine
from vila.engine.prompt_lookup import PromptLookup
from vila.engine.sampling_params import SamplingParams

WORDS = ["red", "blue", "circle", "square", "the", "of", "what", "is", "it", "1", "22", "333"]


def repetitive_prompts(seed, count):
    """Yield prompts of few different words, every third with an image."""
    draw = random.Random(seed)
    for number in range(count):
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(2, 20)))
        yield ask(text, *([draw.randrange(4)] if number % 3 == 0 else []))


def complete_both(engine, messages, **options):
    """Return the answer with lookup, after a check that the answer without it is equal."""
    plain = engine.complete([messages], **options)[0]
    drafted = engine.complete([messages], prompt_lookup_tokens=6, **options)[0]
    assert (drafted.text, drafted.ids, drafted.finish) == (plain.text, plain.ids, plain.finish)
    for one, other in zip(drafted.logprobs, plain.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    return drafted


@pytest.fixture(scope="module", params=[*MODELS, "onnx"])
def engine(request):
    return onnx_engine() if request.param == "onnx" else torch_engine(request.param)


def test_greedy_answers_equal_those_without_lookup(engine):
    answers = [
        complete_both(engine, messages, max_new_tokens=40) for messages in [*repetitive_prompts(1, 4), *QUESTIONS[:1]]
    ]
    # Random models repeat themselves, so some drafts are accepted.
    assert sum(answer.accepted_tokens for answer in answers) > 0
    assert all(answer.accepted_tokens <= answer.draft_tokens for answer in answers)


def test_stop_strings_end_the_answer_at_the_same_token(engine):
    for messages in repetitive_prompts(2, 2):
        text = engine.generate(messages, max_new_tokens=40)
        for stop in {text[10:12], text[20:23], text[-2:]} - {""}:
            assert complete_both(engine, messages, max_new_tokens=40, stop=(stop,)).finish in ("stop", "length")


def test_sampled_answers_and_logprobs_equal_those_without_lookup(engine):
    for messages in repetitive_prompts(3, 2):
        complete_both(engine, messages, max_new_tokens=24, temperature=0.7, seed=5, logprobs=2)
        complete_both(engine, messages, max_new_tokens=24, repetition_penalty=1.2, logprobs=2)


def test_max_new_tokens_is_exact(engine):
    for most in (1, 2, 3, 5, 8, 11):
        assert len(complete_both(engine, ask("one one one one", 1), max_new_tokens=most).ids) == most


def test_accepted_drafts_reduce_the_number_of_passes():
    engine = torch_engine()
    calls = []
    decoder = engine.model.get_decoder()
    hook = decoder.register_forward_hook(lambda *arguments: calls.append(1))
    answer = engine.complete([ask("x")], max_new_tokens=60, prompt_lookup_tokens=8)[0]
    hook.remove()
    assert answer.accepted_tokens > 3
    assert len(calls) == len(answer.ids) - answer.accepted_tokens


def test_lookup_with_prefix_caching_gives_the_same_conversation(engine):
    caching = Engine(engine.model, engine.processor, engine._program, prefix_caching=True)
    caching._stop_ids = frozenset()
    messages = [*ask("one?", 1)]
    for _ in range(3):
        answer = caching.complete([messages], max_new_tokens=20, prompt_lookup_tokens=5)[0]
        assert answer.ids == engine.complete([messages], max_new_tokens=20)[0].ids
        messages = [*messages, Message.of("assistant", answer.text), *ask("again?")]
    assert caching._offline.scheduler.counts.cached_prompt_tokens > 40


def test_lookup_is_off_while_several_requests_run():
    engine = torch_engine()
    plain = engine.complete(QUESTIONS, max_new_tokens=12)
    assert engine.complete(QUESTIONS, max_new_tokens=12, prompt_lookup_tokens=4) == plain


def test_lookup_starts_when_the_other_requests_have_ended():
    engine = torch_engine()
    batcher = Batcher(engine, max_num_seqs=2)
    long = batcher.submit(ask("x"), SamplingParams(max_new_tokens=60, prompt_lookup_tokens=8))
    short = batcher.submit(ask("y"), SamplingParams(max_new_tokens=6))
    with torch.inference_mode():
        while not short.done:
            assert long._answer.draft_tokens == 0
            batcher._step()
        while not long.done:
            batcher._step()
    answer = long.generation(0)
    assert 0 < answer.accepted_tokens <= answer.draft_tokens
    assert answer.ids == engine.complete([ask("x")], max_new_tokens=60)[0].ids


def test_draft_copies_what_followed_the_last_occurrence():
    lookup = PromptLookup([1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 7, 8, 1, 2, 3], 3)
    assert lookup.draft(10) == [5, 6, 7]
    assert lookup.draft(2) == [5, 6]
    lookup.append(4)
    assert lookup.draft(1) == [9]
    lookup.append(11)
    assert lookup.draft(3) == []


def test_draft_continues_a_repetition():
    assert PromptLookup([5, 6, 5, 6, 5, 6], 4).draft(4) == [5, 6, 5, 6]


def test_draft_ends_before_an_image():
    assert PromptLookup([1, 2, 3, -1, -1, 4, 1, 2], 4).draft(4) == [3]
    assert PromptLookup([-1, -1, -1, -1], 4).draft(4) == []


def test_update_adapts_the_draft_length():
    lookup = PromptLookup([1, 2] * 20, 16)
    assert len(lookup.draft(99)) == 4
    lookup.update(4, 4)
    lookup.update(8, 8)
    assert len(lookup.draft(99)) == 16
    lookup.update(16, 2)
    assert len(lookup.draft(99)) == 3


def test_negative_prompt_lookup_tokens_are_rejected():
    with pytest.raises(ConfigError) as caught:
        SamplingParams(prompt_lookup_tokens=-1)
    assert "prompt_lookup_tokens=-1" in str(caught.value)
