"""Local HTTP server for images that simulates every kind of server failure."""

import io
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def jpeg(number: int, size: tuple[int, int] = (24, 16)) -> bytes:
    """A small image with a colour that depends on `number`."""
    stream = io.BytesIO()
    Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, number % 256)).save(stream, "JPEG")
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes whose header announces 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


class ImageServer(ThreadingHTTPServer):
    """Counts requests by path, and the maximum number of concurrent ones."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.running = self.most_running = 0
        self.delay_s = 0.0
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that close a connection, instead of printing a traceback."""

    @property
    def home(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ImageServer

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.asked[self.path] += 1
            asked = self.server.asked[self.path]
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
        if self.server.delay_s:
            time.sleep(self.server.delay_s)
        with self.server.lock:
            self.server.running -= 1  # before the response, after which the client may send the next request
        with suppress(OSError):
            self._serve(self.path.strip("/").split("/"), asked)

    def _serve(self, path: list[str], asked: int) -> None:
        kind = path[0]
        if kind == "good":
            self._send(200, jpeg(int(path[1])))
        elif kind == "large":
            self._send(200, jpeg(int(path[1]), (1000, 500)))
        elif kind == "busy" and asked == 1:
            self._send(429, b"", {"Retry-After": "0"})
        elif kind == "shaky" and asked == 1:
            self._send(500, b"")
        elif kind in ("busy", "shaky"):
            self._send(200, jpeg(1))
        elif kind == "long-wait":
            self._send(429, b"", {"Retry-After": "3600"})
        elif kind == "down":
            self._send(503, b"")
        elif kind == "slow":
            time.sleep(3)
            self._send(200, jpeg(1))
        elif kind == "drip":
            self._head(200, {"Content-Length": "1000"})
            for _ in range(60):
                self.wfile.write(b"x")
                time.sleep(0.05)
        elif kind == "short":
            self._head(200, {"Content-Length": "5000", "Connection": "close"})
            self.wfile.write(jpeg(1))
            self.close_connection = True
        elif kind == "html":
            self._send(200, b"<!doctype html><html>gone</html>")
        elif kind == "empty":
            self._send(200, b"")
        elif kind == "half":
            self._send(200, jpeg(1, (300, 300))[:-400])
        elif kind == "loop":
            self._send(302, b"", {"Location": f"/loop/{1 - int(path[1])}"})
        elif kind == "hops":
            left = int(path[1])
            self._send(302, b"", {"Location": f"/hops/{left - 1}" if left else "/good/5"})
        elif kind == "to-private":
            self._send(302, b"", {"Location": "http://10.0.0.1/x.jpg"})
        elif kind == "announced":
            self._head(200, {"Content-Length": str(10**12)})
        elif kind == "endless":
            self._head(200, {"Connection": "close"})
            self.close_connection = True
            for _ in range(400):
                self.wfile.write(b"x" * 10_000)
        elif kind == "gzip":
            self._send(200, b"zzz", {"Content-Encoding": "gzip"})
        elif kind == "bomb":
            self._send(200, bomb())
        elif kind == "noai":
            self._send(200, jpeg(1), {"X-Robots-Tag": "noindex, noai"})
        else:
            self._send(404, b"not found")

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, {"Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[ImageServer]:
    server = ImageServer()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
