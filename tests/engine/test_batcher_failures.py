"""What goes wrong with one request stays with it: refusals, cancellations, time limits, failures, and the end."""

import ctypes
import threading
import time

import pytest
import torch

from tests import tiny
from tests.engine.fixtures import QUESTIONS, ask, endless
from tests.engine.onnx_fixtures import onnx_engine
from tests.engine.test_batcher import NEW, by_hand
from vila.core.errors import (
    CancelledError,
    ClosedError,
    ConfigError,
    ContextOverflowError,
    DataError,
    DeadlineError,
    EngineDeadError,
    MediaError,
    NumericsError,
    QueueFullError,
    TemplateError,
)
from vila.core.types import Image, Message
from vila.engine.batcher import Batcher
from vila.engine.request import SamplingParams

LONG = SamplingParams(max_new_tokens=300)


@pytest.fixture(scope="module")
def engine():
    return endless()


@pytest.fixture
def batcher(engine):
    with Batcher(engine, max_num_seqs=3) as batcher:
        yield batcher


def is_well(engine, batcher):
    """Every question is answered right, twice."""
    for _ in range(2):
        tickets = [batcher.submit(messages, NEW) for messages in QUESTIONS]
        for ticket, messages in zip(tickets, QUESTIONS, strict=True):
            assert ticket.generation(30) == engine.complete([messages], NEW)[0]
    return True


def test_impossible_settings_are_refused(engine):
    with pytest.raises(
        ConfigError, match=r"4 problems\n.*max_num_seqs=0.*\n.*max_queue=0.*\n.*prefill_chunk=0.*\n.*kv_tokens=5"
    ):
        Batcher(engine, max_num_seqs=0, max_queue=0, prefill_chunk=0, kv_tokens=5)


def test_what_cannot_be_answered_is_refused_at_once(engine, batcher):
    with pytest.raises(ContextOverflowError, match="512"):
        batcher.submit(ask("x" * 600), NEW)
    with pytest.raises(DataError):
        batcher.submit([{"role": "nobody", "content": "x"}], NEW)
    with pytest.raises(TemplateError):
        batcher.submit([Message.of("assistant", "hello")], NEW)
    with pytest.raises(MediaError):
        batcher.submit([Message.of("user", Image(b"<html>"), "?")], NEW)
    assert batcher.stats().waiting == 0
    assert is_well(engine, batcher)


def test_what_never_fits_the_memory_is_refused_and_what_just_fits_is_answered(engine):
    with Batcher(engine, max_num_seqs=2, kv_tokens=64) as batcher:
        assert batcher.submit(ask("x" * 48), SamplingParams(max_new_tokens=17)).generation(30).prompt_tokens == 48
        message = "48 tokens .* 18.* 64; .*kv_tokens"
        with pytest.raises(ContextOverflowError, match=message):
            batcher.submit(ask("x" * 48), SamplingParams(max_new_tokens=18))


def test_a_full_queue_says_when_to_come_back(engine):
    batcher = Batcher(engine, max_num_seqs=1, max_queue=2)
    tickets = [batcher.submit(ask("x"), NEW) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests") as caught:
        batcher.submit(ask("x"), NEW)
    assert 1 <= caught.value.retry_after <= 60
    by_hand(batcher)
    tickets.append(batcher.submit(ask("x"), NEW))
    by_hand(batcher, 40)
    assert [ticket.done for ticket in tickets] == [True] * 3


def test_a_cancelled_request_ends_at_the_next_step_and_its_row_is_free(engine):
    batcher = Batcher(engine, max_num_seqs=2)
    heard = []
    running = batcher.submit(ask("x"), LONG, on_event=heard.append)
    other = batcher.submit(ask("y", 1), NEW)
    waiting = batcher.submit(ask("z"), NEW)
    late = batcher.submit(ask("later"), NEW)
    by_hand(batcher, 3)
    running.cancel()
    late.cancel()
    by_hand(batcher)
    assert isinstance(heard[-1], CancelledError)
    assert running.done and late.done
    with pytest.raises(CancelledError):
        late.generation(0)
    by_hand(batcher, 20)
    assert other.generation(0) == engine.complete([ask("y", 1)], NEW)[0]
    assert waiting.generation(0) == engine.complete([ask("z")], NEW)[0]
    stats = batcher.stats()
    assert (stats.finished, stats.cancelled, stats.failed, stats.kv_tokens_used) == (2, 2, 0, 0)


def test_a_request_cancelled_while_its_prompt_is_read_leaves_only_what_was_computed(engine):
    batcher = Batcher(engine, max_num_seqs=2, prefill_chunk=16)
    ticket = batcher.submit(ask("w" * 100, 1), NEW)
    by_hand(batcher, 2)
    ticket.cancel()
    again = batcher.submit(ask("w" * 100, 1), NEW)
    by_hand(batcher, 30)
    assert ticket.done
    assert again.cached_tokens == 32
    assert again.generation(0) == engine.complete([ask("w" * 100, 1)], NEW)[0]


def test_a_request_cancelled_in_the_middle_of_a_picture_is_gone_on_from_there(engine):
    messages = [Message.of("user", "what do you see here", tiny.image(5), "?")]
    batcher = Batcher(engine, max_num_seqs=2, prefill_chunk=22)
    ticket = batcher.submit(messages, NEW)
    by_hand(batcher)
    ticket.cancel()
    again = batcher.submit(messages, NEW)
    by_hand(batcher, 20)
    (start, count) = engine.processor.prompt(messages).runs[0]
    assert start < again.cached_tokens < start + count
    assert again.generation(0) == engine.complete([messages], NEW)[0]


def test_a_request_that_runs_out_of_time_says_so_whether_it_runs_or_waits(engine):
    batcher = Batcher(engine, max_num_seqs=1)
    tickets = [batcher.submit(ask("x"), LONG, timeout=0.02) for _ in range(2)]
    by_hand(batcher, 2)
    time.sleep(0.03)
    by_hand(batcher)
    for ticket in tickets:
        with pytest.raises(DeadlineError, match=r"0\.02 s"):
            ticket.generation(0)
    assert is_well_by_hand(engine, batcher)


def is_well_by_hand(engine, batcher):
    tickets = [batcher.submit(messages, NEW) for messages in QUESTIONS]
    by_hand(batcher, 200)
    assert [ticket.generation(0) for ticket in tickets] == [engine.complete([m], NEW)[0] for m in QUESTIONS]
    return True


def test_numbers_that_are_not_finite_end_their_own_request_and_do_not_stay_in_memory():
    engine = endless()
    poison = engine.processor.tokenizer("\x01")["input_ids"]
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[poison] = torch.nan
        # The tied head would say nan for every text.
        engine.model.language_model.lm_head.weight = torch.nn.Parameter(
            engine.model.get_input_embeddings().weight.nan_to_num(0)
        )
    with Batcher(engine, max_num_seqs=2) as batcher:
        for _ in range(3):
            bad = [batcher.submit(ask("poison \x01 in the middle"), NEW) for _ in range(2)]
            good = batcher.submit(ask("clean"), NEW)
            for ticket in bad:
                with pytest.raises(NumericsError, match="22 tokens"):
                    ticket.generation(30)
            assert good.generation(30) == engine.complete([ask("clean")], NEW)[0]
        assert is_well(engine, batcher)
        assert batcher.stats().failed == 6


def test_an_owner_that_fails_to_listen_ends_its_own_request_alone(engine, batcher, caplog):
    def deaf(event):
        raise RuntimeError("nobody is there")

    ticket = batcher.submit(ask("x"), LONG, on_event=deaf)
    assert is_well(engine, batcher)
    with pytest.raises(CancelledError):
        ticket.generation(30)
    assert "on_event failed" in caplog.text


def test_a_choice_that_fails_ends_its_own_request_alone(engine, batcher, monkeypatch, caplog):
    choose = batcher._scheduler._sample_token

    def broken(request, likeliest, logits):
        if request.sampling.seed == 13:
            raise ValueError("no such token")
        return choose(request, likeliest, logits)

    monkeypatch.setattr(batcher._scheduler, "_sample_token", broken)
    ticket = batcher.submit(ask("x"), SamplingParams(seed=13))
    assert is_well(engine, batcher)
    with pytest.raises(ValueError, match="no such token"):
        ticket.generation(30)


def questions_of(engine, batcher, culprit, wrong=RuntimeError):
    """Asks every question and the culprit; all questions are answered as alone, and the culprit ends with `wrong`."""
    tickets = [batcher.submit(messages, NEW) for messages in QUESTIONS[:4]]
    bad = batcher.submit(culprit, NEW)
    tickets += [batcher.submit(messages, NEW) for messages in QUESTIONS[4:]]
    for ticket, messages in zip(tickets, QUESTIONS, strict=True):
        assert ticket.generation(30) == engine.complete([messages], NEW)[0]
    with pytest.raises(wrong):
        bad.generation(30)
    assert batcher.stats().failed == 1
    assert is_well(engine, batcher)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError, ValueError])
def test_a_pass_that_fails_for_one_request_ends_that_request_alone(monkeypatch, kind, backend):
    engine = endless() if backend == "torch" else onnx_engine()
    with Batcher(engine, max_num_seqs=3) as batcher:
        forward = batcher._run.forward
        culprit = ask("culprit" * 3)

        def broken(steps, pieces, ends):
            run = batcher._scheduler.running
            if any(len(r.keys) == 21 and r.own_row.row in {p.row for p, _ in (*steps, *pieces)} for r in run):
                raise kind("out of memory")
            return forward(steps, pieces, ends)

        monkeypatch.setattr(batcher._run, "forward", broken)
        questions_of(engine, batcher, culprit, kind)


def test_a_step_that_fails_whoever_runs_ends_those_that_run_and_the_batcher_goes_on(engine, batcher, monkeypatch):
    forward, calls = batcher._run.forward, []

    def broken(*arguments):
        calls.append(1)
        if 4 <= len(calls) <= 7:
            raise RuntimeError("out of memory, say")
        return forward(*arguments)

    monkeypatch.setattr(batcher._run, "forward", broken)
    tickets = [batcher.submit(ask(str(number)), LONG) for number in range(3)]
    waiting = batcher.submit(ask("z"), NEW)
    for ticket in tickets:
        with pytest.raises(RuntimeError, match="out of memory, say"):
            ticket.generation(30)
    assert waiting.generation(30) == engine.complete([ask("z")], NEW)[0]
    assert is_well(engine, batcher)
    assert batcher.stats().failed == 3


def test_an_image_that_the_tower_fails_on_ends_its_own_request_alone(monkeypatch):
    engine = endless()
    with Batcher(engine, max_num_seqs=4) as batcher:
        encode = batcher._run.encode
        bad = tiny.image(9).key()

        def broken(pictures, pixels):
            if bad in {picture.key for picture in pictures}:
                raise torch.OutOfMemoryError("out of memory at this image")
            encode(pictures, pixels)

        monkeypatch.setattr(batcher._run, "encode", broken)
        questions_of(engine, batcher, ask("bad", 9, 1), torch.OutOfMemoryError)


@pytest.mark.parametrize("pixels", [torch.zeros(3, 1000, 3), torch.zeros(1, 8, 8), torch.zeros(0)])
def test_an_image_tensor_of_a_wrong_shape_ends_its_own_request_alone(monkeypatch, pixels):
    engine = endless()
    with Batcher(engine, max_num_seqs=4) as batcher:
        proper = batcher._scheduler._pixels
        bad = tiny.image(9).key()
        monkeypatch.setattr(
            batcher._scheduler, "_pixels", lambda picture, r: pixels if picture.key == bad else proper(picture, r)
        )
        questions_of(engine, batcher, ask("bad", 1, 9), Exception)


def test_an_image_that_was_forgotten_and_cannot_be_read_again_ends_its_own_request_alone(monkeypatch):
    engine = endless()
    with Batcher(engine, max_num_seqs=4) as batcher:
        bad = tiny.image(9).key()
        proper = batcher._scheduler._pixels

        def gone(picture, request):
            if picture.key == bad:
                raise MediaError("the file is gone")
            return proper(picture, request)

        monkeypatch.setattr(batcher._scheduler, "_pixels", gone)
        questions_of(engine, batcher, ask("bad", 9), MediaError)


def test_a_prompt_that_cannot_be_embedded_ends_its_own_request_alone(monkeypatch):
    engine = endless()
    with Batcher(engine, max_num_seqs=4) as batcher:
        embed = batcher._run.embed

        def broken(prompt, start):
            if len(prompt.ids) == 7:
                raise IndexError("no such token")
            return embed(prompt, start)

        monkeypatch.setattr(batcher._run, "embed", broken)
        questions_of(engine, batcher, ask("culprit"), IndexError)


def kill(thread):
    """Raise SystemExit in a thread, which ends it."""
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)) == 1


def test_when_the_thread_is_killed_nobody_waits_for_ever(engine):
    batcher = Batcher(engine, max_num_seqs=1, max_queue=4)
    batcher.start()
    assert batcher.is_alive
    tickets = [batcher.submit(ask("x"), LONG) for _ in range(3)]
    kill(batcher._thread)
    for ticket in tickets:
        with pytest.raises(EngineDeadError):
            ticket.generation(30)
    batcher._thread.join(30)
    assert not batcher.is_alive
    with pytest.raises(EngineDeadError):
        batcher.submit(ask("x"), NEW)
    assert batcher.drain(1)
    batcher.close()


def test_an_error_of_the_device_ends_the_thread(engine, monkeypatch):
    batcher = Batcher(engine, max_num_seqs=2)

    def broken(*arguments):
        raise torch.AcceleratorError("an illegal memory access was encountered", 700)

    monkeypatch.setattr(batcher._run, "forward", broken)
    batcher.start()
    tickets = [batcher.submit(ask(text), LONG) for text in "abc"]
    for ticket in tickets:
        with pytest.raises(EngineDeadError):
            ticket.generation(30)
    assert not batcher.is_alive


def test_a_row_that_cannot_be_given_ends_the_request_that_wanted_it(engine, batcher, monkeypatch):
    place = batcher._rows.allocate

    def broken(keys, columns):
        if len(keys) == 7:
            raise RuntimeError("no memory for another division")
        return place(keys, columns)

    monkeypatch.setattr(batcher._rows, "allocate", broken)
    bad = batcher.submit(ask("culprit"), NEW)
    with pytest.raises(RuntimeError):
        bad.generation(30)
    assert is_well(engine, batcher)


def test_draining_finishes_what_is_there_and_takes_nothing_new(engine):
    with Batcher(engine, max_num_seqs=2) as batcher:
        tickets = [batcher.submit(messages, NEW) for messages in QUESTIONS]
        assert batcher.drain(30)
        assert [ticket.done for ticket in tickets] == [True] * len(QUESTIONS)
        with pytest.raises(ClosedError):
            batcher.submit(ask("x"), NEW)


def test_draining_gives_up_after_its_time_and_closing_ends_what_is_left(engine):
    batcher = Batcher(engine, max_num_seqs=1)
    tickets = [batcher.submit(ask("x"), NEW) for _ in range(2)]
    assert not batcher.drain(0.01)
    batcher.close()
    for ticket in tickets:
        with pytest.raises(ClosedError, match="closed"):
            ticket.generation(0)
    batcher.close()


def test_closing_in_the_middle_ends_running_requests(engine):
    heard = threading.Event()
    with Batcher(engine, max_num_seqs=2) as batcher:
        ticket = batcher.submit(ask("x"), LONG, on_event=lambda event: heard.set())
        assert heard.wait(30)
    assert ticket.done
    assert batcher._thread is not None and not batcher._thread.is_alive()


def test_a_model_that_attends_otherwise_is_refused():
    engine = endless()
    for block in engine.model.get_decoder().layers:
        block.self_attn.config = tiny.text_config("llama", attn_implementation="eager")
    with pytest.raises(ConfigError, match="self_attn.*'eager'.*'sdpa'"):
        Batcher(engine)
