"""Worker processes give the sequences, states and errors of one process, and none outlives its parent."""

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
from vila.data.workers import WorkerStreams

POLICY = PackingPolicy(max_length=96, look_ahead=6)


@pytest.fixture
def file(tmp_path):
    return write_records(tmp_path)


@pytest.fixture
def start():
    """Start worker streams, which are closed after the test."""
    made = []

    def make(reader, count=4, policy=POLICY, workers=2, start_method="fork", **options):
        made.append(WorkerStreams(reader, count, policy=policy, workers=workers, start_method=start_method, **options))
        return made[-1]

    yield make
    for streams in made:
        streams.close()


def alone(reader, count=4, policy=POLICY, **options):
    read = {"shorten": reader.shorten, "decode": reader.pixels, "location": reader.mixture.location}
    return PackingStreams(reader, count, policy=policy, **read, **options)


def assert_same_step(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.positions == other.positions
        assert one.state == other.state
        for sample, reference in zip(one, other, strict=True):
            assert sample.id == reference.id
            assert np.array_equal(sample.ids, reference.ids)
        assert np.array_equal(np.array(one.pixels), np.array(other.pixels))


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
def test_sequences_pixels_and_states_equal_those_of_one_process(file, start, method):
    reader = reader_of(file)
    streams, reference = start(reader, start_method=method), alone(reader)
    for _ in range(4):
        assert_same_step(streams.step(), reference.step())
        assert streams.states == reference.states


@pytest.mark.parametrize("workers", [1, 3, 9])
def test_the_sequences_do_not_depend_on_the_number_of_workers(file, start, workers):
    reader = reader_of(file)
    streams, reference = start(reader, workers=workers), alone(reader)
    for _ in range(3):
        assert_same_step(streams.step(), reference.step())


def test_a_checkpoint_resumes_exactly_when_sequences_were_read_ahead(file, start):
    reader = reader_of(file)
    streams, reference = start(reader, prefetch=8), alone(reader)
    for _ in range(3):
        streams.step()
        reference.step()
    states = streams.states
    streams.close()
    again = start(reader, workers=3, states=states)
    for _ in range(3):
        assert_same_step(again.step(), reference.step())


def test_images_are_sent_as_bytes_and_stay_after_the_workers_end(file, start):
    streams = start(reader_of(file), count=1, workers=1)
    (sequence,) = streams.step()
    streams.close()
    (reference,) = alone(reader_of(file), count=1).step()
    assert sequence.pixels.squares.dtype == np.uint8
    assert sequence.pixels.squares.shape == np.array(reference.pixels).shape
    assert len(sequence.pixels) > 1
    for ours, theirs in zip(sequence.pixels, reference.pixels, strict=True):
        assert ours.dtype == np.float32
        assert np.array_equal(ours, theirs)
    assert np.array_equal(np.array(sequence.pixels[1:]), np.array(reference.pixels[1:]))


def test_batches_equal_those_of_one_process(file, start):
    streams, reference = start(reader_of(file)), alone(reader_of(file))
    for _ in range(2):
        sequences, others = streams.step(), reference.step()
        expected = torch.from_numpy(np.stack([one for sequence in others for one in sequence.pixels]))
        for mixed in (sequences, others, [sequences[0], *others[1:]], [others[0], *sequences[1:]]):
            pixels = collate(mixed).pixels
            assert pixels.dtype == torch.float32
            assert torch.equal(pixels, expected)


def test_bad_samples_are_counted_and_listed_as_in_one_process(file, start, tmp_path):
    for number in (1, 4):
        (file.parent / f"{number}.png").write_bytes(b"broken")
    policy = PackingPolicy(max_length=96, look_ahead=6, max_faults=20)
    reader = reader_of(file)
    logs = [BadSampleLog(tmp_path / name, 20) for name in ("a.jsonl", "b.jsonl")]
    streams, reference = start(reader, policy=policy, log=logs[0]), alone(reader, policy=policy, log=logs[1])
    for _ in range(6):
        assert_same_step(streams.step(), reference.step())
    assert logs[0].path.read_text() == logs[1].path.read_text()
    assert logs[0].count > 0


def test_a_damaged_sample_counts_once_over_epochs_and_workers(file, start, tmp_path):
    (file.parent / "4.png").write_bytes(b"broken")
    log = BadSampleLog(tmp_path / "faults.jsonl", 1)
    streams = start(reader_of(file), policy=PackingPolicy(max_length=96, look_ahead=6, max_faults=1), log=log)
    visits = 0
    while visits < 3:
        visits += sum(len(one.bad_samples) for one in streams.step())
    assert log.count == 1 and len(log.path.read_text().splitlines()) == 1


def test_an_error_in_a_worker_is_raised_in_the_parent_with_data_set_and_sample(file, start):
    for image in file.parent.glob("*.png"):
        image.write_bytes(b"broken")
    with pytest.raises(MediaError) as raised:
        start(reader_of(file)).step()
    assert raised.value.record.startswith("data set 'data', sample 'r")


@dataclass(frozen=True)
class Broken:
    """A source with a programming error, or one that kills its process."""

    kill: bool
    unread = MappingProxyType({})
    files = ()

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


def test_an_unexpected_error_in_a_worker_has_the_sample_and_a_traceback(file, start):
    with pytest.raises(DataError) as caught:
        start(broken(file, kill=False), count=1, workers=1).step()
    assert caught.value.record.startswith("data set 'data', sample ") and "position 0" in caught.value.record
    assert "KeyError: 'oops'" in caught.value.problem and "__getitem__" in caught.value.problem


def test_a_killed_worker_is_an_error_with_signal_and_sample(file, start):
    streams = start(broken(file, kill=True), count=1, workers=1)
    with pytest.raises(DataError) as caught:
        streams.step()
    assert "data worker 0" in caught.value.problem and "SIGKILL" in caught.value.problem
    assert caught.value.record.startswith("data set 'data', sample ") and "compute.workers" in caught.value.hint


def test_a_killed_worker_is_an_error_within_the_prefetched_sequences(file, start):
    streams = start(reader_of(file), prefetch=2)
    streams.step()
    streams._workers[1]._process.kill()
    with pytest.raises(DataError) as caught:
        for _ in range(4):
            streams.step()
    assert "data worker 1" in caught.value.problem and "SIGKILL" in caught.value.problem


def test_workers_ignore_sigint_and_sigterm(file, start):
    reader = reader_of(file)
    streams, reference = start(reader), alone(reader)
    assert_same_step(streams.step(), reference.step())
    for worker in streams._workers:
        os.kill(worker._process.pid, signal.SIGINT)
        os.kill(worker._process.pid, signal.SIGTERM)
    for _ in range(3):
        assert_same_step(streams.step(), reference.step())


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


SCRIPT = """
import os, pickle, signal, sys, time
from pathlib import Path
from vila.data.workers import WorkerStreams

if __name__ == "__main__":
    # A background job of a shell inherits an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    reader, policy = pickle.loads(Path(sys.argv[1]).read_bytes())
    streams = WorkerStreams(reader, 4, policy=policy, workers=2, start_method=sys.argv[3])
    streams.step()
    print(*(worker._process.pid for worker in streams._workers), flush=True)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        while True:  # another thread may have received the signal, so pause() might wait for ever
            time.sleep(0.05)
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


def test_closed_streams_continue_at_the_next_step(file, start):
    reader = reader_of(file)
    streams, reference = start(reader), alone(reader)
    for _ in range(3):
        assert_same_step(streams.step(), reference.step())
        streams.close()
