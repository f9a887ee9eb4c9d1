"""Fetching from a real server on this machine: limits, redirects, deadlines, connections only to checked addresses."""

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from vila.core.errors import MediaError
from vila.media.connection import _tls
from vila.media.fetch import fetch

BODY = bytes(range(256)) * 4


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/drip":
            self._start(200, {"Content-Length": "1000"})
            with suppress(OSError):  # the client has gone
                for _ in range(40):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        elif path == "/slow-header":
            with suppress(OSError):
                for byte in b"HTTP/1.1 200 OK and a very long reason":
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
        elif path == "/short":
            self._start(200, {"Content-Length": "1900"})
            self.wfile.write(BODY)
        elif path == "/endless":
            self._start(200, {})
            with suppress(OSError):
                for _ in range(200):
                    self.wfile.write(b"x" * 10_000)
        elif path == "/chunked":
            self.protocol_version = "HTTP/1.1"
            self._start(200, {"Transfer-Encoding": "chunked", "Connection": "close"})
            self.wfile.write(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
        elif path == "/huge":
            self._start(200, {"Content-Length": str(10**12)})
        elif path == "/gzip":
            self._start(200, {"Content-Encoding": "gzip"})
        elif path == "/garbage":
            self.wfile.write(b"SSH-2.0-OpenSSH\r\n")
        elif path.startswith("/hops/"):
            left = int(path.rpartition("/")[2])
            self._start(302, {"Location": f"/hops/{left - 1}" if left else "/ok"})
        elif path == "/circle":
            self._start(301, {"Location": "/circle"})
        elif path.startswith("/to/"):
            self._start(307, {"Location": self.path[4:]})
        elif path == "/accents":
            self._start(302, {"Location": "/ok?\u00fcber 1"})
        elif path == "/host":
            self._start(200, {})
            self.wfile.write(self.headers["Host"].encode())
        else:
            self._start(200 if path == "/ok" else 404, {"Content-Length": str(len(BODY))})
            self.wfile.write(BODY)

    def _start(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def home() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def get(url: str, **options: object) -> bytes:
    return fetch(url, **{"allow_private": True, "timeout_s": 5, **options})


class World:
    """A resolver and a network: names have the addresses of `names`, and every address leads to the local server."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, home: str, names: dict[str, list[list[str]]]) -> None:
        self.port = int(home.rpartition(":")[2])
        self.names, self.connected = names, []
        truly, real_connect = socket.getaddrinfo, socket.socket.connect

        def look_up(host: str, port: int, *args: object, **options: object) -> list:
            if host not in names:
                return truly(host, port, *args, **options)
            addresses = names[host].pop(0)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        def connect(connection: socket.socket, address: tuple[str, int]) -> None:
            self.connected.append(address[0])
            real_connect(connection, ("127.0.0.1", self.port))

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        monkeypatch.setattr(socket.socket, "connect", connect)


def test_a_body_arrives_whole(home):
    assert get(f"{home}/ok") == BODY
    assert get(f"{home}/ok?x=1#part") == BODY
    assert get(f"{home}/chunked") == b"abcde"
    assert get(f"{home}/ok", max_bytes=len(BODY)) == BODY


@pytest.mark.parametrize(
    "path, message",
    (
        ("/missing", "/missing: the server answered 404 Not Found; check the address"),
        ("/short", "/short: 1900 bytes announced, 1024 received; try again"),
        ("/huge", "/huge: larger than the limit of 2,000 bytes"),
        ("/endless", "/endless: larger than the limit of 2,000 bytes"),
        ("/gzip", "/gzip: the server sent 'gzip' encoding"),
        ("/garbage", "/garbage: the connection failed"),
        ("/circle", "/circle: redirects in a circle"),
        ("/to/ftp://example.org/a", "ftp://example.org/a: only http and https addresses are opened"),
        ("/to/file:///etc/passwd", "file:///etc/passwd: only http and https"),
    ),
)
def test_a_bad_answer_names_url_and_reason(home, path, message):
    with pytest.raises(MediaError, match=message):
        get(home + path, max_bytes=2000)


@pytest.mark.parametrize("path", ("/drip", "/slow-header"))
def test_the_deadline_holds_for_a_server_that_drips(home, path):
    begun = time.monotonic()
    with pytest.raises(MediaError, match=f"{path}: no complete answer within 0.3 s; try again"):
        get(home + path, timeout_s=0.3)
    assert time.monotonic() - begun < 1.0


def test_the_deadline_holds_for_a_resolver_that_hangs(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(0.5) or [])
    with pytest.raises(MediaError, match=r"no complete answer within 0.1 s"):
        get("http://pictures.test/a.png", timeout_s=0.1)


def test_redirects_are_followed_up_to_their_number(home):
    assert get(f"{home}/hops/4") == BODY
    with pytest.raises(MediaError, match="/hops/5: more than 5 redirects"):
        get(f"{home}/hops/5")
    assert get(f"{home}/hops/1", max_redirects=2) == BODY
    with pytest.raises(MediaError, match="more than 0 redirects"):
        get(f"{home}/hops/0", max_redirects=0)
    assert get(f"{home}/accents") == BODY


def test_a_closed_port_is_named(home):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.png"
        with pytest.raises(MediaError, match=f"{url}: the connection failed .*refused"):
            get(url)


def test_a_redirect_to_a_private_address_is_refused(home, monkeypatch):
    world = World(monkeypatch, home, {"pictures.example": [["93.184.216.34"]]})
    with pytest.raises(MediaError, match=r"127.0.0.1 is 127.0.0.1, which is not a public address"):
        fetch(f"http://pictures.example/to/{home}/ok", timeout_s=5)
    assert world.connected == ["93.184.216.34"]


def test_the_connection_goes_to_the_address_that_was_checked(home, monkeypatch):
    world = World(monkeypatch, home, {"rebinding.example": [["93.184.216.34"], ["127.0.0.1"]]})
    assert fetch("http://rebinding.example/host", timeout_s=5) == b"rebinding.example"
    assert world.connected == ["93.184.216.34"]
    assert len(world.names["rebinding.example"]) == 1


def test_one_private_address_among_public_ones_is_refused(home, monkeypatch):
    world = World(monkeypatch, home, {"mixed.example": [["93.184.216.34", "10.0.0.1"]]})
    with pytest.raises(MediaError, match=r"mixed.example is 10.0.0.1"):
        fetch("http://mixed.example/ok", timeout_s=5)
    assert world.connected == []


def test_an_unknown_host_is_named(monkeypatch):
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(MediaError, match=r"http://nowhere.test/a: the host is unknown .Name or service not known"):
        get("http://nowhere.test/a")


def test_tls_is_verified_and_never_left(home):
    assert _tls().verify_mode is ssl.CERT_REQUIRED
    assert _tls().check_hostname
    with pytest.raises(MediaError, match="/ok: the connection failed"):
        get(home.replace("http:", "https:") + "/ok")
