"""A download killed with SIGKILL at random moments and resumed gives the result of an uninterrupted one."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.prepare.image_server import ImageServer, serving

IN_FLIGHT = 12
WORK = f"""
import sys
from pathlib import Path
from vila.media.http_options import DownloadOptions
from vila.prepare.mmc4 import prepare_mmc4
options = DownloadOptions(
    max_connections={IN_FLIGHT}, max_connections_per_host=64, host_delay_s=0, initial_backoff_s=0.01, allow_private=True
)
source, out = map(Path, sys.argv[1:])
prepare_mmc4(sorted(source.glob("*.jsonl")), out, download=options, per_shard=5)
"""


def make_source(folder: Path, home: str, documents: int) -> Path:
    folder.mkdir()
    for shard in range(3):
        lines = []
        for number in range(documents):
            first = (shard * documents + number) * 5
            paths = [f"/good/{first + n}" for n in range(4)] + [f"/missing-{first}"]
            infos = [{"raw_url": home + path, "matched_text_index": 0} for path in paths]
            lines.append(json.dumps({"text_list": ["Some."], "image_info": infos}) + "\n")
        (folder / f"s{shard}.jsonl").write_text("".join(lines))
    return folder


def start(source: Path, out: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WORK, str(source), str(out)], stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()


def killed(process: subprocess.Popen, server: ImageServer, after_requests: int, wait_s: float) -> bool:
    """Kill it `wait_s` after the server got `after_requests` more requests; False if it ended before."""
    until = server.asked.total() + after_requests
    while process.poll() is None and server.asked.total() < until:
        time.sleep(0.001)
    time.sleep(wait_s)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def finished_files(out: Path) -> dict[str, bytes]:
    files = (path for path in out.rglob("*") if path.is_file() and "parts" not in path.parts)
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def compare(tmp_path: Path, kills: int, documents: int) -> None:
    chance = random.Random(0)
    with serving() as server:
        server.delay_s = 0.01
        source = make_source(tmp_path / "source", server.home, documents)
        finish(start(source, tmp_path / "alone"))
        total = server.asked.total()
        assert total == documents * 3 * 5
        server.asked.clear()
        done = 0
        for kill in range(kills):
            share = (total - server.asked.total()) / (kills - kill + 1)
            after = chance.randint(0, max(1, int(share * 1.5)))
            done += killed(start(source, tmp_path / "killed"), server, after, chance.uniform(0, 0.02))
        finish(start(source, tmp_path / "killed"))
        assert done >= kills - 1  # the last may have come too late
        assert server.asked.total() <= total + done * IN_FLIGHT
    alone, again = finished_files(tmp_path / "alone"), finished_files(tmp_path / "killed")
    assert json.loads(alone["index.json"])["counts"]["out"] == documents * 3
    assert again == alone


def test_a_download_killed_three_times_equals_an_uninterrupted_one(tmp_path):
    compare(tmp_path, kills=3, documents=8)


@pytest.mark.slow
def test_a_download_killed_twenty_times_equals_an_uninterrupted_one(tmp_path):
    compare(tmp_path, kills=20, documents=100)
