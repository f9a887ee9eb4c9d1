"""`vila eval` in two processes: same output as one process, also after a process died."""

import signal

from tests.eval.eval_processes import QUESTIONS, Death, asked, assert_same, evaluated, left_behind, on_the_disk
from vila.core.reading import read_json


def test_two_processes_write_the_files_of_one(reference_run, tmp_path):
    model, data, whole = reference_run
    out = tmp_path / "run"
    assert evaluated(model, data, out, world=2) == [0, 0]
    assert_same(left_behind(out, data, tmp_path / "submitted"), whole)
    assert asked(out) == QUESTIONS
    assert read_json(out / "gqa" / "speed.json")["tokens"] > 9


def test_no_report_after_a_process_died_and_one_process_resumes(reference_run, tmp_path):
    model, data, whole = reference_run
    out = tmp_path / "run"
    output, died = evaluated(model, data, out, Death(groups=2, rank=1), world=2)
    assert died == -signal.SIGKILL
    assert "error: " in output
    assert sorted(path.parent.name for path in out.glob("*/scores.json")) == ["gqa", "vqav2"]
    assert not list(out.glob("report.*")) and not (out / "eval.json").exists()
    answered, timed = on_the_disk(out), asked(out)
    assert evaluated(model, data, out) == [0]
    assert_same(left_behind(out, data, tmp_path / "submitted"), whole)
    assert asked(out) - timed == QUESTIONS - answered


def test_two_processes_resume_the_run_of_one(reference_run, tmp_path):
    model, data, whole = reference_run
    out = tmp_path / "run"
    assert evaluated(model, data, out, Death(groups=9, torn=True)) == [-signal.SIGKILL]
    assert evaluated(model, data, out, world=2) == [0, 0]
    assert_same(left_behind(out, data, tmp_path / "submitted"), whole)
