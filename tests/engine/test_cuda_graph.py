"""Steps at fixed addresses give the answers of steps that take memory as they go."""

from itertools import zip_longest

import pytest
import torch

from tests.engine.fixtures import MODELS, QUESTIONS, ask, endless
from vila.core.types import Message
from vila.engine.cuda_graph_step import round_up, row_count
from vila.engine.engine import Engine
from vila.engine.prefix_cache import DEFAULT_BYTES

DRAWN = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 50, "repetition_penalty": 1.3, "seed": 3}


def captured(engine, **options):
    other = Engine(engine.model, engine.processor, cuda_graph=True, **options)
    other._stop_ids = engine._stop_ids
    return other


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    engine = endless(request.param)
    return engine, captured(engine)


def test_greedy_answers_are_equal(pair):
    plain, static = (engine.complete(QUESTIONS, max_new_tokens=12, logprobs=2) for engine in pair)
    assert [answer.ids for answer in static] == [answer.ids for answer in plain]
    for one, other in zip(static, plain, strict=True):
        assert [step.logprob for step in one.logprobs] == pytest.approx([s.logprob for s in other.logprobs], abs=1e-4)


def test_drawn_answers_are_equal(pair):
    plain, static = (engine.complete(QUESTIONS, **DRAWN) for engine in pair)
    assert static == plain


def test_answers_longer_than_a_bucket_are_equal(pair, monkeypatch):
    monkeypatch.setattr("vila.engine.cuda_graph_step._BUCKET", 16)
    plain, static = (engine.complete([ask("one?", 1), ask("x")], max_new_tokens=50) for engine in pair)
    assert static == plain


def test_rows_that_end_leave_the_others_as_they_are(pair):
    plain, static = pair
    free = plain.complete(QUESTIONS, max_new_tokens=12)
    # One ends at each of many steps, so that the rows move to smaller steps several times.
    stops = frozenset(answer.ids[1 + index] for index, answer in enumerate(free[:8]))
    for engine in pair:
        engine._stop_ids = stops
    try:
        assert static.complete(QUESTIONS, max_new_tokens=12) == plain.complete(QUESTIONS, max_new_tokens=12)
        assert len({len(answer.ids) for answer in static.complete(QUESTIONS, max_new_tokens=12)}) > 3
    finally:
        for engine in pair:
            engine._stop_ids = frozenset()


def test_a_chat_and_its_lookups_go_on_from_what_was_kept(pair):
    plain = pair[0]
    static = captured(plain, prefix_cache_bytes=DEFAULT_BYTES)
    for lookup in (0, 4):
        talk = ask("one?", 1)
        for _ in range(3):
            answer = static.complete([talk], max_new_tokens=10, prompt_lookup_tokens=lookup)[0]
            assert answer.ids == plain.complete([talk], max_new_tokens=10)[0].ids
            talk = [*talk, Message.of("assistant", answer.text), *ask("again?")]
    assert static.prefix_cache.reused_tokens > 50


def test_two_streams_at_once_have_a_step_each(pair):
    plain, static = pair
    streams = [static.stream(ask(text), max_new_tokens=8) for text in ("one", "another")]
    turns = zip_longest(*streams)
    texts = ["".join(event.text for event in events if event) for events in zip(*turns, strict=True)]
    assert [text.strip() for text in texts] == [plain.generate(ask(t), max_new_tokens=8) for t in ("one", "another")]


def test_the_next_run_takes_the_same_buffers():
    static = captured(endless())
    static.complete([ask("one?", 1)], max_new_tokens=8)
    (step,) = static._steps._free
    addresses = [buffer.data_ptr() for buffer in (*step.keys, *step.values, step.ids_B, step.places_BC)]
    taken = step.steps
    static.complete([ask("another one?", 2)], max_new_tokens=8)
    assert static._steps._free == [step]
    assert step.steps == taken + 7
    assert [buffer.data_ptr() for buffer in (*step.keys, *step.values, step.ids_B, step.places_BC)] == addresses
    static.complete([ask("x" * 300)], max_new_tokens=8)
    assert static._steps._free[0].columns == 512


def test_a_step_reads_the_filled_part_alone():
    static = captured(endless())
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, value, **options):
        seen.append(key.shape[2])
        return real(query, key, value, **options)

    static.complete([ask("x" * 250)], max_new_tokens=2)
    (step,) = static._steps._free
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
        static.complete([ask("x" * 250)], max_new_tokens=10)
    assert {count for count in seen if count in (256, 512)} == {256, 512}
    assert step.columns == 256


def test_rows_and_columns_are_rounded_up():
    assert [row_count(rows) for rows in (1, 2, 3, 4, 5, 9)] == [1, 2, 4, 4, 8, 16]
    assert [round_up(count, 256) for count in (1, 256, 257)] == [256, 256, 512]


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_on_cuda_captured_steps_give_the_answers_of_the_cpu(name):
    plain = endless(name)
    wanted = plain.complete(QUESTIONS, max_new_tokens=12)
    plain.model.to("cuda")
    static = captured(plain, prefix_cache_bytes=DEFAULT_BYTES)
    assert static.complete(QUESTIONS, max_new_tokens=12) == wanted
    assert static.complete(QUESTIONS, max_new_tokens=12) == wanted
    assert static._steps._free[-1].captures == 1
    for messages, answer in zip(QUESTIONS, wanted, strict=True):
        assert static.complete([messages], max_new_tokens=12)[0].ids == answer.ids


@pytest.mark.gpu
def test_on_cuda_a_step_waits_for_nothing():
    engine = captured(endless())
    engine.model.to("cuda")
    engine.complete(QUESTIONS[:4], max_new_tokens=4)
    (step,) = engine._steps._free
    rows = torch.arange(step.rows, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            step.run(step.ids_B.clone(), rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
