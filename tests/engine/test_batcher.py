"""Continuous batching: every request gets the answer that the engine gives to it alone."""

import random
from dataclasses import replace

import pytest
import torch

from tests import tiny
from tests.engine.fixtures import MODELS, QUESTIONS, ask, endless
from vila.core.types import Image
from vila.engine.batcher import Batcher
from vila.engine.engine import Engine
from vila.engine.fast_decoder import FastDecoder
from vila.engine.sampling_params import SamplingParams

NEW = SamplingParams(max_new_tokens=12)


@pytest.fixture(
    scope="module", params=[(name, kind) for name in MODELS for kind in ("torch", "fast_decoder", "onnx")], ids=str
)
def model_engine(request):
    """Return an engine and its answer to each question alone."""
    name, kind = request.param
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        from tests.engine.onnx_fixtures import onnx_engine

        engine = onnx_engine(name)
    else:
        engine = endless(name)
    if kind == "fast_decoder":
        engine = Engine(engine.model, engine.processor, fast_decoder=FastDecoder(engine.model))
        engine._stop_ids = frozenset()
    return engine, [engine.complete([messages], NEW)[0] for messages in QUESTIONS]


@pytest.fixture(scope="module")
def engine():
    return endless()


@pytest.fixture
def count_images(monkeypatch):
    """Return a function that lists the number of images in each later call of an engine's vision tower."""

    def watch(engine):
        counted = []
        encode = engine.model.vision_features
        monkeypatch.setattr(
            engine.model, "vision_features", lambda pixels: counted.append(len(pixels)) or encode(pixels)
        )
        return counted

    return watch


def step(batcher, count=1):
    """Run steps of a batcher that was not started."""
    with torch.inference_mode():
        for _ in range(count):
            batcher._step()


def assert_equal(found, wanted):
    """Compare answers, log-probabilities with a tolerance."""
    assert replace(found, logprobs=()) == replace(wanted, logprobs=())
    assert [token.id for token in found.logprobs] == [token.id for token in wanted.logprobs]
    for one, other in zip(found.logprobs, wanted.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert dict(one.top) == pytest.approx(dict(other.top), abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 8},
        {"max_num_seqs": 3, "kv_tokens": 200, "prefill_chunk": 16},
        {"max_num_seqs": 2, "kv_tokens": 64, "prefill_chunk": 5},
    ],
    ids=["large", "small", "smallest"],
)
def test_greedy_answers_equal_those_of_the_engine_in_any_order(model_engine, options):
    engine, wanted = model_engine
    order = [*range(len(QUESTIONS)), 1, 2, 4]
    random.Random(len(options)).shuffle(order)
    with Batcher(engine, **options) as batcher:
        handles = [(index, batcher.submit(QUESTIONS[index], NEW)) for index in order]
        for index, handle in handles:
            assert handle.generation(30) == wanted[index]
            assert handle.prompt_tokens == wanted[index].prompt_tokens
    stats = batcher.stats()
    assert (stats.finished, stats.kv_tokens_used, stats.running, stats.waiting) == (len(order), 0, 0, 0)
    assert stats.new_tokens == 12 * len(order)
    # The engine's own methods are not affected by its batcher.
    assert engine.complete(QUESTIONS[:2], NEW) == wanted[:2]


SAMPLINGS = [
    NEW,
    SamplingParams(max_new_tokens=20, temperature=1.5, seed=3),
    SamplingParams(max_new_tokens=17, temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, seed=4, logprobs=2),
    SamplingParams(max_new_tokens=9, repetition_penalty=1.4, logprobs=3),
    SamplingParams(max_new_tokens=25, temperature=2.0, stop=("e", "\n"), seed=1),
    SamplingParams(max_new_tokens=1),
]


def test_requests_with_different_sampling_give_the_answers_they_give_alone(engine):
    pairs = [(messages, sampling) for messages in QUESTIONS[:2] for sampling in SAMPLINGS]
    random.Random(0).shuffle(pairs)
    with Batcher(engine, max_num_seqs=5) as batcher:
        handles = [batcher.submit(messages, sampling) for messages, sampling in pairs]
        for handle, (messages, sampling) in zip(handles, pairs, strict=True):
            assert_equal(handle.generation(30), engine.complete([messages], sampling)[0])


def test_joined_events_equal_the_answer(engine):
    received = []
    with Batcher(engine, max_num_seqs=3) as batcher:
        handles = [batcher.submit(ask("x"), SAMPLINGS[4], on_event=received.append), batcher.submit(ask("y", 1), NEW)]
        for handle in handles:
            events = list(handle.events())
            answer = handle.generation()
            assert "".join(event.text for event in events).strip() == answer.text
            assert [event.finish for event in events] == [None] * (len(events) - 1) + [answer.finish]
    assert "".join(event.text for event in received).strip() == handles[0].generation().text


def test_stop_tokens_end_single_answers():
    engine = endless()
    free = [engine.complete([messages], NEW)[0] for messages in QUESTIONS]
    engine._stop_ids = frozenset({free[1].ids[2], free[4].ids[5]})
    with Batcher(engine, max_num_seqs=4) as batcher:
        handles = [batcher.submit(messages, NEW) for messages in QUESTIONS]
        answers = [handle.generation(30) for handle in handles]
    assert answers == [engine.complete([messages], NEW)[0] for messages in QUESTIONS]
    assert answers[1].finish == "stop"


def test_a_repeated_prompt_reuses_the_cache_only_with_the_same_image(engine):
    question = "what is in the image, please?"
    with Batcher(engine, max_num_seqs=4) as batcher:
        first = batcher.submit(ask(question, 1), NEW)
        wanted = first.generation(30)
        again = batcher.submit(ask(question, 1), NEW)
        assert again.generation(30) == wanted
        other = batcher.submit(ask(question, 2), NEW)
        assert other.generation(30) == engine.complete([ask(question, 2)], NEW)[0] != wanted
    assert [handle.cached_tokens for handle in (first, again, other)] == [0, first.prompt_tokens - 1, 0]
    assert batcher.stats().cached_prompt_tokens == again.cached_tokens


def test_simultaneous_requests_compute_their_common_prefix_once(engine):
    batcher = Batcher(engine, max_num_seqs=6)
    prefix = "a long text at the beginning of every question: "
    handles = [batcher.submit(ask(prefix + str(number), 1), NEW) for number in range(6)]
    step(batcher, 20)
    assert all(handle.done for handle in handles)
    assert [handle.cached_tokens > len(prefix) for handle in handles] == [False] + [True] * 5
    assert [handle.generation(0) for handle in handles] == [
        engine.complete([ask(prefix + str(number), 1)], NEW)[0] for number in range(6)
    ]


def test_a_request_that_waits_for_a_prefix_does_not_hold_up_others(engine):
    batcher = Batcher(engine, max_num_seqs=4, prefill_chunk=16)
    prefix = "a prefix of several chunks, " * 3
    first, alike, other = (batcher.submit(ask(text), NEW) for text in (prefix + "1", prefix + "2", "other"))
    step(batcher)
    running = [request.handle for request in batcher._scheduler.running]
    assert running == [first, other]
    step(batcher, 30)
    # It does not wait for the last few tokens.
    assert alike.cached_tokens > len(prefix) - 16
    assert alike.generation(0) == engine.complete([ask(prefix + "2")], NEW)[0]


def test_each_image_is_encoded_once_and_none_whose_tokens_are_cached(count_images):
    engine = endless()
    counted = count_images(engine)
    with Batcher(engine, max_num_seqs=4) as batcher:
        for _ in range(2):
            for handle in [batcher.submit(messages, NEW) for messages in QUESTIONS]:
                handle.generation(30)
        assert sum(counted) == 3
        conversation = ask("a question that is long enough to share", 7)
        for _ in range(2):
            batcher._scheduler.runner.features._features.clear()
            batcher.submit(conversation, NEW).generation(30)
    assert sum(counted) == 4


def test_running_answers_grow_at_every_step_during_chunked_prefill(engine):
    batcher = Batcher(engine, max_num_seqs=4, prefill_chunk=16)
    running = batcher.submit(ask("short"), SamplingParams(max_new_tokens=100))
    step(batcher, 3)
    known = len(running._answer.ids)
    widths = []
    runner = batcher._scheduler.runner
    forward = runner.forward

    def watched(batch):
        widths.append(sum(chunk.count for chunk in batch.chunks))
        return forward(batch)

    runner.forward = watched
    long = batcher.submit(ask("long " * 40, 1, 2), NEW)
    steps = 0
    while not long._answer.ids:
        step(batcher)
        steps += 1
    assert len(running._answer.ids) == known + steps
    assert max(widths) <= 16
    assert steps >= long.prompt_tokens // 16
    step(batcher, 12)
    assert long.generation(0) == engine.complete([ask("long " * 40, 1, 2)], NEW)[0]


def test_encoding_images_counts_against_the_prefill_chunk(count_images):
    engine = endless()
    batcher = Batcher(engine, max_num_seqs=4, prefill_chunk=8)
    running = batcher.submit(ask("short"), SamplingParams(max_new_tokens=100))
    step(batcher, 3)
    counted = count_images(engine)
    handle = batcher.submit(ask("five", 1, 2, 3, 4, 5), NEW)
    known, steps = len(running._answer.ids), 0
    while not handle._answer.ids:
        step(batcher)
        steps += 1
    assert counted == [2, 2, 1]  # four placeholders per image, eight tokens per step
    assert len(running._answer.ids) == known + steps


def test_images_are_encoded_together_while_no_answer_is_running(count_images):
    engine = endless()
    counted = count_images(engine)
    batcher = Batcher(engine, max_num_seqs=4, prefill_chunk=8)
    batcher.submit(ask("five", 1, 2, 3, 4, 5), NEW)
    step(batcher)
    assert counted == [5]


def test_a_request_that_waits_for_memory_is_not_overtaken(engine):
    batcher = Batcher(engine, max_num_seqs=4, kv_tokens=64)
    ends = []
    small = SamplingParams(max_new_tokens=8)

    def submit(name, messages, sampling):
        return batcher.submit(messages, sampling, on_event=lambda event: event.finish and ends.append(name))

    submit("first", ask("x"), small)
    large = submit("large", ask("y" * 50), small)
    late = submit("late", ask("z"), small)
    step(batcher)
    assert batcher.stats().running == 1
    step(batcher, 40)
    assert ends == ["first", "large", "late"]
    assert large.generation(0) == engine.complete([ask("y" * 50)], small)[0]
    assert late.generation(0) == engine.complete([ask("z")], small)[0]


def test_a_long_request_runs_together_with_short_ones():
    engine = endless(max_position_embeddings=4096)
    batcher = Batcher(engine, max_num_seqs=9, kv_tokens=4096 + 8 * 32)
    long = batcher.submit(ask("a" * 96), SamplingParams(max_new_tokens=4000))
    short = [batcher.submit(ask(f"short {number}"), NEW) for number in range(8)]
    step(batcher)
    assert batcher.stats().running == 9
    step(batcher, 15)
    assert batcher.stats().running == 1
    long.cancel()
    step(batcher)
    assert [handle.generation(0) for handle in short] == [
        engine.complete([ask(f"short {number}")], NEW)[0] for number in range(8)
    ]


def test_kv_tokens_is_the_budget_of_all_rows(engine):
    batcher = Batcher(engine, max_num_seqs=4, kv_tokens=320)
    pool = batcher._scheduler.pool
    assert batcher.stats().kv_tokens_total == pool.tokens == 320
    assert (len(pool.rows), pool.max_length) == (4, 320)
    context = engine.model.config.context_length
    assert Batcher(engine, max_num_seqs=4).stats().kv_tokens_total == 4 * context
    assert Batcher(engine, max_num_seqs=2, kv_tokens=10 * context)._scheduler.pool.max_length == context


def test_equal_images_from_different_sources_give_equal_answers(engine, tmp_path):
    (tmp_path / "a.png").write_bytes(tiny.image(1).source)
    with Batcher(engine) as batcher:
        texts = []
        for image in (tiny.image(1), Image(tmp_path / "a.png")):
            messages = [{"role": "user", "content": [{"type": "image", "image": image.source}]}]
            texts.append(batcher.submit(messages, NEW).generation(30).text)
    assert texts[0] == texts[1]


def test_the_owner_with_the_fewest_running_requests_is_served_first(engine):
    batcher = Batcher(engine, max_num_seqs=2, max_queue=20)
    many = [batcher.submit(ask(f"many {number}"), NEW, owner="a") for number in range(6)]
    one = batcher.submit(ask("one"), NEW, owner="b")
    step(batcher)
    assert [request.owner for request in batcher._scheduler.running] == ["a", "b"]
    step(batcher, 100)
    assert all(handle.done for handle in (*many, one))
