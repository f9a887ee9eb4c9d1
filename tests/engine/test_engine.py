"""What a caller of the engine sees: text, pieces, scores, and errors before any work."""

import io

import pytest
import torch
from PIL import Image as PilImage

from tests import tiny
from tests.engine.fixtures import QUESTIONS, ask, endless
from vila.core.errors import ConfigError, ContextOverflowError, DataError, TemplateError
from vila.core.types import Image, Message
from vila.engine.engine import Engine
from vila.engine.request import SamplingParams

NEW = SamplingParams(max_new_tokens=12)


@pytest.fixture(scope="module")
def engine():
    return endless()


def test_the_forms_of_asking_give_the_same_text(engine):
    whole = engine.complete(QUESTIONS, NEW)
    assert engine.generate_batch(QUESTIONS, max_new_tokens=12) == [answer.text for answer in whole]
    assert engine.generate(QUESTIONS[1], NEW) == whole[1].text
    assert whole[1].prompt_tokens == len(engine.processor.prompt(QUESTIONS[1]).ids)


def test_nothing_asked_is_nothing_answered(engine):
    assert engine.complete([]) == engine.generate_batch([]) == engine.score([]) == []


def test_messages_of_the_hugging_face_form_are_the_same_conversation(engine):
    parts = [{"type": "image", "image": tiny.image(1).source}, {"type": "text", "text": "one?"}]
    assert engine.generate([{"role": "user", "content": parts}], NEW) == engine.generate(ask("one?", 1), NEW)


def test_streamed_pieces_joined_are_the_whole_answer(engine):
    for sampling in (
        SamplingParams(max_new_tokens=40),
        SamplingParams(max_new_tokens=40, temperature=2.0, stop=("e", "\n")),
    ):
        for messages in QUESTIONS:
            events = list(engine.stream(messages, sampling))
            whole = engine.complete([messages], sampling)[0]
            assert "".join(event.text for event in events).strip() == whole.text
            assert [event.finish for event in events] == [None] * (len(events) - 1) + [whole.finish]


def test_a_stop_token_ends_the_answer_and_is_left_out():
    engine = endless()
    first = engine.complete([ask("one?", 1)], NEW)[0]
    engine._stop_ids = frozenset({first.ids[4]})
    again = engine.complete([ask("one?", 1)], NEW)[0]
    assert again.finish == "stop"
    assert again.ids == first.ids[: first.ids.index(first.ids[4])]


def test_a_stop_string_of_the_caller_ends_the_answer(engine):
    whole = engine.complete([ask("x")], max_new_tokens=60)[0]
    stop = whole.text[3:6]
    cut = engine.complete([ask("x")], max_new_tokens=60, stop=stop)[0]
    assert (cut.text, cut.finish) == (whole.text[: whole.text.index(stop)].strip(), "stop")
    assert len(cut.ids) < len(whole.ids)


def test_a_stop_string_that_is_a_special_token_stops_at_that_token():
    engine = endless()
    assert engine._answer("", ("<|im_start|>",)).stop_ids == {tiny.tokenizer().convert_tokens_to_ids("<|im_start|>")}


def test_the_templates_stop_strings_are_the_engines(engine):
    assert engine._answer("caption", ("x",)).stop_texts == ("\n", "x")
    assert engine._answer("starter_qa").stop_texts == ()


@pytest.fixture
def seen(monkeypatch):
    """An engine, and how many pictures its tower looked at."""
    engine = endless()
    counted = []
    look = engine.model.vision_features
    monkeypatch.setattr(engine.model, "vision_features", lambda pixels: counted.append(len(pixels)) or look(pixels))
    return engine, counted


def test_the_tower_sees_each_distinct_picture_once(seen):
    engine, counted = seen
    engine.complete(QUESTIONS, NEW)
    assert sum(counted) == 3
    engine.generate(ask("later", 1, 2, 3), NEW)
    assert sum(counted) == 3
    engine.generate(ask("later", 4), NEW)
    assert sum(counted) == 4


def test_a_picture_is_known_by_its_content_not_by_where_it_comes_from(seen, tmp_path):
    engine, counted = seen
    source = tiny.image(1).source
    (tmp_path / "a.png").write_bytes(source)
    pil = PilImage.open(io.BytesIO(source))
    texts = [
        engine.generate([Message.of("user", image, "what?")], NEW)
        for image in (Image(source), Image(tmp_path / "a.png"), Image(pil), Image(pil.copy()))
    ]
    assert len(set(texts)) == 1
    assert sum(counted) == 2  # the file's bytes, and the pixels


def test_scores_are_the_log_probabilities_of_a_full_forward():
    for name in ("llama", "mistral, sliding window"):
        engine = endless(name)
        talk = [*ask("one?", 1), Message.of("assistant", "ab")]
        others = [[*ask("text"), Message.of("assistant", "longer answer")], talk]
        alone = engine.score([talk])[0]
        assert engine.score(others)[1] == pytest.approx(alone, abs=1e-5)
        assert len(alone) == len(" ab") + 1
        prompt = engine.processor.prompt(talk[:1])
        ids = [*prompt.ids, *engine.processor.tokenizer(" ab")["input_ids"], engine.processor.span_tokenizer.eos_id]
        pixels = engine.processor.pixels(prompt.media)
        with torch.no_grad():
            logits = engine.model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits
        reference = logits[0].log_softmax(-1)[range(len(prompt.ids) - 1, len(ids) - 1), ids[len(prompt.ids) :]]
        assert alone == pytest.approx(reference.tolist(), abs=1e-5)


def test_what_does_not_fit_is_refused_before_any_work(engine, monkeypatch):
    monkeypatch.setattr(engine, "model", None, raising=False)
    monkeypatch.setattr(type(engine), "_context", 512)
    message = "600 tokens .* 12, .* 512"
    for refused in (lambda: engine.complete([ask("x" * 600)], NEW), lambda: engine.stream(ask("x" * 600), NEW)):
        with pytest.raises(ContextOverflowError, match=message):
            refused()
    with pytest.raises(ContextOverflowError, match="602 tokens.* 512"):
        engine.score([[*ask("x" * 599), Message.of("assistant", "y")]])


def test_truncation_answers_what_is_left_and_says_what_is_not(engine):
    history = [*ask("first " * 80, 1), Message.of("assistant", "so " * 40), *ask("then?", 2)]
    answer = engine.complete([history], max_new_tokens=12, overlong="truncate")[0]
    assert answer.dropped_messages == 2
    assert answer.ids == engine.complete([ask("then?", 2)], NEW)[0].ids
    assert engine.complete([ask("then?", 2)], max_new_tokens=12, overlong="truncate")[0].dropped_messages == 0


def test_settings_are_one_sampling_or_options_not_both(engine):
    for refused in (engine.generate, engine.stream):
        with pytest.raises(ConfigError, match="sampling and temperature"):
            refused(ask("x"), NEW, temperature=1.0)
    with pytest.raises(ConfigError, match="'max_tokens'"):
        engine.generate(ask("x"), max_tokens=3)


def test_attention_that_the_masks_do_not_describe_is_refused():
    model, processor = tiny.vila()
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="'eager'.*'sdpa'"):
        Engine(model, processor)


def test_a_prompt_without_a_token_is_refused(engine):
    """With the template that adds nothing; a batcher's neighbours would all end with it."""
    with pytest.raises(DataError, match="no tokens"):
        engine.generate([Message.of("user", "")], template="page", max_new_tokens=2)


def test_a_history_with_an_empty_answer_is_gone_on_with():
    engine = endless()
    turns = [("user", "hello"), ("assistant", ""), ("user", "and?")]
    history = [{"role": role, "content": text} for role, text in turns]
    assert len(engine.complete([history], max_new_tokens=3)[0].ids) == 3
    with pytest.raises(TemplateError) as raised:
        engine.generate([*history[:1], *history[2:]])
    assert raised.value.field == "messages[1]"
    assert engine.generate([*history[:1], *history[2:]], template="chatml", max_new_tokens=1) is not None
