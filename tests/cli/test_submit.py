"""`vila submit`: what of a run has a file, and why the rest has none."""

import json
import sys

import pytest

from tests.eval.mini import mini_data, mini_run


@pytest.fixture
def run(tmp_path):
    data = mini_data(tmp_path / "eval")
    mini_run(data, tmp_path / "mine", ("vqav2", "mmbench"), left_out={"vizwiz": "vizwiz: llava_test.jsonl is missing"})
    return tmp_path / "mine"


def test_what_was_not_run_is_said_and_the_rest_is_written(vila, run, tmp_path):
    code, text, _ = vila("submit", run, "--output", tmp_path / "up")
    assert code == 0
    assert {path.parent.name for path in (tmp_path / "up").glob("*/mine-*")} == {"vqav2", "mmbench"}
    for reason in ("vizwiz: not run (vizwiz: llava_test.jsonl is missing)", "mmbench_cn: not run", "seed: not run"):
        assert f"left out: {reason}" in text


def test_a_run_that_was_cut_short_is_told_from_one_that_never_began(vila, run, tmp_path):
    (run / "vqav2" / "predictions.jsonl").rename(run / "vqav2" / "part-0.jsonl")
    (run / "mmbench" / "predictions.jsonl").unlink()
    code, text, error = vila("submit", run, "--output", tmp_path / "up")
    assert (code, "nothing to submit" in error) == (1, True)
    assert "left out: vqav2: not finished" in text
    assert "mmbench: not run; no " in text


def test_lines_that_cannot_be_read_are_told_or_refused_as_by_the_originals_converters(vila, run, tmp_path):
    for name in ("vqav2", "mmbench"):
        path = run / name / "predictions.jsonl"
        path.write_text(path.read_text() + '{"id": "x", "error": "MediaError: no image"}\n{"question_id": 1, "te')
    code, text, _ = vila("submit", run, "--output", tmp_path / "up")
    assert code == 0
    assert "1 unreadable lines" in text and "1 questions failed: x" in text
    assert "left out: mmbench: " in text and "mmbench/predictions.jsonl, line " in text
    assert not (tmp_path / "up" / "mmbench").exists()


@pytest.mark.parametrize("content", [{}, [], {"benchmarks": ["vqav2"]}, {"benchmarks": {"vqav2": 5}}])
def test_notes_on_a_run_that_cannot_be_read_are_named(vila, tmp_path, content):
    (tmp_path / "eval.json").write_text(json.dumps(content))
    code, _, error = vila("submit", tmp_path)
    assert code == 1
    assert "eval.json: " in error


def test_without_openpyxl_the_spreadsheet_is_left_out_and_the_rest_is_written(vila, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    code, text, _ = vila("submit", run, "--output", tmp_path / "up")
    assert code == 0
    assert {path.parent.name for path in (tmp_path / "up").glob("*/mine-*")} == {"vqav2"}
    (line,) = [line for line in text.splitlines() if line.startswith("left out: mmbench:")]
    assert "pip install 'vila-vlm[eval]'" in line
