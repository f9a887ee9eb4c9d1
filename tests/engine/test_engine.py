"""Public methods of the engine: answers, streams, scores, threads, and errors before any work."""

import gc
import io
import threading

import pytest
import torch
from PIL import Image as PilImage

from tests import tiny
from tests.engine.fixtures import QUESTIONS, ask, endless
from vila.core.errors import ConfigError, ContextOverflowError, DataError, TemplateError
from vila.core.types import Image, Message
from vila.engine.batcher import Batcher
from vila.engine.engine import Engine
from vila.engine.sampling_params import SamplingParams

NEW = SamplingParams(max_new_tokens=12)


@pytest.fixture(scope="module")
def engine():
    return endless()


def test_all_generating_methods_give_the_same_text(engine):
    whole = engine.complete(QUESTIONS, NEW)
    assert engine.generate_batch(QUESTIONS, max_new_tokens=12) == [answer.text for answer in whole]
    assert engine.generate(QUESTIONS[1], NEW) == whole[1].text
    assert whole[1].prompt_tokens == len(engine.processor.prompt(QUESTIONS[1]).ids)


def test_empty_batches_give_empty_results(engine):
    assert engine.complete([]) == engine.generate_batch([]) == engine.score([]) == []


def test_hugging_face_messages_are_the_same_conversation(engine):
    parts = [{"type": "image", "image": tiny.image(1).source}, {"type": "text", "text": "one?"}]
    assert engine.generate([{"role": "user", "content": parts}], NEW) == engine.generate(ask("one?", 1), NEW)


def test_joined_stream_equals_the_answer(engine):
    for sampling in (
        SamplingParams(max_new_tokens=40),
        SamplingParams(max_new_tokens=40, temperature=2.0, stop=("e", "\n")),
    ):
        for messages in QUESTIONS[:4]:
            events = list(engine.stream(messages, sampling))
            whole = engine.complete([messages], sampling)[0]
            assert "".join(event.text for event in events).strip() == whole.text
            assert [event.finish for event in events] == [None] * (len(events) - 1) + [whole.finish]


def test_a_stop_token_ends_the_answer_and_is_excluded():
    engine = endless()
    first = engine.complete([ask("one?", 1)], NEW)[0]
    engine._stop_ids = frozenset({first.ids[4]})
    again = engine.complete([ask("one?", 1)], NEW)[0]
    assert again.finish == "stop"
    assert again.ids == first.ids[: first.ids.index(first.ids[4])]


def test_a_stop_string_ends_the_answer(engine):
    whole = engine.complete([ask("x")], max_new_tokens=60)[0]
    stop = whole.text[3:6]
    cut = engine.complete([ask("x")], max_new_tokens=60, stop=stop)[0]
    assert (cut.text, cut.finish) == (whole.text[: whole.text.index(stop)].strip(), "stop")
    assert len(cut.ids) < len(whole.ids)


def test_a_stop_string_that_is_a_special_token_becomes_a_stop_token():
    engine = endless()
    assert engine._answer("", ("<|im_start|>",)).stop_ids == {tiny.tokenizer().convert_tokens_to_ids("<|im_start|>")}


def test_stop_strings_of_the_template_are_used(engine):
    assert engine._answer("caption", ("x",)).stop_texts == ("\n", "x")
    assert engine._answer("starter_qa").stop_texts == ()


@pytest.fixture
def counting_engine(monkeypatch):
    """Return an engine, and a list of the number of images in each call of its vision tower."""
    engine = endless()
    counted = []
    encode = engine.model.vision_features
    monkeypatch.setattr(engine.model, "vision_features", lambda pixels: counted.append(len(pixels)) or encode(pixels))
    return engine, counted


def test_each_distinct_image_is_encoded_once(counting_engine):
    engine, counted = counting_engine
    engine.complete(QUESTIONS, NEW)
    assert sum(counted) == 3
    engine.generate(ask("later", 1, 2, 3), NEW)
    assert sum(counted) == 3
    engine.generate(ask("later", 4), NEW)
    assert sum(counted) == 4


def test_images_are_identified_by_content_not_by_source(counting_engine, tmp_path):
    engine, counted = counting_engine
    source = tiny.image(1).source
    (tmp_path / "a.png").write_bytes(source)
    pil = PilImage.open(io.BytesIO(source))
    texts = [
        engine.generate([Message.of("user", image, "what?")], NEW)
        for image in (Image(source), Image(tmp_path / "a.png"), Image(pil), Image(pil.copy()))
    ]
    assert len(set(texts)) == 1
    assert sum(counted) == 2  # the file's bytes, and the pixels


@pytest.mark.parametrize("name", ["llama", "mistral, sliding window"])
def test_scores_equal_the_logprobs_of_a_full_forward_pass(name):
    engine = endless(name)
    messages = [*ask("one?", 1), Message.of("assistant", "ab")]
    batch = [[*ask("text"), Message.of("assistant", "longer answer")], messages]
    alone = engine.score([messages])[0]
    assert engine.score(batch)[1] == pytest.approx(alone, abs=1e-5)
    assert len(alone) == len(" ab") + 1
    prompt = engine.processor.prompt(messages[:1])
    ids = [*prompt.ids, *engine.processor.tokenizer(" ab")["input_ids"], engine.processor.span_tokenizer.eos_id]
    pixels = engine.processor.pixels(prompt.media)
    with torch.no_grad():
        logits = engine.model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits
    reference = logits[0].log_softmax(-1)[range(len(prompt.ids) - 1, len(ids) - 1), ids[len(prompt.ids) :]]
    assert alone == pytest.approx(reference.tolist(), abs=1e-5)


def test_scores_of_conversations_with_a_common_prefix_share_it():
    engine = endless()
    question = ask("a question that is long enough to be shared", 1)
    conversations = [[*question, Message.of("assistant", text)] for text in ("a", "b", "longer", "a longer one")]
    together = engine.score(conversations)
    shared = engine._offline.scheduler.counts.cached_prompt_tokens
    assert shared >= 3 * (len(engine.processor.prompt(question).ids) - 1)
    for found, conversation in zip(together, conversations, strict=True):
        assert found == pytest.approx(engine.score([conversation])[0], abs=1e-5)


def test_scores_in_chunks_equal_those_in_one_pass(monkeypatch):
    engine = endless()
    messages = [*ask("one?", 1), Message.of("assistant", "an answer"), *ask("two?"), Message.of("assistant", "more")]
    whole = engine.score([messages])[0]
    monkeypatch.setattr("vila.engine.engine._PREFILL_CHUNK", 3)
    assert Engine(engine.model, engine.processor).score([messages])[0] == pytest.approx(whole, abs=1e-5)


def test_more_conversations_than_rows_are_all_answered(monkeypatch):
    monkeypatch.setattr("vila.engine.engine._MAX_NUM_SEQS", 3)
    engine = endless()
    answers = engine.complete(QUESTIONS, NEW)
    assert len(engine._offline.scheduler.pool.rows) == 3
    assert answers == [engine.complete([messages], NEW)[0] for messages in QUESTIONS]


def test_threads_share_one_scheduler(monkeypatch):
    engine, reference = endless(), endless()
    wanted = reference.complete(QUESTIONS[:4], NEW)
    scores = reference.score([[*QUESTIONS[0], Message.of("assistant", "ab")]])
    created = []
    create = engine.new_scheduler
    monkeypatch.setattr(engine, "new_scheduler", lambda *values: created.append(values) or create(*values))
    found = {}
    start = threading.Barrier(6)

    def answer(number):
        start.wait()
        if number < 4:
            found[number] = engine.complete([QUESTIONS[number]], NEW)[0]
        elif number == 4:
            found[number] = "".join(event.text for event in engine.stream(QUESTIONS[1], NEW)).strip()
        else:
            found[number] = engine.score([[*QUESTIONS[0], Message.of("assistant", "ab")]])

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(created) == 1
    assert [found[number] for number in range(4)] == wanted
    assert found[4] == wanted[1].text
    assert found[5][0] == pytest.approx(scores[0], abs=1e-5)


@pytest.mark.parametrize("how", ["close", "delete", "cycle"])
def test_an_abandoned_stream_frees_its_row(how):
    engine = endless()
    wanted = endless().generate(QUESTIONS[1], NEW)
    for _ in range(40):
        stream = engine.stream(ask("x"), max_new_tokens=200)
        next(stream)
        if how == "close":
            stream.close()
        if how == "cycle":
            cycle = [stream]
            cycle.append(cycle)
            del cycle
        del stream
    gc.collect()
    # Streams collected during a step end at the next one.
    assert engine.generate(QUESTIONS[1], NEW) == wanted
    assert engine._offline.scheduler.running == []


def test_a_stream_closed_during_a_step_of_its_thread_ends_at_the_next_step(monkeypatch):
    """The garbage collector may close a stream at any time."""
    engine = endless()
    wanted = endless().generate(QUESTIONS[1], NEW)
    stream = engine.stream(ask("x"), max_new_tokens=200)
    next(stream)
    scheduler = engine._offline.scheduler
    forward = scheduler.runner.forward
    monkeypatch.setattr(scheduler.runner, "forward", lambda batch: stream.close() or forward(batch))
    assert engine.generate(QUESTIONS[1], NEW) == wanted
    assert scheduler.running == []
    assert scheduler.counts.cancelled == 1


def test_other_calls_continue_a_paused_stream():
    engine = endless()
    stream = engine.stream(ask("x"), max_new_tokens=20)
    events = [next(stream)]
    other = engine.generate(QUESTIONS[1], max_new_tokens=40)
    assert engine._offline.scheduler.running == []
    events += stream
    assert "".join(event.text for event in events).strip() == engine.generate(ask("x"), max_new_tokens=20)
    assert other == engine.generate(QUESTIONS[1], max_new_tokens=40)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_the_engine_is_usable_after_an_interrupted_step(monkeypatch, error, prefix_caching):
    engine = endless()
    wanted = engine.complete(QUESTIONS[:3], NEW)
    engine = Engine(engine.model, engine.processor, prefix_caching=prefix_caching)
    engine._stop_ids = frozenset()
    paused = engine.stream(ask("paused"), max_new_tokens=50)
    next(paused)
    scheduler, calls = engine._offline.scheduler, []
    take = scheduler._take_logits

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise error
        take(*arguments)

    monkeypatch.setattr(scheduler, "_take_logits", interrupt)
    with pytest.raises(error):
        engine.complete(QUESTIONS[:3], NEW)
    assert (scheduler.running, list(scheduler.waiting)) == ([], [])
    with pytest.raises(error):
        list(paused)
    assert engine.complete(QUESTIONS[:3], NEW) == wanted


def test_an_error_of_one_request_is_raised_after_all_have_ended(monkeypatch):
    engine = endless()
    wanted = engine.complete(QUESTIONS[:1], NEW)
    runner = engine._offline.scheduler.runner
    embed = runner.embed

    def broken(prompt, start):
        if len(prompt.ids) == 7:
            raise IndexError("no such token")
        return embed(prompt, start)

    monkeypatch.setattr(runner, "embed", broken)
    with pytest.raises(IndexError):
        engine.complete([QUESTIONS[0], ask("culprit")], NEW)
    assert engine._offline.scheduler.running == []
    assert engine.complete(QUESTIONS[:1], NEW) == wanted


def test_with_vision_shares_the_caches_and_does_not_mix_images(counting_engine):
    engine, counted = counting_engine
    engine = Engine(engine.model, engine.processor, prefix_caching=True)
    engine._stop_ids = frozenset()
    messages = [Message.of("user", tiny.image(1, size=(60, 28)), "a question that is long enough to share")]
    resized = engine.with_vision(image_mode="resize")
    plain = endless()
    for _ in range(2):
        assert engine.complete([messages], NEW) == plain.complete([messages], NEW)
        wanted = plain.with_vision(image_mode="resize").complete([messages], NEW)
        assert resized.complete([messages], NEW) == wanted
    assert sum(counted) == 2
    scheduler = engine._offline.scheduler
    assert resized._offline.scheduler is scheduler
    assert scheduler.counts.cached_prompt_tokens == 2 * (len(engine.processor.prompt(messages).ids) - 1)


def test_conversations_that_do_not_fit_are_rejected_before_any_work(engine, monkeypatch):
    monkeypatch.setattr(engine._offline.scheduler, "add", None)
    for reject in (
        lambda: engine.complete([ask("x" * 600)], NEW),
        lambda: engine.stream(ask("x" * 600), NEW),
        lambda: engine.score([[*ask("x" * 599), Message.of("assistant", "y")]]),
    ):
        with pytest.raises(ContextOverflowError):
            reject()


def test_a_request_larger_than_the_kv_cache_ends_when_no_other_is_running(engine):
    scheduler = engine.new_scheduler(2, 64, 256)
    features = scheduler.runner.features
    first, large, last = (engine.new_request(ask(text), NEW, "", features) for text in ("x", "y" * 60, "z"))
    for request in (first, large, last):
        scheduler.add(request)
    with torch.inference_mode():
        for _ in range(30):
            scheduler.step()
    with pytest.raises(ContextOverflowError):
        large.handle.generation(0)
    assert [request.handle.generation(0) for request in (first, last)] == engine.complete([ask("x"), ask("z")], NEW)


def test_a_context_that_is_not_a_multiple_of_the_alignment_can_be_filled():
    engine = endless(max_position_embeddings=100)
    batcher = Batcher(engine, max_num_seqs=1)
    assert batcher._scheduler.pool.max_length == 100
    sampling = SamplingParams(max_new_tokens=3)
    handle = batcher.submit(ask("x" * 97), sampling)
    with torch.inference_mode():
        for _ in range(3):
            batcher._step()
    assert handle.generation(0) == engine.complete([ask("x" * 97)], sampling)[0]


def test_truncation_drops_the_oldest_messages_and_counts_them(engine):
    history = [*ask("first " * 80, 1), Message.of("assistant", "so " * 40), *ask("then?", 2)]
    answer = engine.complete([history], max_new_tokens=12, overlong="truncate")[0]
    assert answer.dropped_messages == 2
    assert answer.ids == engine.complete([ask("then?", 2)], NEW)[0].ids
    assert engine.complete([ask("then?", 2)], max_new_tokens=12, overlong="truncate")[0].dropped_messages == 0


def test_sampling_and_options_exclude_each_other(engine):
    for method in (engine.generate, engine.stream):
        with pytest.raises(ConfigError):
            method(ask("x"), NEW, temperature=1.0)
    with pytest.raises(ConfigError):
        engine.generate(ask("x"), max_tokens=3)


def test_unsupported_attention_is_rejected():
    model, processor = tiny.vila()
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError):
        Engine(model, processor)


def test_a_prompt_without_tokens_is_rejected(engine):
    with pytest.raises(DataError):
        engine.generate([Message.of("user", "")], template="page", max_new_tokens=2)


def test_a_conversation_with_an_empty_answer_is_continued():
    engine = endless()
    turns = [("user", "hello"), ("assistant", ""), ("user", "and?")]
    history = [{"role": role, "content": text} for role, text in turns]
    assert len(engine.complete([history], max_new_tokens=3)[0].ids) == 3
    with pytest.raises(TemplateError) as raised:
        engine.generate([*history[:1], *history[2:]])
    assert raised.value.field == "messages[1]"
    assert engine.generate([*history[:1], *history[2:]], template="chatml", max_new_tokens=1) is not None
