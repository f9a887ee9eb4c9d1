"""One process at a time writes a directory."""

import errno
import json
import os
import socket
import subprocess
import sys

import pytest

from vila.core.errors import DirectoryInUseError
from vila.core.files import DirectoryLock

HOLDER = (
    "import sys; from pathlib import Path; from vila.core.files import DirectoryLock\n"
    "lock = DirectoryLock(Path(sys.argv[1])).acquire(shared=bool(sys.argv[2])); print('locked', flush=True)\n"
    "sys.stdin.read()"
)


@pytest.fixture
def other(tmp_path):
    """Start another process that holds the lock; returns the process."""
    started = []

    def start(shared=False):
        command = [sys.executable, "-c", HOLDER, str(tmp_path), "1" if shared else ""]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_with_host_and_pid_of_the_first(tmp_path, other):
    process = other()
    with pytest.raises(DirectoryInUseError) as caught:
        DirectoryLock(tmp_path).acquire()
    assert caught.value.file == str(tmp_path)
    assert (caught.value.host, caught.value.pid) == (socket.gethostname(), process.pid)


def test_the_lock_of_a_killed_process_is_free(tmp_path, other):
    process = other()
    process.kill()
    process.wait()
    assert (tmp_path / ".lock").is_file()
    with DirectoryLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_shared_locks_go_together_and_keep_an_exclusive_one_out(tmp_path, other):
    process = other(shared=True)
    shared = DirectoryLock(tmp_path).acquire(shared=True)
    shared.release()
    with pytest.raises(DirectoryInUseError):
        DirectoryLock(tmp_path).acquire()
    process.communicate()
    DirectoryLock(tmp_path).acquire().release()


def test_locks_of_different_names_do_not_exclude_each_other(tmp_path, other):
    other()
    DirectoryLock(tmp_path, ".lock-1-of-2").acquire().release()


def test_a_second_lock_of_one_process_takes_over(tmp_path):
    first = DirectoryLock(tmp_path).acquire()
    with DirectoryLock(tmp_path):
        first.release()
        assert (tmp_path / ".lock").is_file()


def test_the_directory_may_be_deleted_under_the_lock(tmp_path):
    lock = DirectoryLock(tmp_path / "d").acquire()
    (tmp_path / "d" / ".lock").unlink()
    (tmp_path / "d").rmdir()
    lock.release()


@pytest.mark.parametrize(
    ("owner", "refused"),
    [
        ({"host": socket.gethostname(), "pid": os.getppid()}, True),
        ({"host": socket.gethostname(), "pid": 2**22 + 1}, False),
        ({"host": "another-host", "pid": os.getppid()}, False),
        ({"host": socket.gethostname(), "pid": "text"}, False),
        ([], False),
    ],
)
def test_without_locks_the_file_is_asked_and_a_note_is_given(tmp_path, monkeypatch, owner, refused):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    class EventLog:
        def __init__(self):
            self.lines = []

        def log(self, text):
            self.lines.append(text)

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / ".lock").write_text(json.dumps(owner))
    events = EventLog()
    if refused:
        with pytest.raises(DirectoryInUseError) as caught:
            DirectoryLock(tmp_path).acquire(events=events)
        assert caught.value.pid == owner["pid"]
    else:
        DirectoryLock(tmp_path).acquire(events=events).release()
        assert len(events.lines) == 1
