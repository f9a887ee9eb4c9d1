"""The original's script for all benchmarks, by its name and positional arguments, over `vila eval` and `vila score`."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "v1_5" / "eval" / "eval_all.sh"
# Says what it was asked; "eval" leaves answers to two benchmarks and ends as it does when a question failed.
VILA = """#!/bin/bash
printf "%s\\n" "$@"
[ "$1" = eval ] || exit 0
for name in gqa pope; do mkdir -p eval_output/mine/$name; touch eval_output/mine/$name/predictions.jsonl; done
exit 1
"""
ASKED = ["eval", "ckpt", "--benchmarks", "all", "--data", "playground/data/eval", "--output", "eval_output/mine"]


@pytest.fixture
def call(tmp_path):
    (tmp_path / "vila").write_text(VILA)
    (tmp_path / "vila").chmod(0o755)

    def run(*arguments):
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["bash", str(SCRIPT), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize(
    ("more", "passed"),
    [
        ([], []),
        ([""], []),
        (["llama_3"], ["--template", "llama_3"]),
        (["--limit", "5"], ["--limit", "5"]),
        (["hermes-2", "--device", "cpu"], ["--template", "hermes-2", "--device", "cpu"]),
    ],
)
def test_arguments_are_the_published_ones(call, more, passed):
    assert call("ckpt", "mine", *more).stdout.splitlines() == [*ASKED, *passed]


def test_every_benchmark_has_its_figures_in_the_published_place_and_the_status_is_that_of_the_run(call, tmp_path):
    assert call("ckpt", "mine").returncode == 1
    out = tmp_path / "eval_output" / "mine"
    assert sorted(path.name for path in out.glob("*.txt")) == ["gqa.txt", "pope.txt"]
    asked = ["score", "gqa", "--data", "playground/data/eval", "--predictions", "eval_output/mine/gqa"]
    assert (out / "gqa.txt").read_text().splitlines() == asked


def test_a_name_is_needed(call):
    done = call("ckpt")
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: " in done.stderr
