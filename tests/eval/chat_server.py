"""Test chat server: records requests and replies with what a test specifies."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Served:
    """The server's address, and everything that it was sent."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Any]) -> None:
        self.answer, self.url = answer, ""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()


def completion(text: Any, finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


@contextmanager
def chat_server(answer: Callable[[dict[str, Any], int], Any]) -> Iterator[Served]:
    """`answer(body, number)` gives the text of an answer, or (status, headers, bytes or something for JSON)."""
    served = Served(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            with served.lock:
                served.at_once += 1
                served.most_at_once = max(served.most_at_once, served.at_once)
                number = len(served.bodies)
                served.bodies.append(json.loads(content))
                served.headers.append({name.lower(): text for name, text in self.headers.items()})
                served.paths.append(self.path)
            given = served.answer(served.bodies[number], number)
            status, headers, body = given if isinstance(given, tuple) else (200, {}, completion(given))
            sent = body if isinstance(body, bytes) else json.dumps(body).encode()
            with served.lock:
                served.at_once -= 1
            self.send_response(status)
            for name, text in {"Content-Length": str(len(sent)), **headers}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
