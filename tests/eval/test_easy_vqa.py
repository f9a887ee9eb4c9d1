"""easy-VQA: scores by hand, and a runner that resumes by id."""

import json

import pytest

from tests import tiny
from tests.eval.checks import refused
from tests.eval.fake_models import FakeModel
from vila.core.errors import DataError, UnknownNameError
from vila.engine.engine import Engine
from vila.eval.benchmark import BENCHMARKS, Answer
from vila.eval.benchmarks.easy_vqa import EasyVqa, category_of
from vila.eval.runner import batches, run_benchmark

QUESTIONS = [
    ["what shape is in the image?", "circle", 0],
    ["is there a red shape?", "no", 0],
    ["what color is the shape?", "red", 1],
    ["is there a red shape?", "yes", 1],
    ["does the image not contain a circle?", "yes", 1],
    ["what shape is in the image?", "circle", 2],
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "test" / "images").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "test" / "images" / f"{number}.png").write_bytes(tiny.image(number).source)
    (tmp_path / "test" / "questions.json").write_text(json.dumps(QUESTIONS))
    return tmp_path


class Oracle(FakeModel):
    """An engine that knows the answers it is given, counts its work, and can break."""

    def __init__(self, answers, break_after=99):
        self.answers, self.asked, self.left = answers, [], break_after

    def generate(self, conversations, sampling):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        self.asked += [c[-1].text for c in conversations]
        return [self.answers[c[-1].text] for c in conversations]


ALWAYS = {q: "yes" if q.startswith(("is", "does")) else "circle" for q, _, _ in QUESTIONS}


def answers(predictions):
    return [Answer(name, text) for name, text in predictions.items()]


def test_scores_worked_out_by_hand(folder):
    benchmark = EasyVqa(folder)
    result = benchmark.score(answers({i.id: ALWAYS[i.messages[-1].text] for i in benchmark.items()}))
    scores = result.metrics
    assert result.score == pytest.approx(100 * 4 / 6)
    assert [mark.value for mark in result.question_scores].count(1.0) == 4
    assert scores["accuracy"] == pytest.approx(4 / 6)  # both circles, yes, yes
    assert scores["majority"] == pytest.approx(2 / 6)  # circle or yes: two of six
    assert scores["blind"] == pytest.approx(5 / 6)  # "is there a red shape?" has one of each
    assert scores["by_type"]["what color"] == {"accuracy": 0.0, "majority": 1.0, "blind": 1.0, "count": 1}
    assert scores["by_type"]["yes/no color"]["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("answer", "right"), [("circle", True), (" circle\n", True), ("Circle", False), ("circle.", False), ("", False)]
)
def test_only_the_whole_answer_counts(folder, answer, right):
    benchmark = EasyVqa(folder)
    predictions = {i.id: i.truth for i in benchmark.items()}
    predictions[benchmark.items()[0].id] = answer
    assert (benchmark.score(answers(predictions)).score == 100) == right


def test_missing_and_unknown_ids_are_named(folder):
    benchmark = EasyVqa(folder)
    predictions = {i.id: "x" for i in benchmark.items()[1:]} | {"9/9": "x"}
    with refused("0/0", "9/9", field="easy_vqa"):
        benchmark.score(answers(predictions))


def test_a_second_answer_is_named(folder):
    benchmark = EasyVqa(folder)
    twice = [Answer(i.id, "x") for i in (*benchmark.items(), benchmark.items()[0])]
    with refused("0/0", field="easy_vqa"):
        benchmark.score(twice)


def test_a_limit_takes_whole_images(folder):
    assert [i.group for i in EasyVqa(folder, limit=3).items()] == ["0", "0", "1", "1", "1"]


def test_categories_of_questions():
    kinds = ["what shape", "yes/no color", "what color", "yes/no color", "yes/no shape", "what shape"]
    assert [category_of(q) for q, _, _ in QUESTIONS] == kinds
    assert category_of("what is the teal shape?") == "what shape"


@pytest.mark.parametrize("row", [["only two", "fields"], "text", [1, "a", 0]])
def test_invalid_question_is_named(folder, row):
    (folder / "test" / "questions.json").write_text(json.dumps([QUESTIONS[0], row]))
    with refused(file="questions.json", record="row 2", value=row):
        EasyVqa(folder).items()


def test_missing_questions_file(tmp_path):
    with refused(file="questions.json"):
        EasyVqa(tmp_path)


def test_interrupted_run_resumes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("vila.eval.runner._BATCH_GROUPS", 1)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(Oracle(ALWAYS, break_after=2), EasyVqa(folder), out)
    rest = Oracle(ALWAYS)
    result = run_benchmark(rest, EasyVqa(folder), out)
    assert rest.asked == ["what shape is in the image?"]
    assert result.scores["accuracy"] == pytest.approx(4 / 6)
    again = Oracle(ALWAYS)
    assert run_benchmark(again, EasyVqa(folder), out).predictions == result.predictions
    assert again.asked == []


def test_a_half_written_last_line_is_asked_again(folder, tmp_path):
    out = tmp_path / "out"
    run_benchmark(Oracle(ALWAYS), EasyVqa(folder), out)
    path = out / "predictions.jsonl"
    path.write_text(path.read_text()[:-5])
    oracle = Oracle(ALWAYS)
    assert len(run_benchmark(oracle, EasyVqa(folder), out).predictions) == len(QUESTIONS)
    assert len(path.read_text().splitlines()) == len(QUESTIONS)


def test_predictions_of_another_model_are_refused(folder, tmp_path):
    run_benchmark(Oracle(ALWAYS), EasyVqa(folder), tmp_path / "out", model_id="one")
    with refused("model: 'one' -> 'two'", file="run.json"):
        run_benchmark(Oracle(ALWAYS), EasyVqa(folder), tmp_path / "out", model_id="two")


def test_a_broken_prediction_line_is_named(folder, tmp_path):
    run_benchmark(Oracle(ALWAYS), EasyVqa(folder), tmp_path / "out")
    path = tmp_path / "out" / "predictions.jsonl"
    whole = path.read_text()
    for line in ("{}", "[]", '{"id": 3, "text": "a"}', '{"id": "a", "text": null}', "[" * 5000, "1" * 5000, "\0"):
        path.write_text(f"{line}\n{whole}")
        with pytest.raises(DataError) as caught:
            run_benchmark(Oracle(ALWAYS), EasyVqa(folder), tmp_path / "out")
        assert (caught.value.file, caught.value.record) == (str(path), "line 1")
    path.write_bytes(b'{"id": "a", "text": "\xff"}\n' + whole.encode())
    with pytest.raises(DataError) as caught:
        run_benchmark(Oracle(ALWAYS), EasyVqa(folder), tmp_path / "out")
    assert caught.value.record == "line 1"


def test_a_real_engine_answers_every_question_twice_alike(folder, tmp_path):
    engine = Engine(*tiny.vila())
    first = run_benchmark(engine, EasyVqa(folder), tmp_path / "a").predictions
    assert run_benchmark(engine, EasyVqa(folder), tmp_path / "b").predictions == first
    assert set(first) == {i.id for i in EasyVqa(folder).items()}


def test_batches_keep_images_whole(folder, monkeypatch):
    monkeypatch.setattr("vila.eval.runner._BATCH_GROUPS", 2)
    assert [[i.group for i in batch] for batch in batches(EasyVqa(folder).items())] == [
        ["1", "1", "1", "0", "0"],  # the most to read first
        ["2"],
    ]


def test_an_unknown_benchmark_suggests_a_near_one():
    with refused("'easy_vqa'", error=UnknownNameError, kind="benchmark", name="easy-vqa"):
        BENCHMARKS["easy-vqa"]
