"""Workers change nothing but the time: the same rows, states, errors; and none outlives its parent."""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch

from tests.data.reading import reader_of, write_records
from vila.core.errors import DataError, MediaError
from vila.data.bad_samples import BadSampleLog
from vila.data.collate import collate
from vila.data.packing import PackingPolicy, PackingStreams
from vila.data.workers import START_METHODS, WorkerStreams

POLICY = PackingPolicy(max_length=96, look_ahead=6)


@pytest.fixture
def file(tmp_path):
    return write_records(tmp_path)


@pytest.fixture
def start():
    """Worker lanes that are closed after the test."""
    made = []

    def make(reader, count=4, policy=POLICY, workers=2, start_method="fork", **options):
        made.append(WorkerStreams(reader, count, policy=policy, workers=workers, start_method=start_method, **options))
        return made[-1]

    yield make
    for lanes in made:
        lanes.close()


def alone(reader, count=4, policy=POLICY, **options):
    read = {"shorten": reader.shorten, "decode": reader.pixels, "location": reader.location}
    return PackingStreams(reader, count, policy=policy, **read, **options)


def assert_same_step(ours, theirs):
    for row, other in zip(ours, theirs, strict=True):
        assert row.positions == other.positions
        assert row.state == other.state
        for sample, reference in zip(row, other, strict=True):
            assert sample.id == reference.id
            assert np.array_equal(sample.ids, reference.ids)
        assert np.array_equal(np.array(row.pixels), np.array(other.pixels))


@pytest.mark.parametrize("method", START_METHODS)
def test_rows_pixels_and_states_are_those_of_one_process(file, start, method):
    reader = reader_of(file)
    lanes, reference = start(reader, start_method=method), alone(reader)
    for _ in range(4):
        assert_same_step(lanes.step(), reference.step())
        assert lanes.states == reference.states


@pytest.mark.parametrize("workers", [1, 3, 9])
def test_any_number_of_workers_gives_the_same(file, start, workers):
    reader = reader_of(file)
    lanes, reference = start(reader, workers=workers), alone(reader)
    for _ in range(3):
        assert_same_step(lanes.step(), reference.step())


def test_a_checkpoint_taken_with_rows_read_ahead_resumes_exactly(file, start):
    reader = reader_of(file)
    lanes, reference = start(reader, prefetch=8), alone(reader)
    for _ in range(3):
        lanes.step()
        reference.step()
    states = lanes.states
    lanes.close()
    again = start(reader, workers=3, states=states)
    for _ in range(3):
        assert_same_step(again.step(), reference.step())


def test_pictures_cross_as_bytes_and_outlive_the_workers(file, start):
    lanes = start(reader_of(file), count=1, workers=1)
    (row,) = lanes.step()
    lanes.close()
    (reference,) = alone(reader_of(file), count=1).step()
    assert row.pixels.squares.dtype == np.uint8
    assert row.pixels.squares.shape == np.array(reference.pixels).shape
    assert len(row.pixels) > 1
    for ours, theirs in zip(row.pixels, reference.pixels, strict=True):
        assert ours.dtype == np.float32
        assert np.array_equal(ours, theirs)
    assert np.array_equal(np.array(row.pixels[1:]), np.array(reference.pixels[1:]))


def test_batches_of_worker_rows_are_those_of_one_process(file, start):
    lanes, reference = start(reader_of(file)), alone(reader_of(file))
    for _ in range(2):
        rows, others = lanes.step(), reference.step()
        expected = torch.from_numpy(np.stack([one for row in others for one in row.pixels]))
        for mixed in (rows, others, [rows[0], *others[1:]], [others[0], *rows[1:]]):
            pixels = collate(mixed).pixels
            assert pixels.dtype == torch.float32
            assert torch.equal(pixels, expected)


def test_faults_are_counted_and_listed_as_in_one_process(file, start, tmp_path):
    for number in (1, 4):
        (file.parent / f"{number}.png").write_bytes(b"broken")
    policy = PackingPolicy(max_length=96, look_ahead=6, max_faults=20)
    reader = reader_of(file)
    logs = [BadSampleLog(tmp_path / name, 20) for name in ("a.jsonl", "b.jsonl")]
    lanes, reference = start(reader, policy=policy, log=logs[0]), alone(reader, policy=policy, log=logs[1])
    for _ in range(6):
        assert_same_step(lanes.step(), reference.step())
    assert logs[0].path.read_text() == logs[1].path.read_text()
    assert logs[0].count > 0


def test_a_damaged_sample_counts_once_over_epochs_and_workers(file, start, tmp_path):
    (file.parent / "4.png").write_bytes(b"broken")
    log = BadSampleLog(tmp_path / "faults.jsonl", 1)
    lanes = start(reader_of(file), policy=PackingPolicy(max_length=96, look_ahead=6, max_faults=1), log=log)
    visits = 0
    while visits < 3:
        visits += sum(len(row.bad_samples) for row in lanes.step())
    assert log.count == 1 and len(log.path.read_text().splitlines()) == 1


def test_an_error_in_a_worker_is_raised_here_with_data_set_and_sample(file, start):
    for picture in file.parent.glob("*.png"):
        picture.write_bytes(b"broken")
    with pytest.raises(MediaError, match="not an image") as raised:
        start(reader_of(file)).step()
    assert raised.value.record.startswith("data set 'data', sample 'r")


@dataclass(frozen=True)
class Broken:
    """A source with a programming error in it, or one that takes its process down."""

    kill: bool
    unread = MappingProxyType({})

    def location(self, index):
        return "broken", index

    def __len__(self):
        return 50

    def __getitem__(self, index):
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("oops")


def broken(file, kill):
    reader = reader_of(file)
    part = reader.mixture.datasets[0]
    from dataclasses import replace

    from vila.data.mixture import Mixture

    return replace(reader, mixture=Mixture([replace(part, source=Broken(kill))], 0))


def test_an_unforeseen_error_in_a_worker_names_the_sample_and_the_place_in_the_code(file, start):
    with pytest.raises(
        DataError, match=r"(?s)data set 'data', sample \d+ \(position 0\): KeyError: 'oops'.*__getitem__"
    ):
        start(broken(file, kill=False), count=1, workers=1).step()


def test_a_worker_that_dies_is_an_error_with_signal_sample_and_remedy(file, start):
    lanes = start(broken(file, kill=True), count=1, workers=1)
    with pytest.raises(
        DataError, match=r"data worker 0 ended \(signal SIGKILL; out of memory\?\) at data set 'data', sa"
    ):
        lanes.step()


def test_a_worker_that_was_killed_is_noticed_within_the_rows_read_ahead(file, start):
    lanes = start(reader_of(file), prefetch=2)
    lanes.step()
    lanes._workers[1]._process.kill()
    with pytest.raises(DataError, match=r"data worker 1 ended \(signal SIGKILL"):
        for _ in range(4):
            lanes.step()


def test_ctrl_c_and_sigterm_leave_the_workers_to_their_parent(file, start):
    reader = reader_of(file)
    lanes, reference = start(reader), alone(reader)
    assert_same_step(lanes.step(), reference.step())
    for worker in lanes._workers:
        os.kill(worker._process.pid, signal.SIGINT)
        os.kill(worker._process.pid, signal.SIGTERM)
    for _ in range(3):
        assert_same_step(lanes.step(), reference.step())


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


SCRIPT = """
import os, pickle, signal, sys
from pathlib import Path
from vila.data.workers import WorkerStreams

if __name__ == "__main__":
    reader, policy = pickle.loads(Path(sys.argv[1]).read_bytes())
    lanes = WorkerStreams(reader, 4, policy=policy, workers=2, start_method=sys.argv[3])
    lanes.step()
    print(*(worker._process.pid for worker in lanes._workers), flush=True)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
"""


@pytest.mark.parametrize(
    ("end", "method"), [("return", "forkserver"), ("interrupt", "forkserver"), ("kill", "forkserver"), ("kill", "fork")]
)
def test_no_worker_outlives_its_parent(file, end, method, tmp_path):
    (tmp_path / "job").write_bytes(pickle.dumps((reader_of(file), POLICY)))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "job"), end, method], capture_output=True, text=True, timeout=20,
        env={**os.environ, "PYTHONPATH": str(Path.cwd() / "src")},
    )  # fmt: skip
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 10
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(map(gone, pids))


def test_closed_lanes_go_on_where_they_were(file, start):
    reader = reader_of(file)
    lanes, reference = start(reader), alone(reader)
    for _ in range(3):
        assert_same_step(lanes.step(), reference.step())
        lanes.close()
