"""Requests that run together: each gets the answer that the engine gives to it alone."""

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
from vila.engine.request import SamplingParams

NEW = SamplingParams(max_new_tokens=12)


@pytest.fixture(
    scope="module", params=[(name, kind) for name in MODELS for kind in ("torch", "fast_decoder", "onnx")], ids=str
)
def model_engine(request):
    name, kind = request.param
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        from tests.engine.onnx_fixtures import onnx_engine

        return onnx_engine(name)
    engine = endless(name)
    if kind == "torch":
        return engine
    fast_decoder = Engine(engine.model, engine.processor, fast_decoder=FastDecoder(engine.model))
    fast_decoder._stop_ids = frozenset()
    return fast_decoder


@pytest.fixture(scope="module")
def engine():
    return endless()


def by_hand(batcher, steps=1):
    """Steps of a batcher that was not started, one by one."""
    with torch.inference_mode():
        for _ in range(steps):
            batcher._admit()
            batcher._scheduler.step()


def same(found, wanted):
    """Equal but for the last digits of log-probabilities."""
    assert replace(found, logprobs=()) == replace(wanted, logprobs=())
    assert [step.id for step in found.logprobs] == [step.id for step in wanted.logprobs]
    for one, other in zip(found.logprobs, wanted.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert dict(one.top) == pytest.approx(dict(other.top), abs=1e-4)


@pytest.mark.parametrize(
    "memory",
    [
        {"max_num_seqs": 8},
        {"max_num_seqs": 3, "kv_tokens": 200, "prefill_chunk": 16},
        {"max_num_seqs": 2, "kv_tokens": 64, "prefill_chunk": 5},
    ],
    ids=["roomy", "narrow", "narrowest"],
)
def test_greedy_answers_are_those_of_the_engine_in_whatever_order_requests_come(model_engine, memory):
    wanted = [model_engine.complete([messages], NEW)[0] for messages in QUESTIONS]
    order = list(range(len(QUESTIONS))) * 2
    random.Random(len(memory)).shuffle(order)
    with Batcher(model_engine, **memory) as batcher:
        tickets = [(index, batcher.submit(QUESTIONS[index], NEW)) for index in order]
        for index, ticket in tickets:
            assert ticket.generation(30) == wanted[index]
            assert ticket.prompt_tokens == wanted[index].prompt_tokens
    stats = batcher.stats()
    assert (stats.finished, stats.kv_tokens_used, stats.running, stats.waiting) == (len(order), 0, 0, 0)
    assert stats.new_tokens == 12 * len(order)
    # The engine on the same model is left as it was.
    assert [answer.ids for answer in model_engine.complete(QUESTIONS, NEW)] == [answer.ids for answer in wanted]


SAMPLINGS = [
    NEW,
    SamplingParams(max_new_tokens=20, temperature=1.5, seed=3),
    SamplingParams(max_new_tokens=17, temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, seed=4, logprobs=2),
    SamplingParams(max_new_tokens=9, repetition_penalty=1.4, logprobs=3),
    SamplingParams(max_new_tokens=25, temperature=2.0, stop=("e", "\n"), seed=1),
    SamplingParams(max_new_tokens=1),
]


def test_every_request_has_its_own_sampling_and_draws_as_if_it_were_alone(engine):
    pairs = [(messages, sampling) for messages in QUESTIONS[:5] for sampling in SAMPLINGS]
    random.Random(0).shuffle(pairs)
    with Batcher(engine, max_num_seqs=5) as batcher:
        tickets = [batcher.submit(messages, sampling) for messages, sampling in pairs]
        for ticket, (messages, sampling) in zip(tickets, pairs, strict=True):
            same(ticket.generation(30), engine.complete([messages], sampling)[0])


def test_pieces_of_an_answer_joined_are_the_whole(engine):
    heard = []
    with Batcher(engine, max_num_seqs=3) as batcher:
        tickets = [batcher.submit(ask("x"), SAMPLINGS[4], on_event=heard.append), batcher.submit(ask("y", 1), NEW)]
        for ticket in tickets:
            events = list(ticket.events())
            answer = ticket.generation()
            assert "".join(event.text for event in events).strip() == answer.text
            assert [event.finish for event in events] == [None] * (len(events) - 1) + [answer.finish]
    assert "".join(event.text for event in heard).strip() == tickets[0].generation().text


def test_stop_tokens_end_an_answer_and_leave_the_others_alone():
    engine = endless()
    free = [engine.complete([messages], NEW)[0] for messages in QUESTIONS]
    engine._stop_ids = frozenset({free[1].ids[2], free[4].ids[5]})
    with Batcher(engine, max_num_seqs=4) as batcher:
        tickets = [batcher.submit(messages, NEW) for messages in QUESTIONS]
        answers = [ticket.generation(30) for ticket in tickets]
    assert answers == [engine.complete([messages], NEW)[0] for messages in QUESTIONS]
    assert answers[1].finish == "stop"


def test_a_prompt_seen_before_is_not_computed_again_and_a_picture_is_known_by_its_content(engine):
    question = "what is in the picture, please?"
    with Batcher(engine, max_num_seqs=4) as batcher:
        first = batcher.submit(ask(question, 1), NEW)
        wanted = first.generation(30)
        again = batcher.submit(ask(question, 1), NEW)
        assert again.generation(30) == wanted
        other = batcher.submit(ask(question, 2), NEW)
        assert other.generation(30) == engine.complete([ask(question, 2)], NEW)[0] != wanted
    assert [ticket.cached_tokens for ticket in (first, again, other)] == [0, first.prompt_tokens - 1, 0]
    assert batcher.stats().cached_prompt_tokens == again.cached_tokens


def test_requests_that_begin_alike_and_come_together_compute_their_beginning_once(engine):
    batcher = Batcher(engine, max_num_seqs=6)
    opening = "a long text that stands at the beginning of every question: "
    tickets = [batcher.submit(ask(opening + str(number), 1), NEW) for number in range(6)]
    by_hand(batcher, 20)
    assert all(ticket.done for ticket in tickets)
    assert [ticket.cached_tokens > len(opening) for ticket in tickets] == [False] + [True] * 5


def test_the_tower_sees_each_picture_once_and_none_whose_tokens_are_known(monkeypatch):
    engine = endless()
    counted = []
    look = engine.model.vision_features
    monkeypatch.setattr(engine.model, "vision_features", lambda pixels: counted.append(len(pixels)) or look(pixels))
    with Batcher(engine, max_num_seqs=4) as batcher:
        for _ in range(2):
            for ticket in [batcher.submit(messages, NEW) for messages in QUESTIONS]:
                ticket.generation(30)
        assert sum(counted) == 3
        engine._features._features.clear()
        chat = ask("a question that is long enough to share", 7)
        batcher.submit(chat, NEW).generation(30)
        engine._features._features.clear()
        batcher.submit(chat, NEW).generation(30)
    assert sum(counted) == 4


def test_an_answer_grows_at_every_step_while_a_long_prompt_is_read_piece_by_piece(engine):
    batcher = Batcher(engine, max_num_seqs=4, prefill_chunk=16)
    running = batcher.submit(ask("short"), SamplingParams(max_new_tokens=100))
    by_hand(batcher, 3)
    known = len(running._answer.ids)
    widths = []
    forward = batcher._run.forward

    def watched(steps, pieces, ends):
        widths.append(sum(place.count for place, _ in pieces))
        return forward(steps, pieces, ends)

    batcher._run.forward = watched
    long = batcher.submit(ask("long " * 40, 1, 2), NEW)
    steps = 0
    while not long._answer.ids:
        by_hand(batcher)
        steps += 1
    assert len(running._answer.ids) == known + steps
    assert max(widths) <= 16
    assert steps >= long.prompt_tokens // 16
    by_hand(batcher, 12)
    assert long.generation(0) == engine.complete([ask("long " * 40, 1, 2)], NEW)[0]


def test_pictures_do_not_hold_up_running_answers_for_more_than_a_chunk(monkeypatch):
    engine = endless()
    batcher = Batcher(engine, max_num_seqs=4, prefill_chunk=8)
    running = batcher.submit(ask("short"), SamplingParams(max_new_tokens=100))
    by_hand(batcher, 3)
    counted = []
    look = engine.model.vision_features
    monkeypatch.setattr(engine.model, "vision_features", lambda pixels: counted.append(len(pixels)) or look(pixels))
    ticket = batcher.submit(ask("five", 1, 2, 3, 4, 5), NEW)
    known, steps = len(running._answer.ids), 0
    while not ticket._answer.ids:
        by_hand(batcher)
        steps += 1
    assert counted == [2, 2, 1]  # four slots each, and eight tokens a step
    assert len(running._answer.ids) == known + steps


def test_one_request_at_a_time_waits_for_memory_and_nobody_overtakes_it(engine):
    batcher = Batcher(engine, max_num_seqs=4, kv_tokens=64)
    ends = []
    small = SamplingParams(max_new_tokens=8)

    def submit(name, messages, sampling):
        return batcher.submit(messages, sampling, on_event=lambda event: event.finish and ends.append(name))

    submit("first", ask("x"), small)
    large = submit("large", ask("y" * 40), small)
    late = submit("late", ask("z"), small)
    by_hand(batcher)
    assert batcher.stats().running == 1
    by_hand(batcher, 40)
    assert ends == ["first", "large", "late"]
    assert large.generation(0) == engine.complete([ask("y" * 40)], small)[0]
    assert late.generation(0) == engine.complete([ask("z")], small)[0]


def test_memory_is_what_was_asked_for(engine):
    batcher = Batcher(engine, max_num_seqs=4, kv_tokens=320)
    layers, heads, width = 2, 2, 8
    held = sum(memory.nbytes for memory in batcher._run.pool._memory)
    assert held == 320 * layers * 2 * heads * width * 4
    assert batcher.stats().kv_tokens_total == 320
    assert Batcher(engine, max_num_seqs=4).stats().kv_tokens_total == 4 * engine.model.config.context_length


def test_a_picture_may_be_any_form_of_the_same_content(engine, tmp_path):
    (tmp_path / "a.png").write_bytes(tiny.image(1).source)
    with Batcher(engine) as batcher:
        texts = []
        for image in (tiny.image(1), Image(tmp_path / "a.png")):
            messages = [{"role": "user", "content": [{"type": "image", "image": image.source}]}]
            texts.append(batcher.submit(messages, NEW).generation(30).text)
    assert texts[0] == texts[1]


def test_of_the_waiting_requests_those_of_the_owner_with_the_fewest_running_come_first(engine):
    batcher = Batcher(engine, max_num_seqs=2, max_queue=20)
    many = [batcher.submit(ask(f"many {number}"), NEW, owner="a") for number in range(6)]
    one = batcher.submit(ask("one"), NEW, owner="b")
    by_hand(batcher)
    assert [request.owner for request in batcher._scheduler.running] == ["a", "b"]
    by_hand(batcher, 200)
    assert all(ticket.done for ticket in (*many, one))
