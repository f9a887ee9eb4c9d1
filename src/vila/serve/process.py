"""A server in a process of its own, for as long as a command needs one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO

import httpx

from vila.core.errors import VilaError

_LOADING = 900.0


@dataclass(frozen=True)
class ServerProcess:
    """A server that was started; it may still be reading its models."""

    base: str
    """Its address, with `/v1`."""
    _process: subprocess.Popen[bytes]
    _stderr: IO[bytes]

    def check(self) -> None:
        """Raises VilaError with the server's last words when it has ended."""
        if self._process.poll() is not None:
            self._stderr.seek(0)
            said = self._stderr.read().decode(errors="replace").strip().splitlines()
            raise VilaError(f"the server ended: {' '.join(said[-3:]) or self._process.returncode}")

    def await_ready(self, seconds: float = _LOADING) -> None:
        """Return once its models are read. Raises VilaError when it ends before, or after so long."""
        limit = time.monotonic() + seconds
        root = self.base.removesuffix("/v1")
        while time.monotonic() < limit:
            self.check()
            with suppress(httpx.HTTPError):
                if httpx.get(f"{root}/ready", timeout=5, trust_env=False).status_code == 200:
                    return
            time.sleep(0.2)
        raise VilaError(f"the server was not ready after {seconds:.0f} s")


@contextmanager
def server_process(models: Sequence[str], options: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """Start `vila serve` on a free port of this machine; it is stopped on exit.

    options: further words of `vila serve`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vila", "serve", *models, "--port", str(port), *options]
    # A file, not a pipe: nobody reads what the server says while it runs.
    with _sigterm_ends_the_block(), tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)
        try:
            yield ServerProcess(f"http://127.0.0.1:{port}/v1", process, said)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def _sigterm_ends_the_block() -> Iterator[None]:
    """Let SIGTERM run what stands behind: without it the server would outlive whoever started it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
