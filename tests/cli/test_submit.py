"""`vila submit`: what of a run has a file, and why the rest has none."""

import json
import sys

import pytest

from tests.cli.printed import counts, words
from tests.eval.mini_datasets import write_mini_datasets, write_mini_run
from vila.core.errors import DataError


def left_out_of(text):
    """The reasons that are printed for benchmarks without a file, by benchmark."""
    lines = [line.removeprefix("left out: ") for line in text.splitlines() if line.startswith("left out: ")]
    return {name: reason for name, _, reason in (line.partition(": ") for line in lines)}


@pytest.fixture
def run(tmp_path):
    data = write_mini_datasets(tmp_path / "eval")
    write_mini_run(
        data, tmp_path / "mine", ("vqav2", "mmbench"), left_out={"vizwiz": "vizwiz: llava_test.jsonl is missing"}
    )
    return tmp_path / "mine"


def test_benchmarks_that_were_not_run_are_reported_and_the_rest_is_written(vila, run, tmp_path):
    code, text, _ = vila("submit", run, "--output", tmp_path / "up")
    assert code == 0
    assert {path.parent.name for path in (tmp_path / "up").glob("*/mine-*")} == {"vqav2", "mmbench"}
    left_out = left_out_of(text)
    assert left_out.keys() == {"vizwiz", "mmbench_cn", "seed"}
    assert "llava_test.jsonl" in words(left_out["vizwiz"])


def test_nothing_is_written_for_benchmarks_that_did_not_finish(vila, run, tmp_path):
    (run / "vqav2" / "predictions.jsonl").rename(run / "vqav2" / "part-0.jsonl")
    (run / "mmbench" / "predictions.jsonl").unlink()
    code, text, _ = vila("submit", run, "--output", tmp_path / "up")
    assert (code, type(vila.error), vila.error.file) == (1, DataError, str(run))
    left_out = left_out_of(text)
    assert left_out.keys() == {"vqav2", "mmbench", "vizwiz", "mmbench_cn", "seed"}
    assert left_out["vqav2"] != left_out["seed"]


def test_unreadable_lines_are_reported_or_errors_as_in_the_original_converters(vila, run, tmp_path):
    for name in ("vqav2", "mmbench"):
        path = run / name / "predictions.jsonl"
        path.write_text(path.read_text() + '{"id": "x", "error": "MediaError: no image"}\n{"question_id": 1, "te')
    code, text, _ = vila("submit", run, "--output", tmp_path / "up")
    assert code == 0
    checks = next(block for block in text.split(str(tmp_path / "up")) if "/vqav2/" in block)
    (failed,) = (line for line in checks.splitlines() if line.endswith(": x"))
    assert counts(checks)["unreadable"] == counts(failed)["questions"] == 1
    assert "mmbench/predictions.jsonl, line " in left_out_of(text)["mmbench"]
    assert not (tmp_path / "up" / "mmbench").exists()


@pytest.mark.parametrize("content", [{}, [], {"benchmarks": ["vqav2"]}, {"benchmarks": {"vqav2": 5}}])
def test_an_eval_json_that_is_none_is_named(vila_error, tmp_path, content):
    (tmp_path / "eval.json").write_text(json.dumps(content))
    error = vila_error("submit", tmp_path)
    assert (type(error), error.file) == (DataError, str(tmp_path / "eval.json"))


def test_without_openpyxl_the_spreadsheet_is_left_out_and_the_rest_is_written(vila, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    code, text, _ = vila("submit", run, "--output", tmp_path / "up")
    assert code == 0
    assert {path.parent.name for path in (tmp_path / "up").glob("*/mine-*")} == {"vqav2"}
    assert left_out_of(text)["mmbench"].endswith("pip install 'vila-vlm[eval]'")
