"""The turns of a chat go on from what was computed for the turns before, and the answers do not change."""

from itertools import zip_longest

import pytest

from tests.engine.fixtures import MODELS, ask
from tests.engine.onnx_fixtures import onnx_engine, torch_engine
from vila.core.types import Message
from vila.engine.engine import Engine
from vila.engine.prefix_cache import DEFAULT_BYTES, PrefixCache
from vila.engine.vision_cache import HashedImage, Prompt

NEW = 10


@pytest.fixture(scope="module", params=[*MODELS, "onnx"])
def engine(request):
    return onnx_engine() if request.param == "onnx" else torch_engine(request.param)


def keeping(engine, prefix_cache_bytes=DEFAULT_BYTES):
    """The same engine, keeping what it computed."""
    other = Engine(engine.model, engine.processor, engine._program, prefix_cache_bytes=prefix_cache_bytes)
    other._stop_ids = frozenset()
    return other


def chat(engine, questions, **options):
    """A conversation, every answer a part of the next turn."""
    messages, answers = [], []
    for question in questions:
        messages = [*messages, *question]
        answers.append(engine.complete([messages], max_new_tokens=NEW, **options)[0])
        messages.append(Message.of("assistant", answers[-1].text or "nothing"))
    return answers


TALK = [ask("one?", 1), ask("and this?", 2), ask("the first again", 1), ask("text alone")]


def test_a_chat_gives_the_answers_of_one_that_keeps_nothing(engine):
    kept = keeping(engine)
    assert chat(kept, TALK) == chat(engine, TALK)
    assert kept.prefix_cache.reused_tokens > 60


def test_what_is_drawn_and_reported_is_the_same_too(engine):
    options = {"temperature": 1.5, "seed": 3, "repetition_penalty": 1.2}
    kept = keeping(engine)
    assert [a.ids for a in chat(kept, TALK, **options)] == [a.ids for a in chat(engine, TALK, **options)]
    assert kept.prefix_cache.reused_tokens


def test_conversations_in_turns_keep_apart(engine):
    kept = keeping(engine)
    talks = [ask("one?", 1), ask("one? more", 1), ask("one?", 2), ask("text"), ask("text that goes on")]
    for _ in range(2):
        for talk in talks:
            assert kept.complete([talk], max_new_tokens=NEW) == engine.complete([talk], max_new_tokens=NEW)


def test_streams_at_once_do_not_meet_in_one_cache(engine):
    kept = keeping(engine)
    kept.generate(ask("one?", 1), max_new_tokens=NEW)
    streams = [kept.stream(ask(f"one? {word}", 1), max_new_tokens=NEW) for word in ("this", "that")]
    turns = zip_longest(*streams)
    texts = ["".join(event.text for event in events if event) for events in zip(*turns, strict=True)]
    wanted = [engine.generate(ask(f"one? {word}", 1), max_new_tokens=NEW) for word in ("this", "that")]
    assert [text.strip() for text in texts] == wanted


def test_an_answer_that_is_left_in_the_middle_leaves_what_it_computed(engine):
    kept = keeping(engine)
    stream = kept.stream(ask("one?", 1), max_new_tokens=NEW)
    next(stream)
    stream.close()
    assert kept.complete([ask("one?", 1)], max_new_tokens=NEW) == engine.complete([ask("one?", 1)], max_new_tokens=NEW)
    assert kept.prefix_cache.reused_tokens == len(kept.processor.prompt(ask("one?", 1)).ids) - 1


def test_a_failed_step_leaves_nothing_wrong(engine, monkeypatch):
    kept = keeping(engine)
    wanted = engine.complete([ask("one?", 1)], max_new_tokens=NEW)
    calls = []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    answers = kept._answer("")
    kind = type(answers)
    real = kind.take
    monkeypatch.setattr(kind, "take", fail)
    with pytest.raises(KeyboardInterrupt):
        kept.complete([ask("one?", 1)], max_new_tokens=NEW)
    monkeypatch.undo()
    assert kept.complete([ask("one?", 1)], max_new_tokens=NEW) == wanted
    assert kept.prefix_cache.reused_tokens


class Sequence:
    """Ten bytes a token."""

    def __init__(self, length):
        self.length = length

    @property
    def nbytes(self):
        return 10 * self.length

    def reset(self, length=0):
        self.length = length

    def reserve(self, capacity):
        pass

    def fork(self, length=None):
        return Sequence(self.length if length is None else length)


def prompt(*ids, runs=(), keys=()):
    return Prompt(list(ids), runs, tuple(HashedImage(key, None) for key in keys))


def test_one_token_at_least_is_left_to_compute():
    prefixes = PrefixCache(1000)
    prefixes.put([1, 2, 3], Sequence(3))
    assert prefixes.take(prompt(1, 2, 3))[1] == 2


def test_a_picture_is_shared_whole_or_not_at_all():
    prefixes = PrefixCache(1000)
    prefixes.put([5, -11, -11, -11, 7], Sequence(5))
    assert prefixes.take(prompt(5, 9, 9, 9, 8, runs=((1, 3),), keys=("a",)))[1] == 4
    prefixes.put([5, -11, -11], Sequence(3))
    assert prefixes.take(prompt(5, 9, 9, 9, 8, runs=((1, 3),), keys=("a",)))[1] == 1
    assert prefixes.take(prompt(5, 9, 9, 9, 8, runs=((1, 3),), keys=("b",)))[1] == 1


def test_what_is_taken_is_gone_and_what_shares_little_stays_whole():
    prefixes = PrefixCache(1000)
    prefixes.put([1, 2, 3, 4, 5, 6], Sequence(6))
    assert prefixes.take(prompt(1, 2, 9, 9))[1] == 2
    assert prefixes.take(prompt(1, 2, 3, 4, 5, 6, 7))[1] == 6
    assert prefixes.take(prompt(1, 2, 3, 4, 5, 6, 7)) == (None, 0)


def test_the_oldest_go_when_the_budget_is_full_and_what_is_too_large_is_not_kept():
    prefixes = PrefixCache(60)
    for start in (10, 20, 30):
        prefixes.put([start, start + 1, start + 2], Sequence(3))
    assert prefixes.take(prompt(10, 11, 12, 13)) == (None, 0)
    assert prefixes.take(prompt(20, 21, 22, 23))[1] == 3
    prefixes.put(list(range(50, 57)), Sequence(7))
    assert prefixes.take(prompt(50, 51, 52)) == (None, 0)


def test_an_engine_that_is_loaded_keeps_and_one_around_a_model_does_not(tmp_path):
    engine = torch_engine()
    engine.model.save_pretrained(tmp_path / "model")
    engine.processor.save_pretrained(tmp_path / "model")
    loaded = Engine.load(tmp_path / "model", dtype="float32")
    assert loaded.prefix_cache.budget == DEFAULT_BYTES
    assert Engine.load(tmp_path / "model", dtype="float32", prefix_cache_bytes=0).prefix_cache is None
    assert engine.prefix_cache is None
    loaded.generate(ask("one?", 1), max_new_tokens=2)
    loaded.prefix_cache.clear()
    assert loaded.prefix_cache.take(prompt(*loaded.processor.prompt(ask("one?", 1)).ids)) == (None, 0)


def test_a_long_prompt_in_chunks_gives_the_answers_of_one_piece(monkeypatch):
    for name in ("llama", "mistral, sliding window"):
        engine = torch_engine(name)
        questions = [ask("a longer question about one picture?", 1), ask("short"), ask("another of them, again", 2)]
        whole = engine.complete(questions, max_new_tokens=NEW)
        monkeypatch.setattr("vila.engine.batch._CHUNK", 7)
        assert engine.complete(questions, max_new_tokens=NEW) == whole
        assert engine.complete(questions[:1], max_new_tokens=NEW) == whole[:1]
        monkeypatch.undo()
