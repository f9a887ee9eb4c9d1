"""The server as a process: its socket, its signals, and its end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import IO

import httpx
import uvicorn

from vila.core.errors import ConfigError, VilaError
from vila.serve.admission import parse_allowed_hosts
from vila.serve.app import create_app
from vila.serve.chat import Service
from vila.serve.connections import MAX_CONNECTIONS, Connections, Listener, TimedProtocol, connection_limit, listen
from vila.serve.models import ServedModel

_log = logging.getLogger("vila.serve")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where a server listens, and who may use it.

    port:      0 takes a free one.
    root_path: under which a proxy shows it.
    keys:      that open it; origins: web pages that may ask from a browser.
    allowed_hosts: names under which it answers besides those of this machine, see `vila.serve.admission.allowed_hosts`.
    certificate, private_key: files; with them it speaks HTTPS.
    max_connections, max_per_address: open connections, in total and of one address; 0 is half of the total.
    drain_s:   seconds that running answers have to finish once the server is stopped.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    root_path: str = ""
    keys: Sequence[str] = ()
    origins: Sequence[str] = ()
    allowed_hosts: Sequence[str] = ()
    certificate: str = ""
    private_key: str = ""
    max_connections: int = MAX_CONNECTIONS
    max_per_address: int = 0
    drain_s: float = 60.0


def serve(service: Service, config: ServerConfig, say: Callable[[str], None]) -> None:
    """Answer requests until SIGTERM or Ctrl-C; running answers are finished then, and a second signal ends at once.

    The port is open before the models are read. Raises ConfigError for an address that cannot be had and for bad
    certificates, and what a model could not be loaded for.
    """
    hosts = parse_allowed_hosts(config.host, config.allowed_hosts)
    app = create_app(service, keys=config.keys, origins=config.origins, hosts=hosts, root_path=config.root_path)
    connections = Connections(connection_limit(config.max_connections), config.max_per_address)
    protocol = type("ServerProtocol", (TimedProtocol,), {"admitted": connections})
    settings = uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", access_log=False, log_level="warning", backlog=2048,
        server_header=False, h11_max_incomplete_event_size=32 * 1024, timeout_graceful_shutdown=5,
        ssl_certfile=config.certificate or None, ssl_keyfile=config.private_key or None,
        loop="asyncio",  # another one would not ask our listener
    )  # fmt: skip
    try:
        settings.load()
    except (OSError, ssl.SSLError) as error:
        named = f"{config.certificate}, {config.private_key}"
        raise ConfigError(f"{named}: cannot be used as certificate and key ({error})") from error
    listening = _listen(config, connections)
    scheme = "https" if config.certificate else "http"
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(f"{scheme}://{shown}:{port}{config.root_path}/v1 will answer for {', '.join(service.models.names)} when loaded")
    server = _Server(settings, service, config.drain_s)
    service.models.start(server.fail)
    try:
        server.run(sockets=[listening])
    finally:
        service.models.close()
        service.threads.close()
    if server.failed is not None:
        reason = server.failed.failure
        if isinstance(reason, VilaError):
            raise reason
        raise VilaError(f"{server.failed.name}: cannot be loaded ({type(reason).__name__}: {reason})") from reason


class _Server(uvicorn.Server):
    """uvicorn's server, but that it goes on listening while it drains, so that those who come are told."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self.service, self.drain_s = service, drain_s
        self.failed: ServedModel | None = None

    def fail(self, model: ServedModel) -> None:
        """End because a model cannot be loaded; called from any thread."""
        self.failed = model
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals that end a process; afterwards they are handled as before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._stop) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.service.models.draining:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.service.models.draining = True
        _log.info("stopping: running answers are finished first; once more ends at once")
        threading.Thread(target=self._drain, name="vila-drain", daemon=True).start()

    def _drain(self) -> None:
        if not self.service.models.drain(self.drain_s):
            _log.warning("some answers were not complete after %g s and end here", self.drain_s)
            self.service.models.close()
        self.should_exit = True


def _listen(config: ServerConfig, connections: Connections) -> Listener:
    try:
        return listen(config.host, config.port, connections)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{config.host} port {config.port} cannot be opened ({error}); give another by --port"
        ) from error


# --- process
# A server in a process of its own, for as long as a command needs one.


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
