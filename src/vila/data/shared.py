"""Rows between processes: what is small goes through a pipe, pixels lie in memory that both processes map.

The memory is an anonymous file whose descriptor travels beside the row. It has no name, so a process that is killed
leaves nothing behind, and it does not count against the size of /dev/shm, which containers keep small.
"""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import tempfile
from dataclasses import replace
from multiprocessing.connection import Connection

import numpy as np

from vila.data.pack import Row


def send_row(connection: Connection, row: Row) -> None:
    """Send a row over a duplex pipe; its pixels are written to shared memory once, and not copied again."""
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


def receive_row(connection: Connection) -> Row:
    """The next row of a pipe. Raises EOFError when the other end is gone, whatever it sent instead of a row."""
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
        # The mapping lives as long as an array that looks into it.
        memory = mmap.mmap(files[0], 0)
    finally:
        os.close(files[0])
    return replace(row, pixels=np.frombuffer(memory, dtype=np.float32).reshape(shape))


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("vila-pixels", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _socket_of(connection: Connection) -> socket.socket:
    return socket.socket(fileno=os.dup(connection.fileno()))
