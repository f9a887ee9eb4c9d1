"""`vila eval` on all ten benchmarks, killed and resumed: output is byte-identical to an uninterrupted run."""

import random
import shutil
import signal
import time

import pytest

from tests.eval.eval_processes import QUESTIONS, Death, asked, assert_same, evaluated, left_behind, on_the_disk

KILLED = [-signal.SIGKILL]
MOMENTS = 20


def run_again(reference_run, out, tmp_path):
    """Call the same command once more and compare all that it leaves with an undisturbed run."""
    model, data, whole = reference_run
    assert evaluated(model, data, out) == [0]
    assert_same(left_behind(out, data, tmp_path / "submitted"), whole)


def test_an_uninterrupted_run_answers_every_question(reference_run):
    found = reference_run[2]
    answers = [found[name] for name in found if name.endswith("predictions.jsonl")]
    assert len(answers) == 10
    assert sum(text.count(b"\n") for text in answers) == sum(text.count(b'"text"') for text in answers) == QUESTIONS


@pytest.mark.parametrize(
    ("death", "finished"),
    [
        pytest.param(Death(groups=1), 0, id="after-the-first-group"),
        # VQAv2 has one group, GQA and VizWiz have two: within ScienceQA.
        pytest.param(Death(groups=7, torn=True), 3, id="between-groups-with-a-torn-line"),
        pytest.param(Death(benchmarks=6), 6, id="between-benchmarks"),
    ],
)
def test_a_run_that_is_killed_resumes(reference_run, tmp_path, death, finished):
    model, data, _ = reference_run
    out = tmp_path / "run"
    assert evaluated(model, data, out, death) == KILLED
    assert len(list(out.glob("*/scores.json"))) == finished
    assert not list(out.glob("report.*"))
    answered, timed = on_the_disk(out), asked(out)
    assert 0 < answered < QUESTIONS
    run_again(reference_run, out, tmp_path)
    # Answers on disk were not generated again.
    assert asked(out) - timed == QUESTIONS - answered


@pytest.mark.slow
def test_runs_that_are_killed_at_random_moments_end_alike(reference_run, tmp_path):
    model, data, _ = reference_run
    began = time.monotonic()
    assert evaluated(model, data, tmp_path / "through") == [0]
    whole_s = time.monotonic() - began
    moments, reached = random.Random(0), set()
    for number in range(MOMENTS):
        out, share = tmp_path / f"killed-{number}" / "run", moments.uniform(0.2, 0.95)
        # On a machine that is busy with other things a run may be over before its time: then it is cut off earlier.
        while evaluated(model, data, out, kill_after_s=share * whole_s) != KILLED:
            share *= 0.8
            shutil.rmtree(out)
        reached.add(on_the_disk(out) if out.is_dir() else 0)
        run_again(reference_run, out, out.parent)
    # The moments are random and the machine may be busy, so only ask for some variety.
    assert len(reached) >= 3
