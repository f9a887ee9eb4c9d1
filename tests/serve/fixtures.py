"""A tiny model without a stop token, and its server in this process or in a subprocess."""

from __future__ import annotations

import asyncio
import base64
import http.server
import os
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from typing import Any

import httpx2
import torch
import uvicorn

from tests import preloaded, tiny
from vila.engine.engine import Engine
from vila.serve.chat import Service
from vila.serve.connections import Connections, TimedProtocol, listen
from vila.serve.messages import Limits
from vila.serve.models import Batching, Models, ServedModel

HELLO = [{"role": "user", "content": "hello"}]


def model() -> Any:
    """A model and its processor whose most likely token is always a letter."""
    made, processor = tiny.vila(max_position_embeddings=2048)
    letters = [tiny.tokenizer().convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz "]
    table = made.get_input_embeddings().weight
    with torch.no_grad():
        others = torch.ones(len(table), dtype=torch.bool)
        others[[one for one in letters if one is not None]] = False
        # The head is tied to this table. A little is left, so that what was asked still matters.
        table[others] *= 0.05
    return made, processor


def ready(name: str = "tiny", *, load: Any = None, limits: Limits | None = None, **batching: Any) -> Service:
    """A service whose model is loaded."""
    served = ServedModel(name, load or (lambda: Engine(*model())), ("other-name",))
    service = Service(Models([served], Batching(**{"max_num_seqs": 4, **batching})), limits or Limits())
    service.models._load(lambda failed: None)
    assert served.failure is None, served.failure
    return service


def body(**changes: Any) -> dict[str, Any]:
    """A good request, changed."""
    return {"model": "tiny", "messages": HELLO, "max_tokens": 4, **changes}


def ask(app: Any, **changes: Any) -> httpx2.Response:
    """The response of an application in this process to a request."""
    return send(app, json=body(**changes))


def send(app: Any, method: str = "POST", path: str = "/v1/chat/completions", **what: Any) -> httpx2.Response:
    """The response to anything."""

    async def once() -> httpx2.Response:
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **what)

    return asyncio.run(once())


def data_url(seed: int = 1) -> str:
    """An image that travels in its own address."""
    return f"data:image/png;base64,{base64.b64encode(tiny.image(seed).source).decode()}"


def image_part(url: str) -> dict[str, Any]:
    """A part with an image."""
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    """A part with text."""
    return {"type": "text", "text": text}


@contextmanager
def on_a_port(app: Any, connections: Connections | None = None, **timings: float):
    """The application behind a real port of this machine, in a thread; limits and `timings` of its connections."""
    connections = Connections() if connections is None else connections
    protocol = type("Timed", (TimedProtocol,), {"open_connections": connections, **timings})
    config = uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_level="critical", loop="asyncio")
    server = uvicorn.Server(config)
    with listen("127.0.0.1", 0, connections) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


class Process:
    """`vila serve` in a process of its own."""

    def __init__(self, *arguments: Any, **environment: str) -> None:
        command = [str(preloaded.program()), "serve", *map(str, arguments), "--port", "0"]
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=settings)
        self.log_lines: list[str] = []
        assert self.popen.stderr is not None
        first = self.popen.stderr.readline()
        self.url = first.split()[0] if "will serve" in first else ""
        self.log_lines.append(first)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        self.log_lines.extend(self.popen.stderr)

    @property
    def root(self) -> str:
        """The address without `/v1`."""
        return self.url.removesuffix("/v1")

    def await_ready(self, **options: Any) -> None:
        """Until its models are loaded."""
        for _ in range(600):
            if httpx2.get(f"{self.root}/ready", **options).status_code == 200:
                return
            assert self.popen.poll() is None, self.log_lines
            time.sleep(0.1)
        raise AssertionError(self.log_lines)

    def stop(self) -> int:
        """Its exit status after SIGTERM."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(30)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()


@contextmanager
def pages(answers: dict[str, bytes | str]):
    """A web server on this machine: images by path, or where a path leads to."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path)
            if isinstance(found, str):
                self.send_response(302)
                self.send_header("Location", found)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Length", str(len(found or b"")))
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
