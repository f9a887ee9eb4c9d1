"""`vila eval`, `vila score`, `vila submit`: a model to scores, anybody's answers to scores, files for servers."""

import json

import pytest

from scripts.make_eval_data import make_eval_data
from tests import tiny
from tests.cli.printed import counts, words
from vila.core.errors import DataError, UnknownNameError
from vila.eval.benchmark import parse_benchmark_names

QUESTIONS = [
    ["what shape is in the image?", "circle", 0],
    ["is there a red shape?", "yes", 0],
    ["what color is the shape?", "teal", 1],
    ["is there a red shape?", "no", 1],
]


@pytest.fixture
def easy(tmp_path):
    for split in ("test", "train"):
        (tmp_path / "easy" / split / "images").mkdir(parents=True)
        for number in range(2):
            (tmp_path / "easy" / split / "images" / f"{number}.png").write_bytes(tiny.image(number).source)
        (tmp_path / "easy" / split / "questions.json").write_text(json.dumps(QUESTIONS))
    return tmp_path / "easy"


def answers(path, texts):
    ids = [f"{image}/{number}" for number, (_, _, image) in enumerate(QUESTIONS)]
    rows = [{"question_id": name, "text": text} for name, text in zip(ids, texts, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_model_is_asked_scored_and_reported(vila, model, easy, tmp_path):
    out = tmp_path / "run"
    code, text, _ = vila("eval", model, "--data", easy, "--output", out, "--json")
    assert code == 0
    row = json.loads(text)
    assert row["benchmark"] == "easy_vqa" and row["count"] == 4
    assert {p.name for p in (out / "easy_vqa").iterdir()} >= {
        "predictions.jsonl",
        "scores.json",
        "question_scores.jsonl",
    }
    assert json.loads((out / "eval.json").read_text())["benchmarks"] == {"easy_vqa": "easy_vqa"}
    assert (out / "report.html").is_file()
    code, text, _ = vila(
        "score", "easy_vqa", "--data", easy, "--predictions", out / "easy_vqa" / "predictions.jsonl", "--json"
    )
    assert code == 0
    assert json.loads(text)["score"] == pytest.approx(row["score"])


def test_answers_of_anybody_are_scored(vila, easy, tmp_path):
    path = answers(tmp_path / "theirs.jsonl", ["circle", "yes", "teal", "yes"])
    code, text, _ = vila("score", "easy_vqa", "--data", easy, "--predictions", path, "--json")
    found = json.loads(text)
    assert (code, found["score"], found["unit"], found["protocol"]) == (0, 75.0, "%", "upstream")
    assert found["interval"]["questions"] == 4


def test_two_files_are_compared(vila, easy, tmp_path):
    ours = answers(tmp_path / "ours.jsonl", ["circle", "yes", "teal", "no"])
    theirs = answers(tmp_path / "theirs.jsonl", ["circle", "no", "teal", "yes"])
    code, text, _ = vila("score", "easy_vqa", "--data", easy, "--predictions", ours, "--compare", theirs)
    assert code == 0
    first, *_, last = text.splitlines()
    assert words(first) >= {"easy_vqa", "100.00"}
    assert words(last) >= {str(theirs), "+50.00"}
    assert (counts(last)["better"], counts(last)["worse"]) == (2, 0)


def test_questions_of_one_file_alone_are_counted_in_a_comparison(vila, tmp_path):
    make_eval_data(tmp_path / "eval")
    asked = [json.loads(line) for line in (tmp_path / "eval/pope/llava_pope_test.jsonl").read_text().splitlines()]
    for name, kept in (("all", asked), ("some", asked[:-3])):
        rows = [{"question_id": row["question_id"], "text": "yes"} for row in kept]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call = ("score", "pope", "--data", tmp_path / "eval", "--predictions", tmp_path / "all.jsonl")
    code, text, _ = vila(*call, "--compare", tmp_path / "some.jsonl")
    assert code == 0
    (note,) = (line for line in text.splitlines() if line.startswith("  note: "))
    assert counts(note)["questions"] == 3


@pytest.mark.parametrize(
    ("content", "record", "field"),
    [
        (None, None, None),
        ("", None, None),
        ('{"question_id": "0/0", "text": "x"}\n{"question_id": "0/1", "te', "line 2", None),
        ('{"question_id": "0/0"}\n', "line 1", "text"),
        ('{"text": "x"}\n', "line 1", "question_id"),
    ],
)
def test_a_bad_file_of_answers_is_named(vila_error, easy, tmp_path, content, record, field):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    error = vila_error("score", "easy_vqa", "--data", easy, "--predictions", path)
    assert (type(error), error.file, error.record, error.field) == (DataError, str(path), record, field)


@pytest.mark.parametrize(("ids", "file", "named"), [(["9/9"], None, "9/9"), (["0/0", "0/0"], "{path}, line 2", "0/0")])
def test_answers_to_no_question_or_to_one_twice_are_named(vila_error, easy, tmp_path, ids, file, named):
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps({"question_id": name, "text": "x"}) + "\n" for name in ids))
    error = vila_error("score", "easy_vqa", "--data", easy, "--predictions", path)
    assert (type(error), error.field) == (DataError, "easy_vqa")
    assert error.file == (file and file.format(path=path))
    assert named in words(error.problem)


def test_an_unknown_protocol_is_named(vila_error, easy, tmp_path):
    path = answers(tmp_path / "a.jsonl", ["x"] * 4)
    error = vila_error("score", "easy_vqa", "--data", easy, "--predictions", path, "--protocol", "mine")
    assert (error.exit_code, error.field) == (2, "--protocol")


def test_benchmarks_go_by_the_names_they_are_published_with_too():
    assert parse_benchmark_names("SQA-I, MMBench-CN, seed_bench, VQA-T, MME, sqa") == [
        "scienceqa", "mmbench_cn", "seed", "textvqa", "mme",
    ]  # fmt: skip
    with pytest.raises(UnknownNameError) as caught:
        parse_benchmark_names("MMBench-DE")
    assert caught.value.name == "MMBench-DE"


def test_a_run_without_submissions_is_an_error(vila, vila_error, model, easy, tmp_path):
    out = tmp_path / "run"
    error = vila_error("submit", tmp_path)
    assert (type(error), error.file) == (DataError, str(tmp_path))
    vila("eval", model, "--data", easy, "--output", out)
    code, _, _ = vila("submit", out, "--output", tmp_path / "upload")
    assert (code, type(vila.error), vila.error.file) == (1, DataError, str(out))


def test_benchmarks_without_data_are_skipped(vila, model, easy, tmp_path):
    out = tmp_path / "run"
    code, text, err = vila("eval", model, "--benchmarks", "pope,easy_vqa", "--data", easy, "--output", out, "--json")
    assert code == 0
    assert [json.loads(line)["benchmark"] for line in text.splitlines()] == ["easy_vqa"]
    assert "pope" in words(err)
    assert json.loads((out / "eval.json").read_text())["left_out"].keys() == {"pope"}
