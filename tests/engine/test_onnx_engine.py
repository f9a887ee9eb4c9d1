"""The engine answers by onnxruntime as it answers by torch."""

from itertools import zip_longest

import pytest
import torch

from tests.engine.fixtures import MODELS, QUESTIONS, ask
from tests.engine.onnx_fixtures import onnx_engine, torch_engine
from vila.core.errors import MISSING, ConfigError
from vila.core.types import Message
from vila.engine.engine import Engine

DRAWN = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.3}


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    return torch_engine(request.param), onnx_engine(request.param)


def test_greedy_answers_about_text_and_pictures_are_equal(pair):
    ours, theirs = (engine.complete(QUESTIONS, max_new_tokens=12) for engine in pair[::-1])
    assert ours == theirs


def test_drawn_answers_are_equal(pair):
    ours, theirs = (engine.complete(QUESTIONS, **DRAWN, seed=3) for engine in pair[::-1])
    assert ours == theirs


def test_scores_are_equal(pair):
    talks = [
        [*question, Message.of("assistant", answer)] for question, answer in zip(QUESTIONS, "abcdefghij", strict=True)
    ]
    for ours, theirs in zip(*(engine.score(talks) for engine in pair[::-1]), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_rows_that_end_early_leave_the_others_as_they_are():
    engine = onnx_engine()
    free = engine.complete(QUESTIONS, max_new_tokens=12)
    engine._stop_ids = frozenset({free[1].ids[2], free[4].ids[5]})
    stopped = engine.complete(QUESTIONS, max_new_tokens=12)
    assert stopped[1].finish == "stop"
    assert all(before.ids[: len(after.ids)] == after.ids for before, after in zip(free, stopped, strict=True))


def test_two_streams_at_once_do_not_disturb_each_other():
    engine = onnx_engine()
    alone = [engine.generate(ask(text), max_new_tokens=8) for text in ("one", "another")]
    streams = [engine.stream(ask(text), max_new_tokens=8) for text in ("one", "another")]
    turns = zip_longest(*streams)
    texts = ["".join(event.text for event in events if event) for events in zip(*turns, strict=True)]
    assert [text.strip() for text in texts] == alone


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    engine = torch_engine()
    engine.model.save_pretrained(folder)
    engine.processor.save_pretrained(folder)
    return folder


def test_a_checkpoint_loads_with_the_onnx_backend(saved):
    by_torch, by_onnx = (Engine.load(saved, dtype="float32", backend=backend) for backend in ("torch", "onnx"))
    assert by_onnx.complete(QUESTIONS, max_new_tokens=8) == by_torch.complete(QUESTIONS, max_new_tokens=8)


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"backend": "tensorflow"}, "backend", "tensorflow"),
        ({"backend": "onnx", "device": "cuda"}, "backend", MISSING),
        ({"head_bits": 8}, "head_bits", 8),
        ({"backend": "torch", "threads": 2}, "threads", 2),
        ({"backend": "onnx", "head_bits": 7}, "head_bits", 7),
    ],
)
def test_impossible_backends_are_refused(saved, options, field, value):
    with pytest.raises(ConfigError) as caught:
        Engine.load(saved, **options)
    assert (caught.value.field, caught.value.value) == (field, value)


def test_the_threads_are_those_asked_for_or_those_of_torch(saved):
    assert Engine.load(saved, backend="onnx", threads=1)._program.threads == 1
    assert Engine.load(saved, backend="onnx")._program.threads == torch.get_num_threads()
