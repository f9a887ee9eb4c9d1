"""Prefix caching of the engine's own methods: later turns reuse earlier ones, and the answers do not change."""

from itertools import zip_longest

import pytest

from tests.engine.fixtures import MODELS, ask, endless
from tests.engine.onnx_fixtures import onnx_engine, torch_engine
from vila.core.types import Message
from vila.engine.engine import Engine

NEW = 10
LONG = "a question that is long enough to be reused: "


@pytest.fixture(scope="module", params=[*MODELS, "onnx"])
def engine(request):
    return onnx_engine() if request.param == "onnx" else torch_engine(request.param)


def with_prefix_caching(engine):
    """Return an engine of the same model with prefix caching."""
    other = Engine(engine.model, engine.processor, engine._program, prefix_caching=True)
    other._stop_ids = frozenset()
    return other


def cached_tokens(engine):
    """Return the number of prompt tokens that the engine has reused so far."""
    return engine._offline.scheduler.counts.cached_prompt_tokens


def converse(engine, questions, **options):
    """Return the answers of a conversation in which every answer is part of the next prompt."""
    messages, answers = [], []
    for question in questions:
        messages = [*messages, *question]
        answers.append(engine.complete([messages], max_new_tokens=NEW, **options)[0])
        messages.append(Message.of("assistant", answers[-1].text or "nothing"))
    return answers


TURNS = [ask("one?", 1), ask("and this?", 2), ask("the first again", 1), ask("text alone")]


def test_answers_of_a_conversation_equal_those_without_caching(engine):
    caching = with_prefix_caching(engine)
    assert converse(caching, TURNS) == converse(engine, TURNS)
    assert cached_tokens(caching) > 60


def test_sampled_answers_equal_those_without_caching(engine):
    options = {"temperature": 1.5, "seed": 3, "repetition_penalty": 1.2}
    caching = with_prefix_caching(engine)
    wanted = [answer.ids for answer in converse(engine, TURNS, **options)]
    assert [answer.ids for answer in converse(caching, TURNS, **options)] == wanted
    assert cached_tokens(caching)


def test_alternating_conversations_do_not_mix(engine):
    caching = with_prefix_caching(engine)
    questions = [(LONG, 1), (LONG + "more", 1), (LONG, 2), (LONG,), (LONG + "goes on",)]
    for _ in range(2):
        for question in questions:
            conversation = [ask(*question)]
            wanted = engine.complete(conversation, max_new_tokens=NEW)
            assert caching.complete(conversation, max_new_tokens=NEW) == wanted
    assert cached_tokens(caching) > 5 * len(LONG)


def test_concurrent_streams_share_a_prefix_and_do_not_mix(engine):
    caching = with_prefix_caching(engine)
    caching.generate(ask(LONG, 1), max_new_tokens=NEW)
    streams = [caching.stream(ask(LONG + word, 1), max_new_tokens=NEW) for word in ("this", "that")]
    pieces = zip_longest(*streams)
    texts = ["".join(event.text for event in events if event) for events in zip(*pieces, strict=True)]
    wanted = [engine.generate(ask(LONG + word, 1), max_new_tokens=NEW) for word in ("this", "that")]
    assert [text.strip() for text in texts] == wanted
    assert cached_tokens(caching) > 2 * len(LONG)


def test_the_prefix_of_an_abandoned_stream_is_reused(engine):
    caching = with_prefix_caching(engine)
    stream = caching.stream(ask(LONG, 1), max_new_tokens=NEW)
    next(stream)
    stream.close()
    wanted = engine.complete([ask(LONG, 1)], max_new_tokens=NEW)
    assert caching.complete([ask(LONG, 1)], max_new_tokens=NEW) == wanted
    assert cached_tokens(caching) == len(caching.processor.prompt(ask(LONG, 1)).ids) - 1


def test_without_caching_nothing_is_reused_between_calls(engine):
    before = cached_tokens(engine)
    for _ in range(2):
        engine.generate(ask(LONG, 1), max_new_tokens=2)
        list(engine.stream(ask(LONG, 1), max_new_tokens=2))
        engine.score([[*ask(LONG), Message.of("assistant", "x")]])
    assert cached_tokens(engine) == before
    assert engine._offline.scheduler.pool.tokens_cached == 0


def test_without_caching_changed_weights_change_the_answer():
    engine = endless()
    before = engine.generate(ask(LONG, 1), max_new_tokens=NEW)
    engine.model.load_state_dict(endless(seed=1).model.state_dict())
    changed = engine.generate(ask(LONG), max_new_tokens=NEW)
    assert changed == endless(seed=1).generate(ask(LONG), max_new_tokens=NEW) != before


def test_conversations_of_a_batch_share_their_prefix_without_caching():
    engine = endless()
    conversations = [ask(LONG + str(number), 1) for number in range(6)]
    together = engine.complete(conversations, max_new_tokens=NEW)
    assert cached_tokens(engine) >= 5 * len(LONG)
    assert together == [engine.complete([one], max_new_tokens=NEW)[0] for one in conversations]


def test_loaded_engines_cache_prefixes_unless_disabled(tmp_path):
    engine = torch_engine()
    engine.model.save_pretrained(tmp_path / "model")
    engine.processor.save_pretrained(tmp_path / "model")
    assert Engine.load(tmp_path / "model", dtype="float32").prefix_caching
    assert not Engine.load(tmp_path / "model", dtype="float32", prefix_caching=False).prefix_caching
    assert not engine.prefix_caching


@pytest.mark.parametrize("name", ["llama", "mistral, sliding window"])
def test_chunked_prefill_gives_the_same_answers(name, monkeypatch):
    engine = torch_engine(name)
    questions = [ask("a longer question about one image?", 1), ask("short"), ask("another of them, again", 2)]
    whole = engine.complete(questions, max_new_tokens=NEW)
    monkeypatch.setattr("vila.engine.engine._PREFILL_CHUNK", 7)
    chunked = Engine(engine.model, engine.processor)
    chunked._stop_ids = frozenset()
    assert chunked.complete(questions, max_new_tokens=NEW) == whole
    assert chunked.complete(questions[:1], max_new_tokens=NEW) == whole[:1]
    assert chunked._offline.scheduler.prefill_chunk == 7
