"""Processes that read, tokenise and decode ahead of training. Each owns whole lanes, so rows are those of one process.

A worker makes a row of a lane whenever it is asked to, and is asked for a few more than have been used. With every row
comes the state of its lane; the state to save is that of the rows that were used, whatever has been read ahead.
"""

from __future__ import annotations

import atexit
import mmap
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from ctypes import c_longlong
from dataclasses import dataclass, replace
from itertools import cycle
from multiprocessing.connection import Connection
from typing import Any, overload

import numpy as np

from vila.core.errors import DataError, VilaError
from vila.core.vision_spec import VisionSpec
from vila.data.bad_samples import BadSampleLog
from vila.data.dataset import SampleReader
from vila.data.packing import PackedSequence, PackingPolicy, PackingStream, PackingStreamState, Pixels, streams_of_rank
from vila.media.transform import Bytes, normalise

# --- shared
# Rows between processes: what is small goes through a pipe, pictures lie in memory that both processes map.


@dataclass(frozen=True, eq=False)
class SharedPixels(Sequence[Pixels]):
    """The pictures of a row as a worker wrote them; each is normalised, float32 [3, S, S], when it is asked for.

    squares: uint8 [N, 3, S, S], in memory that lives as long as an array looks into it.
    """

    squares: Bytes
    spec: VisionSpec

    def __len__(self) -> int:
        return len(self.squares)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Pixels]: ...

    def __getitem__(self, index: int | slice) -> Pixels | Sequence[Pixels]:
        return normalise(self.squares[index], self.spec)

    def write(self, out: Pixels) -> None:
        """Normalise all pictures into `out`, float32 [N, 3, S, S]."""
        normalise(self.squares, self.spec, out)


def send_row(connection: Connection, row: PackedSequence) -> None:
    """Send a row over a duplex pipe. Its `pixels` are squares of uint8 here: see `SampleReader.squares`."""
    shape = () if row.pixels is None else (len(row.pixels), *(row.pixels[0].shape if len(row.pixels) else ()))
    connection.send_bytes(pickle.dumps((replace(row, pixels=None), row.pixels is not None, shape)))
    if row.pixels is None or not len(row.pixels):
        return
    file = _anonymous_file()
    try:
        for picture in row.pixels:
            # Writing takes half the time of filling a mapping, whose pages are cleared and faulted in first.
            _write(file, np.ascontiguousarray(picture).data.cast("B"))
        with _socket_of(connection) as carrier:
            socket.send_fds(carrier, [b"f"], [file])
    finally:
        os.close(file)


def _write(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]


def receive_row(connection: Connection, spec: VisionSpec) -> PackedSequence:
    """The next row of a pipe; its pictures are normalised as `spec` says.

    Raises EOFError when the other end is gone, whatever it sent instead of a row.
    """
    received = pickle.loads(connection.recv_bytes())
    if isinstance(received, BaseException):
        raise received
    row, decoded, shape = received
    if not decoded:
        return row
    if len(shape) == 1:
        return replace(row, pixels=())
    with _socket_of(connection) as carrier:
        mark, files, *_ = socket.recv_fds(carrier, 1, 1)
    if not mark or not files:
        raise EOFError
    try:
        memory = mmap.mmap(files[0], 0)
    finally:
        os.close(files[0])
    squares = np.frombuffer(memory, dtype=np.uint8).reshape(shape)
    return replace(row, pixels=SharedPixels(squares, spec))


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("vila-pixels", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _socket_of(connection: Connection) -> socket.socket:
    return socket.socket(fileno=os.dup(connection.fileno()))


START_METHODS = ("forkserver", "spawn", "fork")


@dataclass(frozen=True)
class StreamJob:
    """What a worker needs to know: how to read, and from where each of its lanes goes on."""

    reader: SampleReader
    policy: PackingPolicy
    streams: int
    decode: bool
    states: dict[int, PackingStreamState | None]
    end: int | None = None


class WorkerStreams:
    """The lanes of one rank, read by worker processes; the same rows as `LaneSet` gives, step by step."""

    def __init__(
        self,
        reader: SampleReader,
        count: int,
        *,
        policy: PackingPolicy,
        workers: int,
        rank: int = 0,
        world: int = 1,
        states: Sequence[PackingStreamState] | None = None,
        decode: bool = True,
        prefetch: int = 4,
        log: BadSampleLog | None = None,
        start_method: str = "forkserver",
        end: int | None = None,
    ) -> None:
        """Starts no process before the first step.

        prefetch: rows that each worker may read ahead.
        """
        self.numbers = streams_of_rank(rank, world, count)
        self.dropped = self.truncated = 0
        self._reader, self._policy, self._count, self._decode = reader, policy, count, decode
        self._states = {number: states[number] if states else PackingStreamState(number, ()) for number in self.numbers}
        self._owner = {number: place % min(workers, len(self.numbers)) for place, number in enumerate(self.numbers)}
        self._prefetch, self._log, self._start_method = prefetch, log, start_method
        self._workers: list[_Worker] = []
        self._end = end

    def step(self) -> list[PackedSequence]:
        """One row from each lane. Raises the error of a worker, or DataError naming the sample that it died of."""
        if not self._workers:
            self._start()
        rows = []
        for number in self.numbers:
            row = self._workers[self._owner[number]].row()
            self._states[number] = row.state
            rows.append(row)
        self.dropped += sum(row.dropped for row in rows)
        self.truncated += sum(row.truncated for row in rows)
        if self._log:
            self._log.add([sample for row in rows for sample in row.bad_samples])
        return rows

    @property
    def states(self) -> list[PackingStreamState]:
        """The state of every lane of this rank, as of the last step; what was read ahead does not count."""
        return [self._states[number] for number in self.numbers]

    def close(self) -> None:
        """End the workers. They hold nothing that a kill could spoil; the next step starts new ones."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.close()
        self._workers = []

    def _start(self) -> None:
        # Starting a worker imports this module and no torch: a fifth of a second.
        context = multiprocessing.get_context(self._start_method)
        atexit.register(self.close)
        for place in range(max(self._owner.values()) + 1):
            own = {number: self._states[number] for number in self.numbers if self._owner[number] == place}
            job = StreamJob(self._reader, self._policy, self._count, self._decode, dict(own), self._end)
            earlier = [worker.connection for worker in self._workers]
            self._workers.append(_Worker(context, place, job, self._prefetch, earlier))


class _Worker:
    """The parent's end of one worker."""

    def __init__(self, context: Any, place: int, job: StreamJob, prefetch: int, earlier: Sequence[Connection]) -> None:
        self._job, self._name = job, f"data worker {place}"
        self._at = context.RawValue(c_longlong, -1)
        self.connection, theirs = context.Pipe(duplex=True)
        # A forked process has copies of these; while it keeps them open, it cannot see that the parent is gone.
        inherited = [*earlier, self.connection] if context.get_start_method() == "fork" else []
        arguments = (theirs, job, self._at, inherited)
        self._process = context.Process(target=_serve, args=arguments, name=self._name, daemon=True)
        self._process.start()
        theirs.close()
        self._orders = cycle(job.states)
        for _ in range(prefetch):
            self.connection.send(next(self._orders))

    def row(self) -> PackedSequence:
        """The next row; the lanes of the job take turns. Asks for one more."""
        try:
            row = receive_row(self.connection, self._job.reader.spec)
        except (EOFError, ConnectionError) as error:
            raise DataError(self._death()) from error
        with suppress(ConnectionError):  # a worker that died since is noticed when its next row is wanted
            self.connection.send(next(self._orders))
        return row

    def close(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.join()

    def _death(self) -> str:
        self._process.join(timeout=5)
        code = self._process.exitcode
        how = f"exit code {code}" if code is None or code >= 0 else f"signal {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += "; out of memory?"
        position = self._at.value
        where = self._job.reader.mixture.describe(position) if position >= 0 else "its start"
        return (
            f"{self._name} ended ({how}) at {where}; run again to go on from the last checkpoint, with fewer "
            "compute.workers if memory ran out"
        )


def _serve(connection: Connection, job: StreamJob, at: Any, inherited: Sequence[Connection]) -> None:
    """A worker's whole life: a lane's number comes in, its next row goes out, until the parent is gone."""
    for other in inherited:
        other.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        # These reach the whole process group; it is the parent that answers them, after the step.
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    reader = job.reader

    def fetch(position: int) -> Any:
        at.value = position
        return reader(position)

    def decode(position: int, sample: Any) -> Any:
        at.value = position
        return reader.squares(position, sample)

    streams = {
        number: PackingStream(
            number,
            job.streams,
            fetch,
            job.policy,
            shorten=reader.shorten,
            decode=decode if job.decode else None,
            state=state,
            location=reader.location,
            end=job.end,
        )
        for number, state in job.states.items()
    }
    try:
        while True:
            send_row(connection, streams[connection.recv()].row())
    except (EOFError, ConnectionError):
        return
    except Exception as error:  # noqa: BLE001 - raised again in the parent
        _report(connection, error, reader.mixture.describe(at.value))


def _report(connection: Connection, error: Exception, where: str) -> None:
    if not isinstance(error, VilaError):
        error = DataError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}", record=where)
    connection.send_bytes(pickle.dumps(error))
