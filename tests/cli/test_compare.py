"""`vila compare`: two runs side by side on the terminal, on a page and as JSON."""

import json
import re

import pytest

from vila.core.errors import DataError
from vila.core.files import write_json, write_jsonl


def written(folder, right, count=40):
    """A run of easy_vqa in which the questions of `right` are answered as they should be."""
    marks = [{"id": f"q{n}", "value": float(n in right), "group": f"p{n}", "answer": str(n)} for n in range(count)]
    own = {"benchmark": "easy_vqa", "rules": "upstream", "score": 100 * len(right) / max(count, 1), "unit": "%"}
    write_json(folder / "easy_vqa" / "scores.json", own)
    write_jsonl(folder / "easy_vqa" / "question_scores.jsonl", marks)
    write_json(folder / "eval.json", {"model": folder.name, "data": "", "benchmarks": {"easy_vqa": "easy_vqa"}})
    return folder


@pytest.fixture
def runs(tmp_path):
    return written(tmp_path / "base", range(20)), written(tmp_path / "mine", range(30))


def test_two_runs_are_shown_side_by_side(vila, runs, tmp_path):
    code, text, _ = vila("compare", *runs, "--output", tmp_path / "out")
    assert code == 0
    row = next(line for line in text.splitlines() if "easy_vqa" in line and "25.00" in line)
    cells = re.split(r"\s{2,}", row.strip())
    assert cells[:4] == ["easy_vqa", "50.00", "75.00", "+25.00"]
    # All ten changes one way: chance gives that twice in 2^10.
    assert float(cells[5]) < 0.006 and cells[6:] == ["10", "0"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.html", "compare.md", "compare.json"}


def test_json_output_is_written_next_to_the_second_run_by_default(vila, runs):
    code, text, _ = vila("compare", *runs, "--json")
    assert code == 0
    found = json.loads(text)
    assert found == json.loads((runs[1] / "compare" / "compare.json").read_text())
    assert (found["benchmarks"]["easy_vqa"]["better"], found["not_compared"]) == (10, {})


def test_a_run_that_is_worse_is_a_failure_when_that_is_asked_for(vila, runs):
    base, mine = runs
    assert vila("compare", mine, base)[0] == 0
    code, _, error = vila("compare", mine, base, "--fail-on-regression")
    assert (code, error) == (1, "worse: easy_vqa")
    assert vila("compare", base, mine, "--fail-on-regression")[0] == 0
    # One question of forty is no difference.
    nearly = written(base.parent / "nearly", range(1, 20))
    assert vila("compare", base, nearly, "--fail-on-regression")[0] == 0


def test_a_directory_that_is_no_run_is_named(vila_error, runs, tmp_path):
    error = vila_error("compare", runs[0], tmp_path / "none")
    assert (type(error), error.file) == (DataError, str(tmp_path / "none"))
    other = written(tmp_path / "other", [], count=0)
    error = vila_error("compare", runs[0], other, "--output", tmp_path / "out")
    assert (type(error), error.file) == (DataError, str(other))
    assert not (tmp_path / "out").exists()
