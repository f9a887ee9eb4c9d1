"""Decode steps at fixed addresses give the answers of ordinary steps."""

from itertools import zip_longest

import pytest
import torch

from tests.engine.fixtures import MODELS, QUESTIONS, ask, endless
from vila.core.types import Message
from vila.engine.batcher import Batcher
from vila.engine.engine import Engine
from vila.engine.runner_cuda_graph import round_up, row_bucket
from vila.engine.sampling_params import SamplingParams

SAMPLED = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 50, "repetition_penalty": 1.3, "seed": 3}


def with_graphs(engine, **options):
    other = Engine(engine.model, engine.processor, cuda_graph=True, **options)
    other._stop_ids = engine._stop_ids
    return other


def runner_of(engine):
    return engine._offline.scheduler.runner


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    engine = endless(request.param)
    return engine, with_graphs(engine)


def test_greedy_answers_are_equal(pair):
    plain, static = (engine.complete(QUESTIONS, max_new_tokens=12, logprobs=2) for engine in pair)
    assert [answer.ids for answer in static] == [answer.ids for answer in plain]
    for one, other in zip(static, plain, strict=True):
        assert [step.logprob for step in one.logprobs] == pytest.approx([s.logprob for s in other.logprobs], abs=1e-4)
    assert runner_of(pair[1]).steps > 0


def test_sampled_answers_are_equal(pair):
    plain, static = (engine.complete(QUESTIONS, **SAMPLED) for engine in pair)
    assert static == plain


def test_answers_longer_than_a_bucket_are_equal(pair, monkeypatch):
    monkeypatch.setattr("vila.engine.runner_cuda_graph._BUCKET", 16)
    plain, static = (engine.complete([ask("one?", 1), ask("x")], max_new_tokens=50) for engine in pair)
    assert static == plain


def test_answers_that_end_leave_the_others_unchanged(pair):
    plain, static = pair
    free = plain.complete(QUESTIONS, max_new_tokens=12)
    # One ends at each of many steps, so that rows between running ones become unused.
    stops = frozenset(answer.ids[1 + index] for index, answer in enumerate(free[:8]))
    for engine in pair:
        engine._stop_ids = stops
    try:
        assert static.complete(QUESTIONS, max_new_tokens=12) == plain.complete(QUESTIONS, max_new_tokens=12)
        assert len({len(answer.ids) for answer in static.complete(QUESTIONS, max_new_tokens=12)}) > 3
    finally:
        for engine in pair:
            engine._stop_ids = frozenset()


def test_conversation_with_prompt_lookup_continues_from_cached_prefix(pair):
    plain = pair[0]
    static = with_graphs(plain, prefix_caching=True)
    for lookup in (0, 4):
        messages = ask("one?", 1)
        for _ in range(3):
            answer = static.complete([messages], max_new_tokens=10, prompt_lookup_tokens=lookup)[0]
            assert answer.ids == plain.complete([messages], max_new_tokens=10)[0].ids
            messages = [*messages, Message.of("assistant", answer.text), *ask("again?")]
    assert static._offline.scheduler.counts.cached_prompt_tokens > 50


def test_two_streams_at_once_are_equal_to_streams_alone(pair):
    plain, static = pair
    streams = [static.stream(ask(text), max_new_tokens=8) for text in ("one", "another")]
    steps = zip_longest(*streams)
    texts = ["".join(event.text for event in events if event) for events in zip(*steps, strict=True)]
    assert [text.strip() for text in texts] == [plain.generate(ask(t), max_new_tokens=8) for t in ("one", "another")]


def test_batcher_uses_fixed_addresses_beside_prefills(pair):
    plain, static = pair
    sampling = SamplingParams(max_new_tokens=12)
    with Batcher(static, max_num_seqs=3, prefill_chunk=8) as batcher:
        handles = [batcher.submit(messages, sampling) for messages in QUESTIONS]
        found = [handle.generation(30) for handle in handles]
        assert batcher._scheduler.runner.steps > 0
    assert found == [plain.complete([messages], sampling)[0] for messages in QUESTIONS]


def test_unused_rows_keep_their_content(pair):
    static = with_graphs(pair[0], prefix_caching=True)
    first = static.complete([ask("one?", 1)], max_new_tokens=4)
    pool = static._offline.scheduler.pool
    row = next(row for row in pool.rows if row.content)
    length = len(row.content)
    before = [both[:, row.row, :, :length].clone() for both in pool.cache.buffers]
    static.complete([ask("x"), ask("y")], max_new_tokens=6)
    assert all(
        torch.equal(both[:, row.row, :, :length], kept) for both, kept in zip(pool.cache.buffers, before, strict=True)
    )
    assert static.complete([ask("one?", 1)], max_new_tokens=4) == first


def test_step_reads_the_filled_columns_only(pair, monkeypatch):
    static = with_graphs(pair[0])
    widths = set()
    real = torch.nn.functional.scaled_dot_product_attention

    def record(query, key, value, **options):
        if query.shape[2] != key.shape[2]:
            widths.add(key.shape[2])
        return real(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    monkeypatch.setattr("vila.engine.runner_cuda_graph._BUCKET", 64)
    static.complete([ask("x" * 20)], max_new_tokens=60)
    assert {64, 128} <= widths
    assert max(widths) == 128


def test_buckets_are_rounded_up():
    assert [row_bucket(rows) for rows in (1, 2, 3, 4, 5, 9)] == [1, 2, 4, 4, 8, 16]
    assert [round_up(count, 256) for count in (1, 256, 257)] == [256, 256, 512]


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_captured_steps_on_cuda_give_the_answers_of_the_cpu(name):
    plain = endless(name)
    wanted = plain.complete(QUESTIONS, max_new_tokens=12)
    plain.model.to("cuda")
    static = with_graphs(plain, prefix_caching=True)
    assert static.complete(QUESTIONS, max_new_tokens=12) == wanted
    captures = runner_of(static).captures
    assert static.complete(QUESTIONS, max_new_tokens=12) == wanted
    assert runner_of(static).captures == captures
    for messages, answer in zip(QUESTIONS, wanted, strict=True):
        assert static.complete([messages], max_new_tokens=12)[0].ids == answer.ids


@pytest.mark.gpu
def test_replay_on_cuda_does_not_synchronize():
    engine = endless()
    engine.model.to("cuda")
    static = with_graphs(engine)
    static.complete(QUESTIONS[:4], max_new_tokens=4)
    runner = runner_of(static)
    rows, reads = next(iter(runner._graphs))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            runner.replay(rows, reads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
