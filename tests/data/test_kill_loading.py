"""Data loading that is killed at twenty random moments gives the sequences and pixels of uninterrupted loading."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.reading import write_records

STEPS, KILLS = 400, 20
ROOT = Path(__file__).parents[2]


def start(file, out):
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.data.consume", str(file), str(out), str(STEPS)]
    return subprocess.Popen(command, cwd=ROOT, env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PATH": ""})


@pytest.mark.slow
def test_sequences_after_twenty_kills_equal_those_of_an_uninterrupted_run(tmp_path):
    file = write_records(tmp_path, records=200)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(file, whole).wait() == 0
    rng, kills = random.Random(0), 0
    while kills < KILLS:
        before = len(list(killed.glob("*.json"))) if killed.exists() else 0
        process = start(file, killed)
        wanted = before + rng.randint(1, 12)
        while len(list(killed.glob("*.json"))) < wanted and process.poll() is None:
            pass
        process.kill()
        process.wait()
        kills += 1
    assert 0 < len(list(killed.glob("*.json"))) < STEPS
    assert start(file, killed).wait() == 0
    for name in sorted(path.name for path in whole.glob("*.json")):
        assert json.loads((killed / name).read_text()) == json.loads((whole / name).read_text())
    assert len(list(killed.glob("*.json"))) == STEPS
