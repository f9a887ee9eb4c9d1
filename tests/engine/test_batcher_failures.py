"""Failures of a batcher: rejection, cancellation, deadlines and errors end single requests; also drain and close."""

import ctypes
import threading
import time

import pytest
import torch

from tests import tiny
from tests.engine.fixtures import QUESTIONS, ask, endless
from tests.engine.onnx_fixtures import onnx_engine
from tests.engine.test_batcher import NEW, step
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
from vila.engine.sampler import Sampler
from vila.engine.sampling_params import SamplingParams

LONG = SamplingParams(max_new_tokens=300)
QUESTIONS = QUESTIONS[:8]


@pytest.fixture(scope="module")
def engine():
    return endless()


@pytest.fixture(scope="module")
def answers(engine):
    """The answers to QUESTIONS, each computed alone; the same for all engines with the weights of `endless()`."""
    return [engine.complete([messages], NEW)[0] for messages in QUESTIONS]


@pytest.fixture
def batcher(engine):
    with Batcher(engine, max_num_seqs=3) as batcher:
        yield batcher


def assert_answers(batcher, answers):
    """Ask every question and compare the answers."""
    handles = [batcher.submit(messages, NEW) for messages in QUESTIONS]
    if batcher._thread is None:
        step(batcher, 100)
    assert [handle.generation(30) for handle in handles] == answers


def test_invalid_settings_are_rejected_together(engine):
    with pytest.raises(ConfigError) as caught:
        Batcher(engine, max_num_seqs=0, max_queue=0, prefill_chunk=0, kv_tokens=5)
    for name in ("max_num_seqs=0", "max_queue=0", "prefill_chunk=0", "kv_tokens=5"):
        assert name in str(caught.value)


def test_invalid_requests_are_rejected_at_submission(batcher, answers):
    for error, messages in (
        (ContextOverflowError, ask("x" * 600)),
        (DataError, [{"role": "nobody", "content": "x"}]),
        (TemplateError, [Message.of("assistant", "hello")]),
        (MediaError, [Message.of("user", Image(b"<html>"), "?")]),
    ):
        with pytest.raises(error):
            batcher.submit(messages, NEW)
    assert batcher.stats().waiting == 0
    assert_answers(batcher, answers)


def test_a_request_larger_than_the_kv_cache_is_rejected(engine):
    with Batcher(engine, max_num_seqs=2, kv_tokens=64) as batcher:
        assert batcher.submit(ask("x" * 48), SamplingParams(max_new_tokens=17)).generation(30).prompt_tokens == 48
        with pytest.raises(ContextOverflowError) as caught:
            batcher.submit(ask("x" * 48), SamplingParams(max_new_tokens=18))
    assert {"48", "18", "64"} <= set(str(caught.value).replace(",", " ").replace(";", " ").split())


def test_a_full_queue_rejects_requests_with_a_waiting_time(engine):
    batcher = Batcher(engine, max_num_seqs=1, max_queue=2)
    handles = [batcher.submit(ask("x"), NEW) for _ in range(2)]
    with pytest.raises(QueueFullError) as caught:
        batcher.submit(ask("x"), NEW)
    assert 1 <= caught.value.retry_after <= 60
    step(batcher)
    handles.append(batcher.submit(ask("x"), NEW))
    step(batcher, 40)
    assert [handle.done for handle in handles] == [True] * 3


def test_a_cancelled_request_ends_at_the_next_step_and_frees_its_row(engine):
    batcher = Batcher(engine, max_num_seqs=2)
    received = []
    running = batcher.submit(ask("x"), LONG, on_event=received.append)
    other = batcher.submit(ask("y", 1), NEW)
    waiting = batcher.submit(ask("z"), NEW)
    late = batcher.submit(ask("later"), NEW)
    step(batcher, 3)
    running.cancel()
    late.cancel()
    step(batcher)
    assert isinstance(received[-1], CancelledError)
    assert running.done and late.done
    with pytest.raises(CancelledError):
        late.generation(0)
    step(batcher, 20)
    assert other.generation(0) == engine.complete([ask("y", 1)], NEW)[0]
    assert waiting.generation(0) == engine.complete([ask("z")], NEW)[0]
    stats = batcher.stats()
    assert (stats.finished, stats.cancelled, stats.failed, stats.kv_tokens_used) == (2, 2, 0, 0)


def test_the_computed_part_of_a_cancelled_prefill_is_reused(engine):
    batcher = Batcher(engine, max_num_seqs=2, prefill_chunk=16)
    handle = batcher.submit(ask("w" * 100, 1), NEW)
    step(batcher, 2)
    handle.cancel()
    again = batcher.submit(ask("w" * 100, 1), NEW)
    step(batcher, 30)
    assert handle.done
    assert again.cached_tokens == 32
    assert again.generation(0) == engine.complete([ask("w" * 100, 1)], NEW)[0]


def test_a_prefill_cancelled_inside_an_image_is_continued_there(engine):
    messages = [Message.of("user", "what do you see here", tiny.image(5), "?")]
    batcher = Batcher(engine, max_num_seqs=2, prefill_chunk=22)
    handle = batcher.submit(messages, NEW)
    step(batcher)
    handle.cancel()
    again = batcher.submit(messages, NEW)
    step(batcher, 20)
    start, count = engine.processor.prompt(messages).runs[0]
    assert start < again.cached_tokens < start + count
    assert again.generation(0) == engine.complete([messages], NEW)[0]


def test_a_deadline_ends_running_and_waiting_requests(engine, answers):
    batcher = Batcher(engine, max_num_seqs=1)
    handles = [batcher.submit(ask("x"), LONG, timeout=0.02) for _ in range(2)]
    step(batcher, 2)
    time.sleep(0.03)
    step(batcher)
    for handle in handles:
        with pytest.raises(DeadlineError):
            handle.generation(0)
    assert (batcher.stats().cancelled, batcher.stats().running) == (2, 0)
    assert_answers(batcher, answers)


def test_logits_that_are_not_finite_end_only_their_request():
    engine = endless()
    poison = engine.processor.tokenizer("\x01")["input_ids"]
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[poison] = torch.nan
        # With the tied head the logits of every text would contain NaN.
        engine.model.language_model.lm_head.weight = torch.nn.Parameter(
            engine.model.get_input_embeddings().weight.nan_to_num(0)
        )
    wanted = engine.complete(QUESTIONS, NEW)
    with Batcher(engine, max_num_seqs=2) as batcher:
        for _ in range(3):
            bad = [batcher.submit(ask("poison \x01 in the middle"), NEW) for _ in range(2)]
            good = batcher.submit(QUESTIONS[0], NEW)
            for handle in bad:
                with pytest.raises(NumericsError):
                    handle.generation(30)
            assert good.generation(30) == wanted[0]
        assert_answers(batcher, wanted)
        assert batcher.stats().failed == 6
    assert all(buffer.isfinite().all() for buffer in batcher._scheduler.pool.cache.buffers)


def test_an_error_in_on_event_cancels_only_its_request(batcher, answers):
    def fail(event):
        raise RuntimeError("the client is gone")

    handle = batcher.submit(ask("x"), LONG, on_event=fail)
    assert_answers(batcher, answers)
    with pytest.raises(CancelledError):
        handle.generation(30)


def test_an_error_of_the_sampler_ends_only_its_request(batcher, answers, monkeypatch):
    sample = Sampler.sample

    def broken(self, logits, greedy):
        if self.sampling.seed == 13:
            raise ValueError("no such token")
        return sample(self, logits, greedy)

    monkeypatch.setattr(Sampler, "sample", broken)
    handle = batcher.submit(ask("x"), SamplingParams(seed=13))
    assert_answers(batcher, answers)
    with pytest.raises(ValueError):
        handle.generation(30)


def assert_only_fails(batcher, answers, bad_messages, error=RuntimeError):
    """Ask every question together with `bad_messages`, which end with `error`; the others are answered."""
    handles = [batcher.submit(messages, NEW) for messages in QUESTIONS[:4]]
    bad = batcher.submit(bad_messages, NEW)
    handles += [batcher.submit(messages, NEW) for messages in QUESTIONS[4:]]
    assert [handle.generation(30) for handle in handles] == answers
    with pytest.raises(error):
        bad.generation(30)
    assert batcher.stats().failed == 1
    assert_answers(batcher, answers)


@pytest.fixture(scope="module")
def onnx():
    """An onnx engine and its answers."""
    engine = onnx_engine()
    return engine, [engine.complete([messages], NEW)[0] for messages in QUESTIONS]


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError, ValueError])
def test_a_forward_pass_that_fails_for_one_request_ends_only_that_request(engine, answers, onnx, kind, backend):
    engine, answers = (engine, answers) if backend == "torch" else onnx
    with Batcher(engine, max_num_seqs=3) as batcher:
        runner = batcher._scheduler.runner
        forward = runner.forward

        def broken(batch):
            rows = {one.row for one in batch.ranges}
            if any(len(r.keys) == 21 and r.own_row.row in rows for r in batcher._scheduler.running):
                raise kind("out of memory")
            return forward(batch)

        runner.forward = broken
        assert_only_fails(batcher, answers, ask("culprit" * 3), kind)


def test_a_request_that_fails_while_decoding_ends_alone(engine, batcher, answers):
    runner = batcher._scheduler.runner
    forward = runner.forward

    def broken(batch):
        rows = {one.row for one in batch.ranges if one.start == 24}
        if any(len(r.keys) == 21 and r.own_row.row in rows for r in batcher._scheduler.running):
            raise RuntimeError("no memory")
        return forward(batch)

    runner.forward = broken
    assert_only_fails(batcher, answers, ask("culprit" * 3))


def test_a_step_that_fails_for_all_requests_ends_the_running_ones(engine, batcher, answers):
    runner = batcher._scheduler.runner
    forward, calls = runner.forward, []

    def broken(batch):
        calls.append(1)
        if 4 <= len(calls) <= 7:
            raise RuntimeError("no memory")
        return forward(batch)

    runner.forward = broken
    handles = [batcher.submit(ask(str(number)), LONG) for number in range(3)]
    waiting = batcher.submit(QUESTIONS[0], NEW)
    for handle in handles:
        with pytest.raises(RuntimeError):
            handle.generation(30)
    assert waiting.generation(30) == answers[0]
    assert_answers(batcher, answers)
    assert batcher.stats().failed == 3


def test_an_image_on_which_the_tower_fails_ends_only_its_request(batcher, answers):
    runner = batcher._scheduler.runner
    encode = runner.encode
    bad = batcher.engine.new_request(ask("bad", 9), NEW, "", runner.features).prompt.images[0].key

    def broken(images, pixels):
        if bad in {image.key for image in images}:
            raise torch.OutOfMemoryError("out of memory at this image")
        encode(images, pixels)

    runner.encode = broken
    assert_only_fails(batcher, answers, ask("bad", 9, 1), torch.OutOfMemoryError)


@pytest.mark.parametrize(
    "pixels",
    [torch.zeros(3, 1000, 3), torch.zeros(1, 8, 8), torch.zeros(0), None],
    ids=["large", "gray", "empty", "missing"],
)
def test_an_image_that_cannot_be_preprocessed_ends_only_its_request(batcher, answers, pixels):
    """The image was cached at submission and evicted since, and its file has changed or is missing."""
    scheduler = batcher._scheduler
    preprocess = scheduler._pixels
    bad = batcher.engine.new_request(ask("bad", 9), NEW, "", scheduler.runner.features).prompt.images[0].key

    def broken(image, request):
        if image.key != bad:
            return preprocess(image, request)
        if pixels is None:
            raise MediaError("the file is missing")
        return pixels

    scheduler._pixels = broken
    assert_only_fails(batcher, answers, ask("bad", 1, 9), MediaError if pixels is None else Exception)


def test_a_prompt_that_cannot_be_embedded_ends_only_its_request(batcher, answers):
    runner = batcher._scheduler.runner
    embed = runner.embed

    def broken(prompt, start):
        if len(prompt.ids) == 7:
            raise IndexError("no such token")
        return embed(prompt, start)

    runner.embed = broken
    assert_only_fails(batcher, answers, ask("culprit"), IndexError)


def test_a_row_that_cannot_be_allocated_ends_the_running_requests(batcher, answers):
    allocate = batcher._scheduler.pool.allocate

    def broken(keys, *arguments):
        if len(keys) == 7:
            raise RuntimeError("no memory")
        return allocate(keys, *arguments)

    batcher._scheduler.pool.allocate = broken
    bad = batcher.submit(ask("culprit"), NEW)
    with pytest.raises(RuntimeError):
        bad.generation(30)
    assert_answers(batcher, answers)


def kill(thread):
    """Raise SystemExit in a thread, which ends it."""
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)) == 1


def test_the_end_of_the_worker_thread_ends_all_requests(engine):
    batcher = Batcher(engine, max_num_seqs=1, max_queue=4)
    batcher.start()
    assert batcher.is_alive
    handles = [batcher.submit(ask("x"), LONG) for _ in range(3)]
    kill(batcher._thread)
    for handle in handles:
        with pytest.raises(EngineDeadError):
            handle.generation(30)
    batcher._thread.join(30)
    assert not batcher.is_alive
    with pytest.raises(EngineDeadError):
        batcher.submit(ask("x"), NEW)
    assert batcher.drain(1)
    batcher.close()


@pytest.mark.parametrize("name", ["forward", "encode", "embed"])
def test_an_error_of_the_device_ends_the_worker_thread(engine, name):
    batcher = Batcher(engine, max_num_seqs=2)

    def broken(*arguments):
        raise torch.AcceleratorError("an illegal memory access was encountered", 700)

    setattr(batcher._scheduler.runner, name, broken)
    handles = [batcher.submit(ask(text, 1), LONG) for text in "abc"]
    batcher.start()
    for handle in handles:
        with pytest.raises(EngineDeadError):
            handle.generation(30)
    assert not batcher.is_alive


def test_drain_finishes_all_requests_and_rejects_new_ones(engine):
    with Batcher(engine, max_num_seqs=2) as batcher:
        handles = [batcher.submit(messages, NEW) for messages in QUESTIONS]
        assert batcher.drain(30)
        assert [handle.done for handle in handles] == [True] * len(QUESTIONS)
        with pytest.raises(ClosedError):
            batcher.submit(ask("x"), NEW)


def test_drain_times_out_and_close_ends_the_remaining_requests(engine):
    batcher = Batcher(engine, max_num_seqs=1)
    handles = [batcher.submit(ask("x"), NEW) for _ in range(2)]
    assert not batcher.drain(0.01)
    batcher.close()
    for handle in handles:
        with pytest.raises(ClosedError):
            handle.generation(0)
    batcher.close()


def test_close_ends_running_requests(engine):
    received = threading.Event()
    with Batcher(engine, max_num_seqs=2) as batcher:
        handle = batcher.submit(ask("x"), LONG, on_event=lambda event: received.set())
        assert received.wait(30)
    assert handle.done
    with pytest.raises(ClosedError):
        handle.generation(0)
    assert batcher._thread is not None and not batcher._thread.is_alive()


def test_blocks_with_another_attention_are_rejected():
    engine = endless()
    for block in engine.model.get_decoder().layers:
        block.self_attn.config = tiny.text_config("llama", attn_implementation="eager")
    with pytest.raises(ConfigError) as caught:
        Batcher(engine)
    assert (caught.value.field.rpartition(".")[2], caught.value.value) == ("self_attn", "eager")
