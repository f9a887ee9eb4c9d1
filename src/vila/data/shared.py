"""Rows between processes: what is small goes through a pipe, pictures lie in memory that both processes map.

The memory is an anonymous file whose descriptor travels beside the row. It has no name, so a process that is killed
leaves nothing behind, and it does not count against the size of /dev/shm, which containers keep small. Pictures lie in
it as bytes: writing and mapping fresh memory costs more than normalising them here, straight into the batch.
"""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import overload

import numpy as np

from vila.core.vision_spec import VisionSpec
from vila.data.pack import Pixels, Row
from vila.media.transform import Bytes, normalise


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


def send_row(connection: Connection, row: Row) -> None:
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


def receive_row(connection: Connection, spec: VisionSpec) -> Row:
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
