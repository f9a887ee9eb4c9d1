"""`fetch` from a local server: limits, redirects, deadlines, connections only to checked addresses."""

import asyncio
import errno
import os
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from vila.core.errors import CancelledError
from vila.media.http import FetchError, fetch, tls_context

BODY = bytes(range(256)) * 4


def raw(head: str, body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + head.encode() + b"\r\n\r\n" + body


def chunked(body: bytes) -> bytes:
    return raw("Transfer-Encoding: chunked", body)


MUCH = b"x" * 100_000
END = b"0\r\n\r\n"
BAD_BODIES = {
    "minus-1": chunked(b"-1\r\n" + MUCH + END),
    "minus-5": chunked(b"-5\r\n" + MUCH + END),
    "plus": chunked(b"+3\r\nabc\r\n" + END),
    "underscore": chunked(b"1_0\r\n" + b"a" * 16 + b"\r\n" + END),
    "prefix": chunked(b"0x3\r\nabc\r\n" + END),
    "no-size": chunked(b"\r\nabc\r\n" + END),
    "longer-than-its-size": chunked(b"3\r\nabcde\r\n" + END),
    "cut": chunked(b"5\r\nabc"),
    "no-end": chunked(b"3\r\nabc\r\n"),
    "endless-extension": chunked(b"3;" + MUCH),
    "endless-trailers": chunked(b"3\r\nabc\r\n0\r\n" + b"a: b\r\n" * 30_000 + b"\r\n"),
    "much-framing": chunked((b"1;" + b"x" * 4000 + b"\r\na\r\n") * 200 + END),
    "other-coding": raw("Transfer-Encoding: gzip, chunked", b"3\r\nabc\r\n" + END),
    "length-minus-5": raw("Content-Length: -5", MUCH[:1000]),
    "length-underscore": raw("Content-Length: 1_0", MUCH[:10]),
    "length-list": raw("Content-Length: 5, 6", b"abcde"),
    "two-lengths": raw("Content-Length: 5\r\nContent-Length: 6", b"abcde"),
    "length-cut": raw("Content-Length: 6", b"abcde"),
    "endless-head": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000,
    "not-http": b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
    "old-http": b"<html>no status line",
}
GOOD_BODIES = {
    "extension": chunked(b'3;name="value"\r\nabc\r\n02 \r\nde\r\n' + END),
    "trailers": chunked(b"5\r\nabcde\r\n0\r\nExpires: never\r\n\r\n"),
    "length-twice": raw("Content-Length: 5\r\nContent-Length: 5", b"abcde"),
    "no-length": raw("Connection: close", b"abcde"),
    "continue-first": b"HTTP/1.1 100 Continue\r\n\r\n" + raw("Content-Length: 5", b"abcde"),
}
TOO_LARGE = {"chunk": chunked(b"ffffffffff\r\n" + MUCH)}
CHUNKED_TOO_LARGE = ("/raw/chunk", "/chunks")
RAW = {**BAD_BODIES, **GOOD_BODIES, **TOO_LARGE}


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
        elif path.startswith("/raw/"):
            self.wfile.write(RAW[path[5:]])
        elif path == "/chunks":
            self.protocol_version = "HTTP/1.1"
            self._start(200, {"Transfer-Encoding": "chunked", "Connection": "close"})
            with suppress(OSError):
                for _ in range(200):
                    self.wfile.write(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
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


class FakeNetwork:
    """DNS and routing: names resolve to the addresses of `names`, and every connection goes to the local server."""

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


def test_the_complete_body_is_returned(home):
    assert get(f"{home}/ok") == BODY
    assert get(f"{home}/ok?x=1#part") == BODY
    assert get(f"{home}/chunked") == b"abcde"
    assert get(f"{home}/ok", max_bytes=len(BODY)) == BODY


def refused(url: str, **options: object) -> FetchError:
    with pytest.raises(FetchError) as caught:
        get(url, **options)
    return caught.value


@pytest.mark.parametrize(
    "path, kind",
    {
        "/missing": "http_404",
        "/short": "connection",
        "/gzip": "encoding",
        "/garbage": "connection",
        "/circle": "redirect",
    }.items(),
)
def test_an_error_names_the_url_and_contains_nothing_that_the_server_sent(home, path, kind):
    error = refused(home + path, max_bytes=2000)
    assert (error.kind, error.file, error.field) == (kind, home + path, None)
    assert "SSH" not in str(error) and "gzip;" not in str(error)


@pytest.mark.parametrize("path", ("/huge", "/endless", *CHUNKED_TOO_LARGE))
def test_a_body_over_the_limit_is_refused(home, path):
    error = refused(home + path, max_bytes=2000)
    assert (error.file, error.field) == (home + path, "max_bytes")


@pytest.mark.parametrize("place", ("ftp://example.org/a", "file:///etc/passwd"))
def test_a_redirect_to_another_scheme_is_refused(home, place):
    error = refused(f"{home}/to/{place}")
    assert (error.file, error.field, error.value) == (place, "scheme", place.partition(":")[0])


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_body_of_malformed_length_is_refused_within_its_limit(home, name):
    """`int` accepts "-5", "+3", "1_0" and "0x3"; chunk extensions and trailers have no limit in the protocol."""
    error = refused(f"{home}/raw/{name}", max_bytes=2000)
    assert (error.file, error.field) == (f"{home}/raw/{name}", None)


@pytest.mark.parametrize("name", GOOD_BODIES)
def test_a_body_in_unusual_but_sound_chunks_arrives_whole(home, name):
    assert get(f"{home}/raw/{name}") == b"abcde"


def test_fetching_ends_when_it_is_cancelled(home):
    asked = []
    with pytest.raises(CancelledError) as caught:
        get(f"{home}/endless", max_bytes=10**9, cancelled=lambda: asked.append(1) or len(asked) > 2)
    assert caught.value.file == f"{home}/endless"
    assert len(asked) == 3


def test_only_allowed_domains_are_fetched_from(home, monkeypatch):
    network = FakeNetwork(
        monkeypatch, home, {name: [["93.184.216.34"]] for name in ("images.example", "a.cdn.example")}
    )
    allowed = ("images.example", "*.cdn.example")
    assert fetch("http://Images.Example./ok", allowed_domains=allowed, timeout_s=5) == BODY
    assert fetch("http://a.cdn.example/ok", allowed_domains=allowed, timeout_s=5) == BODY
    for host in ("other.example", "cdn.example", "notimages.example", "images.example.org", "127.0.0.1"):
        error = refused(f"http://{host}/ok", allowed_domains=allowed)
        assert (error.file, error.field) == (f"http://{host}/ok", "host")
    assert len(network.connected) == 2


def test_a_redirect_leaves_no_allowed_domain(home, monkeypatch):
    FakeNetwork(monkeypatch, home, {"images.example": [["93.184.216.34"]]})
    error = refused("http://images.example/to/http://other.example/ok", allowed_domains=("images.example",))
    assert (error.file, error.field) == ("http://other.example/ok", "host")


@pytest.mark.parametrize("path", ("/drip", "/slow-header"))
def test_the_deadline_holds_for_a_server_that_drips(home, path):
    begun = time.monotonic()
    error = refused(home + path, timeout_s=0.3)
    assert (error.kind, error.file, error.is_transient) == ("timeout", home + path, True)
    assert time.monotonic() - begun < 1.0


def test_the_deadline_holds_for_a_resolver_that_hangs(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(0.5) or [])
    assert refused("http://images.test/a.png", timeout_s=0.1).kind == "timeout"


def test_redirects_are_followed_up_to_their_number(home):
    assert get(f"{home}/hops/4") == BODY
    error = refused(f"{home}/hops/5")
    assert (error.kind, error.file) == ("redirect", f"{home}/hops/5")
    assert get(f"{home}/hops/1", max_redirects=2) == BODY
    assert refused(f"{home}/hops/0", max_redirects=0).kind == "redirect"
    assert get(f"{home}/accents") == BODY


def test_a_refused_connection_names_the_url_and_the_reason(home):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.png"
        error = refused(url)
    assert (error.kind, error.file) == ("connection", url)
    assert os.strerror(errno.ECONNREFUSED) in error.problem


def test_a_redirect_to_a_private_address_is_refused(home, monkeypatch):
    network = FakeNetwork(monkeypatch, home, {"images.example": [["93.184.216.34"]]})
    error = refused(f"http://images.example/to/{home}/ok", allow_private=False)
    assert (error.file, error.field) == (f"{home}/ok", "host")
    assert network.connected == ["93.184.216.34"]


def test_the_connection_goes_to_the_address_that_was_checked(home, monkeypatch):
    network = FakeNetwork(monkeypatch, home, {"rebinding.example": [["93.184.216.34"], ["127.0.0.1"]]})
    assert fetch("http://rebinding.example/host", timeout_s=5) == b"rebinding.example"
    assert network.connected == ["93.184.216.34"]
    assert len(network.names["rebinding.example"]) == 1


def test_one_private_address_among_public_ones_is_refused(home, monkeypatch):
    network = FakeNetwork(monkeypatch, home, {"mixed.example": [["93.184.216.34", "10.0.0.1"]]})
    error = refused("http://mixed.example/ok", allow_private=False)
    assert (error.file, error.field) == ("http://mixed.example/ok", "host")
    assert network.connected == []


def test_an_ssrf_error_does_not_reveal_whether_an_internal_name_exists(home, monkeypatch):
    """Clients that send URLs must not learn names and addresses of the internal network."""

    def look_up(host: str, *_: object, **__: object) -> list:
        if host == "wiki.internal":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.1.2.3", 80))]
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    known, unknown = (
        str(refused(f"http://{name}/", allow_private=False)) for name in ("wiki.internal", "wikx.internal")
    )
    assert known.replace("wiki", "wikx") == unknown
    assert "10.1.2.3" not in known


def test_an_unknown_host_is_named(monkeypatch):
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = refused("http://nowhere.test/a")
    assert (error.kind, error.field) == ("unknown_host", "host")


def test_tls_certificates_and_names_are_verified(home):
    assert tls_context().verify_mode is ssl.CERT_REQUIRED
    assert tls_context().check_hostname
    assert refused(home.replace("http:", "https:") + "/ok").kind == "connection"


def test_fetch_works_in_a_thread_with_a_running_event_loop(home):
    async def cell() -> bytes:
        return get(f"{home}/ok")

    assert asyncio.run(cell()) == BODY
