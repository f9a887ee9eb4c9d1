"""The server process: listening socket, signals, graceful shutdown; and `vila serve` as a subprocess."""

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

import httpx2
import uvicorn

from vila.core.errors import ConfigError, VilaError
from vila.serve.admission import parse_allowed_hosts
from vila.serve.app import create_app
from vila.serve.chat import Service
from vila.serve.connections import MAX_CONNECTIONS, Connections, TimedProtocol, connection_limit, listen
from vila.serve.models import ServedModel

_log = logging.getLogger("vila.serve")
_START_S = 900.0


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Address and access settings of a server.

    port:            0 selects a free port.
    root_path:       path prefix under which a reverse proxy exposes the server.
    keys:            API keys; empty: no authentication.
    origins:         origins that CORS allows.
    allowed_hosts:   further host names, see `vila.serve.admission.parse_allowed_hosts`.
    certificate, private_key: PEM files; with them the server uses HTTPS.
    max_connections: open connections in total.
    max_per_address: open connections per address; 0: half of `max_connections`.
    drain_s:         seconds that running requests have to finish at shutdown.
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


def serve(service: Service, config: ServerConfig, log: Callable[[str], None]) -> None:
    """Run the server until SIGTERM or Ctrl-C, then finish running requests; a second signal exits immediately.

    The port is open before the models are loaded. Raises ConfigError if the port or the certificate cannot be used,
    and the error of a model that cannot be loaded.
    """
    hosts = parse_allowed_hosts(config.host, config.allowed_hosts)
    app = create_app(service, keys=config.keys, origins=config.origins, hosts=hosts, root_path=config.root_path)
    connections = Connections(connection_limit(config.max_connections), config.max_per_address)
    protocol = type("ServerProtocol", (TimedProtocol,), {"open_connections": connections})
    settings = uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", access_log=False, log_level="warning", backlog=2048,
        server_header=False, h11_max_incomplete_event_size=32 * 1024, timeout_graceful_shutdown=5,
        ssl_certfile=config.certificate or None, ssl_keyfile=config.private_key or None,
        loop="asyncio",  # uvloop would bypass our listener
    )  # fmt: skip
    try:
        settings.load()
    except (OSError, ssl.SSLError) as error:
        files = f"{config.certificate}, {config.private_key}"
        raise ConfigError(f"not a valid TLS certificate and private key ({error})", file=files) from error
    listener = listen(config.host, config.port, connections)
    scheme = "https" if config.certificate else "http"
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log(f"{scheme}://{shown}:{port}{config.root_path}/v1 will serve {', '.join(service.models.names)} once loaded")
    server = _Server(settings, service, config.drain_s)
    service.models.start(server.fail)
    try:
        server.run(sockets=[listener])
    finally:
        service.models.close()
        service.threads.close()
    if server.failed is not None:
        reason = server.failed.failure
        if isinstance(reason, VilaError):
            raise reason
        problem = f"cannot be loaded ({type(reason).__name__}: {reason})"
        raise VilaError(problem, file=server.failed.name) from reason


class _Server(uvicorn.Server):
    """uvicorn's server, but it keeps listening during shutdown and rejects new requests with 503."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self.service, self.drain_s = service, drain_s
        self.failed: ServedModel | None = None

    def fail(self, model: ServedModel) -> None:
        """Exit because a model cannot be loaded. Called from any thread."""
        self.failed = model
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the shutdown; a second signal ends the process. uvicorn calls this on SIGINT and SIGTERM."""
        if self.service.models.draining:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
            return
        self.service.models.draining = True
        _log.info("shutting down after running requests finish; signal again to exit immediately")
        threading.Thread(target=self._drain, name="vila-drain", daemon=True).start()

    def _drain(self) -> None:
        if not self.service.models.drain(self.drain_s):
            _log.warning("cancelling requests that did not finish within %g s", self.drain_s)
            self.service.models.close()
        self.should_exit = True


@dataclass(frozen=True)
class ServerProcess:
    """A running `vila serve` subprocess.

    base: URL of its API, with `/v1`.
    """

    base: str
    _process: subprocess.Popen[bytes]
    _stderr: IO[bytes]

    def check(self) -> None:
        """Raise VilaError with the end of the server's log if the process has exited."""
        if self._process.poll() is not None:
            self._stderr.seek(0)
            lines = self._stderr.read().decode(errors="replace").strip().splitlines()
            raise VilaError(f"the server exited: {' '.join(lines[-3:]) or self._process.returncode}")

    def await_ready(self, timeout_s: float = _START_S) -> None:
        """Wait until all models are loaded. Raises VilaError if the process exits or the timeout passes."""
        deadline = time.monotonic() + timeout_s
        root = self.base.removesuffix("/v1")
        while time.monotonic() < deadline:
            self.check()
            with suppress(httpx2.HTTPError):
                if httpx2.get(f"{root}/ready", timeout=5, trust_env=False).status_code == 200:
                    return
            time.sleep(0.2)
        raise VilaError(f"the server was not ready after {timeout_s:.0f} s")


@contextmanager
def server_process(models: Sequence[str], options: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """Start `vila serve` on a free loopback port and stop it on exit.

    options: further arguments of `vila serve`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vila", "serve", *models, "--port", str(port), *options]
    # A file, not a pipe, because nothing reads the log while the server runs.
    with _sigterm_as_exit(), tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True)
        try:
            yield ServerProcess(f"http://127.0.0.1:{port}/v1", process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that cleanup runs and the server does not outlive its parent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def exit_(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, exit_)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
