"""`vila eval --num-fewshot`: questions after worked examples, correct and wrong, in one command and one report."""

import json

import pytest

from tests import tiny
from vila.core.errors import ConfigError, DataError

QUESTIONS = [
    ["what shape is in the image?", "circle", 0],
    ["is there a red shape?", "yes", 0],
    ["what shape is in the image?", "square", 1],
    ["is there a red shape?", "no", 1],
]


@pytest.fixture
def easy(tmp_path):
    for number, split in enumerate(("test", "train")):
        (tmp_path / "easy" / split / "images").mkdir(parents=True)
        for index in range(2):
            image = tiny.image(10 * number + index)
            (tmp_path / "easy" / split / "images" / f"{index}.png").write_bytes(image.source)
        (tmp_path / "easy" / split / "questions.json").write_text(json.dumps(QUESTIONS))
    return tmp_path / "easy"


def test_each_number_of_examples_is_run_with_true_and_with_wrong_answers(vila, model, easy, tmp_path):
    out = tmp_path / "run"
    code, text, _ = vila("eval", model, "--data", easy, "--num-fewshot", "0,1,2", "--output", out, "--json")
    assert code == 0
    rows = {row["benchmark"]: row for row in map(json.loads, text.splitlines())}
    assert list(rows) == ["easy_vqa", *(f"easy_vqa_{k}shot{wrong}" for k in (1, 2) for wrong in ("", "_shuffled"))]
    assert [rows[f"easy_vqa_2shot{wrong}"]["shot_answers"] for wrong in ("", "_shuffled")] == ["true", "wrong"]
    assert rows["easy_vqa_1shot"]["shots"] == 1 and rows["easy_vqa_1shot"]["count"] == 4
    markdown = (out / "report.md").read_text()
    table = markdown[markdown.index("## Few-shot: easy\\_vqa") :]
    lines = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert lines[:5] == ["examples", "---", "0", "1", "2"]
    assert 'id="few-shot-easy-vqa"' in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("shots", "kind", "field"),
    [
        ("two", ConfigError, "--num-fewshot"),
        ("0,,2", ConfigError, "--num-fewshot"),
        ("-1", ConfigError, "--num-fewshot"),
        ("3", DataError, "easy_vqa_3shot"),
    ],
)
def test_impossible_numbers_of_examples_are_refused_before_anything_is_asked(
    vila_error, model, easy, tmp_path, shots, kind, field
):
    error = vila_error("eval", model, "--data", easy, f"--num-fewshot={shots}", "--output", tmp_path / "run")
    assert (type(error), error.field) == (kind, field)
    assert not list(tmp_path.glob("run/**/predictions.jsonl"))
