"""Worker processes of the data loader: read, tokenize, pack and decode ahead of training.

Each worker owns whole packing streams, so the sequences are those of a single process. The parent requests a few
sequences ahead. Each sequence carries the state of its stream; a checkpoint saves the state after the last sequence
that was used, not after the sequences read ahead. Sequences go through a pipe, decoded images through shared memory.
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import c_longlong
from dataclasses import dataclass, replace
from itertools import cycle
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from vila.core.errors import DataError, VilaError
from vila.core.vision_spec import VisionSpec
from vila.data.bad_samples import BadSampleLog
from vila.data.dataset import SampleReader
from vila.data.packing import (
    PackedSequence,
    PackingPolicy,
    PackingStream,
    PackingStreamState,
    Pixels,
    RankStreams,
    streams_of_rank,
)
from vila.media.transform import Bytes, normalise


@dataclass(frozen=True, eq=False)
class SharedPixels(Sequence[Pixels]):
    """Images of a sequence in shared memory; indexing returns one normalised, float32 [3, S, S].

    squares: uint8 [N, 3, S, S]; the memory is released with the last array that refers to it.
    """

    squares: Bytes
    spec: VisionSpec

    def __len__(self) -> int:
        return len(self.squares)

    def __getitem__(self, index: Any) -> Any:
        return normalise(self.squares[index], self.spec)

    def write(self, out: Pixels) -> None:
        """Normalise all images into `out`, float32 [N, 3, S, S]."""
        normalise(self.squares, self.spec, out)


def send_sequence(connection: Connection, sequence: PackedSequence) -> None:
    """Send a sequence over a duplex pipe. Its `pixels` are uint8 [3, S, S] here, see `SampleReader.squares`."""
    pixels = sequence.pixels
    shape = () if pixels is None else (len(pixels), *(pixels[0].shape if len(pixels) else ()))
    connection.send_bytes(pickle.dumps((replace(sequence, pixels=None), pixels is not None, shape)))
    if not pixels:
        return
    file = _anonymous_file()
    try:
        for image in pixels:
            # Writing takes half the time of filling a mapping, whose pages are cleared and faulted in first.
            _write(file, np.ascontiguousarray(image).data.cast("B"))
        with _socket_of(connection) as carrier:
            socket.send_fds(carrier, [b"f"], [file])
    finally:
        os.close(file)


def _write(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]


def receive_sequence(connection: Connection, spec: VisionSpec) -> PackedSequence:
    """Receive the next sequence of a pipe. spec: how its images are normalised.

    Raises EOFError if the worker has ended, or the error that the worker sent.
    """
    received = pickle.loads(connection.recv_bytes())
    if isinstance(received, BaseException):
        raise received
    sequence, is_decoded, shape = received
    if not is_decoded:
        return sequence
    if len(shape) == 1:
        return replace(sequence, pixels=())
    with _socket_of(connection) as carrier:
        mark, files, *_ = socket.recv_fds(carrier, 1, 1)
    if not mark or not files:
        raise EOFError
    try:
        memory = mmap.mmap(files[0], 0)
    finally:
        os.close(files[0])
    squares = np.frombuffer(memory, dtype=np.uint8).reshape(shape)
    return replace(sequence, pixels=SharedPixels(squares, spec))


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("vila-pixels", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _socket_of(connection: Connection) -> socket.socket:
    return socket.socket(fileno=os.dup(connection.fileno()))


@dataclass(frozen=True)
class StreamJob:
    """Work of one worker: how to read, and the state of each of its streams (by number).

    count: streams of all ranks.
    """

    reader: SampleReader
    policy: PackingPolicy
    count: int
    decode: bool
    states: dict[int, PackingStreamState]
    end: int | None = None


class WorkerStreams(RankStreams):
    """Packing streams that are read by worker processes. Gives the same sequences as `PackingStreams`."""

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
        """Start no process before the first step. prefetch: sequences that each worker reads ahead."""
        super().__init__(streams_of_rank(rank, world, count), log)
        self._job = StreamJob(reader, policy, count, decode, {}, end)
        self._states = {n: states[n] if states else PackingStreamState(n, ()) for n in self.numbers}
        self._owner = {n: index % min(workers, len(self.numbers)) for index, n in enumerate(self.numbers)}
        self._prefetch, self._start_method = prefetch, start_method
        self._workers: list[_Worker] = []

    def _next_sequences(self) -> list[PackedSequence]:
        """Raise the error of a worker, or DataError naming the sample that a worker was reading when it was killed."""
        if not self._workers:
            self._start()
        sequences = [self._workers[self._owner[number]].next_sequence() for number in self.numbers]
        self._states = {n: sequence.state for n, sequence in zip(self.numbers, sequences, strict=True)}
        return sequences

    @property
    def states(self) -> list[PackingStreamState]:
        """State of every stream of this rank after the last step, without what has been read ahead."""
        return list(self._states.values())

    def close(self) -> None:
        """End the worker processes; the next step starts new ones."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.close()
        self._workers = []

    def _start(self) -> None:
        # Starting a worker imports this module and no torch: a fifth of a second.
        context = multiprocessing.get_context(self._start_method)
        atexit.register(self.close)
        for index in range(max(self._owner.values()) + 1):
            own = {number: state for number, state in self._states.items() if self._owner[number] == index}
            earlier = [worker.connection for worker in self._workers]
            self._workers.append(_Worker(context, index, replace(self._job, states=own), self._prefetch, earlier))


class _Worker:
    """Handle of one worker process in its parent."""

    def __init__(self, context: Any, index: int, job: StreamJob, prefetch: int, earlier: Sequence[Connection]) -> None:
        self._job, self._name = job, f"data worker {index}"
        self._position = context.RawValue(c_longlong, -1)
        self.connection, theirs = context.Pipe(duplex=True)
        # A forked worker inherits these; while it keeps them open, it does not notice that the parent has ended.
        inherited = [*earlier, self.connection] if context.get_start_method() == "fork" else []
        arguments = (theirs, job, self._position, inherited)
        self._process = context.Process(target=_run_worker, args=arguments, name=self._name, daemon=True)
        self._process.start()
        theirs.close()
        self._requests = cycle(job.states)
        for _ in range(prefetch):
            self.connection.send(next(self._requests))

    def next_sequence(self) -> PackedSequence:
        """Return the next sequence and request one more; the streams of the worker take turns."""
        try:
            sequence = receive_sequence(self.connection, self._job.reader.spec)
        except (EOFError, ConnectionError) as error:
            raise self._death() from error
        with suppress(ConnectionError):  # a worker that has ended is reported when its next sequence is needed
            self.connection.send(next(self._requests))
        return sequence

    def close(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.join()

    def _death(self) -> DataError:
        self._process.join(timeout=5)
        code = self._process.exitcode
        reason = f"exit code {code}" if code is None or code >= 0 else f"signal {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            reason += ", out of memory?"
        position = self._position.value
        return DataError(
            f"{self._name} ended ({reason})",
            record=self._job.reader.mixture.describe(position) if position >= 0 else "its start",
            hint="run again to resume from the last checkpoint, with fewer compute.workers if memory ran out",
        )


def _run_worker(connection: Connection, job: StreamJob, current: Any, inherited: Sequence[Connection]) -> None:
    """Main function of a worker: receive the number of a stream, send its next sequence, until the parent ends.

    current: shared integer, the position that is being read.
    """
    for other in inherited:
        other.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        # These reach the whole process group; the parent handles them after the step.
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    reader = job.reader

    def tracked(read: Callable[..., Any]) -> Callable[..., Any]:
        def call(position: int, *arguments: Any) -> Any:
            current.value = position
            return read(position, *arguments)

        return call

    streams = {
        number: PackingStream(
            number,
            job.count,
            tracked(reader),
            job.policy,
            shorten=reader.shorten,
            decode=tracked(reader.squares) if job.decode else None,
            state=state,
            location=reader.mixture.location,
            end=job.end,
        )
        for number, state in job.states.items()
    }
    try:
        while True:
            send_sequence(connection, streams[connection.recv()].next_sequence())
    except (EOFError, ConnectionError):
        return
    except Exception as error:  # noqa: BLE001 - raised again in the parent
        if not isinstance(error, VilaError):
            where = reader.mixture.describe(current.value)
            error = DataError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}", record=where)
        connection.send_bytes(pickle.dumps(error))
