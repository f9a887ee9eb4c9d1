"""Run `vila` commands in separate processes without importing torch each time.

A server process imports torch, transformers and vila once and forks a child for every command. `program()` is an
executable like `vila`: it passes its arguments, directory, environment and standard streams to the server, forwards
signals, and exits with the exit code of the command. Not for tests of start-up time, or of variables that are
read when a library is imported.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

MODULES = ("torch", "transformers", "torch.distributed.fsdp", "vila.cli.main", "vila.engine.engine", "vila.train.build")

CLIENT = """#!{python} -SEs
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
server.sendmsg([len(call).to_bytes(8, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
server.sendall(call)
child = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "little")
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, lambda got, _: os.kill(child, got))
status = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "little", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@cache
def program() -> Path:
    """Return the path of an executable `vila`; its server is started by the first call and ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="vila-preloaded-"))
    address = folder / "socket"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(address))
    listening.listen(64)
    ready, write_end = os.pipe()
    command = [sys.executable, "-m", "tests.preloaded", str(listening.fileno()), str(write_end)]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    server = subprocess.Popen(command, pass_fds=[listening.fileno(), write_end], env=environment, cwd=root)
    os.close(write_end)
    listening.close()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.terminate)
    if not os.read(ready, 1):
        raise RuntimeError(f"the server of preloaded commands ended with {server.wait()}")
    os.close(ready)
    client = folder / "vila"
    client.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    client.chmod(0o755)
    return client


def serve(listening: socket.socket, ready: int) -> None:
    """Fork a child for each connection until this process is terminated."""
    for name in MODULES:
        __import__(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(ready, b"1")
    os.close(ready)
    while True:
        connection, _ = listening.accept()
        # The first child waits for the command, so that it can report its exit status.
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with contextlib.suppress(BrokenPipeError, ConnectionError):
                _watch(connection)
            os._exit(0)
        connection.close()


def _watch(connection: socket.socket) -> None:
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    call = connection.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL)
    child = os.fork()
    if child == 0:
        connection.close()
        _run(call, files)
    for file in files:
        os.close(file)
    connection.sendall(child.to_bytes(8, "little"))
    ended, status = 0, 0
    while not ended:
        if select.select([connection], [], [], 0.02)[0]:  # the client was killed
            os.kill(child, signal.SIGKILL)
        ended, status = os.waitpid(child, os.WNOHANG)
    connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "little", signed=True))


def _run(call: bytes, files: list[int]) -> None:
    from vila.cli.main import main

    arguments, folder, environment = json.loads(call)
    for standard, file in enumerate(files):
        os.dup2(file, standard)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["vila", *arguments]
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode, closefd=False) for n, mode in ((0, "r"), (1, "w"), (2, "w")))  # noqa: SIM115
    status = 1
    try:
        main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    finally:
        with contextlib.suppress(BrokenPipeError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        atexit._run_exitfuncs()
        os._exit(status)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
