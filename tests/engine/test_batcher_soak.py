"""Soak test of a batcher: many requests of several threads, some cancelled, late or invalid; memory stays bounded."""

import gc
import random
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from tests.engine.fixtures import ask, endless
from vila.core.errors import CancelledError, ContextOverflowError, DeadlineError, NumericsError, QueueFullError
from vila.engine.batcher import Batcher
from vila.engine.sampling_params import SamplingParams

_THREADS = 4
_POISON = "\x01"
_PREFIXES = ["", "tell me about ", "what is in this image, and why do you think that it is ", "x" * 90]


def poisoned():
    """Return an engine whose model computes NaN for one letter."""
    engine = endless()
    weight = engine.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[engine.processor.tokenizer(_POISON)["input_ids"]] = torch.nan
        engine.model.language_model.lm_head.weight = torch.nn.Parameter(weight.nan_to_num(0))
    return engine


def questions(draw, count):
    """Return different conversations, many with common prefixes."""
    return [
        ask(draw.choice(_PREFIXES) + str(draw.randrange(20)), *(draw.randrange(4) for _ in range(draw.randrange(3))))
        for _ in range(count)
    ]


def client(batcher, asked, seed, count, found):
    """Send requests from one thread; append (kind, number, outcome) of each to `found`."""
    draw = random.Random(seed)
    pending = []
    for _ in range(count):
        number = draw.randrange(len(asked))
        kind = draw.choices(["good", "cancelled", "late", "poison", "huge"], [80, 8, 4, 4, 4])[0]
        sampling = asked[number][1]
        messages = {"poison": ask(f"some {_POISON}"), "huge": ask("h" * 1000)}.get(kind, asked[number][0])
        try:
            handle = submit(batcher, messages, sampling, 0.0 if kind == "late" else None)
        except ContextOverflowError as error:
            found.append((kind, number, error))
            continue
        if kind == "cancelled":
            threading.Timer(draw.random() * 0.02, handle.cancel).start()
        pending.append((kind, number, handle))
        if draw.random() < 0.3:
            collect(pending, found)
    collect(pending, found)


def submit(batcher, messages, sampling, timeout):
    """Submit a request, again while the queue is full."""
    while True:
        try:
            return batcher.submit(messages, sampling, timeout=timeout)
        except QueueFullError:
            time.sleep(0.002)


def collect(pending, found):
    while pending:
        kind, number, handle = pending.pop()
        try:
            found.append((kind, number, handle.generation(60)))
        except (CancelledError, DeadlineError, NumericsError) as error:
            found.append((kind, number, error))


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.parametrize("requests", [96, pytest.param(2000, marks=pytest.mark.slow)])
def test_soak(requests):
    draw = random.Random(requests)
    engine = poisoned()
    samplings = [
        # Without top_k an answer might contain the letter.
        SamplingParams(
            max_new_tokens=draw.randrange(1, 12), temperature=draw.choice([0, 0, 1.2]), seed=draw.randrange(9), top_k=40
        )
        for _ in range(24)
    ]
    asked = list(zip(questions(draw, 24), samplings, strict=True))
    wanted = [engine.complete([messages], sampling)[0] for messages, sampling in asked]
    batcher = Batcher(engine, max_num_seqs=5, kv_tokens=400, max_queue=12, prefill_chunk=32)
    sizes = []
    with batcher:
        found = []
        for _ in range(4):
            threads = [
                threading.Thread(target=client, args=(batcher, asked, draw.random(), requests // 16, found))
                for _ in range(_THREADS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
                assert not thread.is_alive()
            gc.collect()
            sizes.append(resident())
        for kind, number, outcome in found:
            if kind == "huge":
                assert isinstance(outcome, ContextOverflowError)
            elif kind == "poison":
                assert isinstance(outcome, NumericsError)
            elif kind == "late":
                assert isinstance(outcome, DeadlineError)
            elif kind == "good" or not isinstance(outcome, CancelledError):
                assert outcome == wanted[number]
        kinds = {type(outcome).__name__ for _, _, outcome in found}
        assert {"Generation", "DeadlineError", "NumericsError", "ContextOverflowError"} <= kinds
        assert len(found) == requests // 16 * 16
        stats = batcher.stats()
    ended = len(found) - sum(kind == "huge" for kind, _, _ in found)
    assert stats.finished + stats.cancelled + stats.failed == ended
    assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)
    assert stats.kv_tokens_cached <= 400
    assert all(buffer.isfinite().all() for buffer in batcher._scheduler.pool.cache.buffers)
    assert sizes[-1] < 1.05 * sizes[1]
    scheduler = weakref.ref(batcher._scheduler)
    # Exceptions refer to the frames that raised them.
    del batcher, threads, thread, found, outcome
    gc.collect()
    assert scheduler() is None
