"""`vila run OWNER/NAME` against a hub on this machine, in processes of their own: HF_ENDPOINT is read at import."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.hub_stub import REPOSITORY, hub
from tests.model.layouts.published import FIXTURES

COMMAND = [str(Path(sys.executable).with_name("vila")), "run", REPOSITORY, "--template", "vicuna_v1"]


def run(environment, *words):
    return subprocess.run(
        [*COMMAND, "--prompt", "Hi", "--max-new-tokens", "4", "--json", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


def test_a_repository_is_fetched_once_and_then_needs_no_network(tmp_path):
    folder = FIXTURES["v1-tower-inside"](tmp_path / "made").folder
    # Its tower is a directory beside the checkpoint; on a hub the weights inside are found by a known name.
    (folder / "README.md").write_text("not needed")
    tower = tmp_path / "tower"
    (tmp_path / "made" / "tower").rename(tower)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "mm_vision_tower": str(tower)}))
    with hub({"main": folder, "v1": folder}) as (address, stub):
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        first = run(environment, "--revision", "v1")
        assert first.returncode == 0, first.stderr
        assert sorted(stub.fetched) == ["config.json", "model.safetensors", "tokenizer.model"]
        asked = stub.requests
        second = run({**environment, "HF_HUB_OFFLINE": "1"}, "--revision", "v1")
        assert second.returncode == 0, second.stderr
        assert json.loads(second.stdout)["text"] == json.loads(first.stdout)["text"]
        assert stub.requests == asked
