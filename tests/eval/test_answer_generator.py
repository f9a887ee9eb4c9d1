"""Answer generation: image modes, token counts, texts that UTF-8 files can hold."""

import io
import json

import pytest
import torch
from PIL import Image as PilImage

from tests import tiny
from tests.eval.fake_models import FakeModel
from tests.model.test_exif_orientation import sideways
from vila.core.types import Image, Message
from vila.engine.engine import Engine
from vila.engine.sampling_params import SamplingParams
from vila.eval.benchmark import Benchmark, BenchmarkResult, Item
from vila.eval.openai_client import ChatCompletion
from vila.eval.runner import (
    AnswerGenerator,
    TokenCounts,
    batches,
    delete_speed_parts,
    merge_speed_parts,
    run_benchmark,
    write_speed_part,
)

SHORT = SamplingParams(max_new_tokens=6)


def wide(seed=1):
    """An image of which a centre crop leaves a third."""
    return tiny.image(seed, (84, 28))


def item(number, image, mode=None, **facts):
    return Item(f"q{number}", (Message.of("user", image, "\nwhat?"),), "", str(number), image_mode=mode, **facts)


@pytest.fixture(scope="module")
def engine():
    return Engine(*tiny.vila())


def test_an_engine_of_another_image_mode_sees_the_image_that_is_left_of_it(engine):
    whole = PilImage.open(io.BytesIO(wide().source)).convert("RGB")
    cropped = Image(whole.crop((28, 0, 56, 28)))
    question = [[Message.of("user", wide(), "what?")]]
    expected = engine.complete([[Message.of("user", cropped, "what?")]], SHORT)[0].ids
    padded = engine.complete(question, SHORT)[0].ids
    assert engine.with_vision(image_mode="square").complete(question, SHORT)[0].ids == expected != padded
    # What was computed for the crop is not taken for the padded image.
    assert engine.complete(question, SHORT)[0].ids == padded
    assert engine.processor.spec.image_mode == "pad"


def test_features_of_one_mode_are_not_those_of_another(engine):
    square = engine.with_vision(image_mode="square")
    pixels = [one.processor.pixels([wide()]) for one in (engine, square)]
    assert not torch.equal(*pixels)
    assert torch.equal(pixels[1], engine.processor.pixels([wide()], "square"))
    assert square.model is engine.model


def test_items_are_asked_in_their_own_mode_and_never_with_others(engine):
    items = [item(0, wide()), item(1, wide(), "square"), item(2, wide(2)), item(3, wide(2), "square")]
    found = list(batches(items))
    assert [{one.image_mode for one in batch} for batch in found] == [{None}, {"square"}]
    generator = AnswerGenerator(engine)
    texts = {one.id: text for batch in found for one, text in zip(batch, generator.generate(batch, SHORT), strict=True)}
    square = engine.with_vision(image_mode="square")
    assert texts == {
        one.id: (square if one.image_mode else engine).generate_batch([one.messages], SHORT)[0] for one in items
    }


def test_tokens_are_those_of_the_engine(engine):
    items = [item(n, wide(n)) for n in range(3)]
    generator = AnswerGenerator(engine)
    generator.generate(items, SHORT)
    answers = engine.complete([one.messages for one in items], SHORT)
    assert generator.tokens == TokenCounts(sum(a.prompt_tokens for a in answers), sum(len(a.ids) for a in answers))
    assert generator.tokens.completion > 0


class Server(FakeModel):
    """Reports token counts; answers with an unpaired surrogate."""

    def complete(self, conversations, sampling, *, template=""):
        return [ChatCompletion("a\ud800", prompt_tokens=10, completion_tokens=2) for _ in conversations]


def test_token_counts_are_those_of_the_model_or_unknown():
    for engine, expected in ((Server(), TokenCounts(10, 2)), (FakeModel(), None)):
        generator = AnswerGenerator(engine)
        generator.generate([item(0, wide(), "square")], SHORT)
        assert generator.tokens == expected


class One(Benchmark):
    """One question."""

    name = "one"
    max_new_tokens = 4

    def load_items(self):
        return [item(0, wide())]

    def score(self, answers, protocol="upstream"):
        return BenchmarkResult(0.0, "%", {}, ())


def test_unpaired_surrogates_are_replaced(tmp_path):
    assert run_benchmark(Server(), One(), tmp_path).predictions == {"q0": "a?"}
    assert json.loads((tmp_path / "predictions.jsonl").read_text())["text"] == "a?"
    assert json.loads((tmp_path / "speed.json").read_text()).items() >= {"prompt_tokens": 10, "tokens": 2}.items()


def test_line_separators_inside_an_answer(tmp_path):
    class Odd(FakeModel):
        def generate(self, conversations, sampling):
            return ["a\x1e\x85\u2028b\r\nc" for _ in conversations]

    for _ in range(2):
        assert run_benchmark(Odd(), One(), tmp_path).predictions == {"q0": "a\x1e\x85\u2028b\r\nc"}


def test_speed_is_summed_over_processes_and_sessions_as_long_as_all_count(tmp_path):
    write_speed_part(tmp_path, 0, 3, TokenCounts(30, 6))
    write_speed_part(tmp_path, 1, 2, TokenCounts(20, 4))
    assert merge_speed_parts(tmp_path, 5.0) == 5
    write_speed_part(tmp_path, 0, 0, None)
    assert merge_speed_parts(tmp_path, 1.0) == 0  # a session that answered nothing takes no time
    write_speed_part(tmp_path, 0, 1, TokenCounts(10, 2))
    merge_speed_parts(tmp_path, 1.0)
    row = json.loads((tmp_path / "speed.json").read_text())
    assert row == {"seconds": 6.0, "answered": 6, "prompt_tokens": 60, "tokens": 12}
    write_speed_part(tmp_path, 0, 1, None)
    merge_speed_parts(tmp_path, 1.0)
    row = json.loads((tmp_path / "speed.json").read_text())
    assert row == {"seconds": 7.0, "answered": 7, "prompt_tokens": None, "tokens": None}


def test_counts_of_an_interrupted_session_are_dropped(tmp_path):
    write_speed_part(tmp_path, 1, 2, TokenCounts(20, 4))
    delete_speed_parts(tmp_path)
    write_speed_part(tmp_path, 0, 1, TokenCounts(10, 2))
    assert merge_speed_parts(tmp_path, 1.0) == 1


class Stored(Benchmark):
    """A benchmark of one question about an image that is to be turned upright."""

    name, max_new_tokens = "stored", 6

    def load_items(self):
        return [Item("q0", (Message.of("user", Image(sideways()), "what?"),), "", "g")]

    def score(self, answers, protocol="upstream"):
        return BenchmarkResult(0.0, "%", {}, ())


def test_exif_orientation_depends_on_the_protocol(engine, tmp_path):
    expected = {
        applied: engine.with_vision(exif_orientation=applied).complete([Stored().items()[0].messages], SHORT)[0].text
        for applied in (True, False)
    }
    assert expected[True] != expected[False]
    for protocol, applied in (("upstream", False), ("lmms-eval", True)):
        for whose in (engine, engine.with_vision(exif_orientation=not applied)):
            result = run_benchmark(whose, Stored(), tmp_path / f"{protocol}-{whose is engine}", protocol=protocol)
            assert result.predictions == {"q0": expected[applied]}
