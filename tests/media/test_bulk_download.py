"""Concurrent downloads from a local server with every kind of failure: retries, limits, rate limiting."""

import asyncio
import socket
import threading
import time
from contextlib import suppress
from http.server import ThreadingHTTPServer
from itertools import pairwise

import pytest

from tests.media.test_http import BAD_BODIES, TOO_LARGE, Handler
from tests.prepare.image_server import jpeg, serving
from vila.media.bulk_download import (
    BulkDownloader,
    DownloadOptions,
    DownloadResult,
    RateLimiter,
    interleave_hosts,
)
from vila.media.http import FetchError, retry_after_s

QUICK = {
    "allow_private": True, "host_delay_s": 0.0, "initial_backoff_s": 0.01, "max_connections_per_host": 64,
    "max_bytes": 100_000, "read_timeout_s": 5.0, "total_timeout_s": 5.0, "max_attempts": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def raw_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def download(*urls: str, **options) -> list[DownloadResult]:
    async def go() -> list[DownloadResult]:
        async with BulkDownloader(DownloadOptions(**{**QUICK, **options})) as downloader:
            return await asyncio.gather(*(downloader.download(url) for url in urls))

    return asyncio.run(go())


@pytest.mark.parametrize("path, body, attempts", [
    ("/good/3", jpeg(3), 1), ("/busy/a", jpeg(1), 2), ("/shaky/a", jpeg(1), 2), ("/hops/4", jpeg(5), 1),
])  # fmt: skip
def test_transient_failures_are_retried_until_the_body_is_complete(server, path, body, attempts):
    assert download(server.home + path) == [DownloadResult(server.home + path, body, attempts=attempts)]


@pytest.mark.parametrize("path, kind, attempts", [
    ("/missing", "http_404", 1), ("/down/1", "http_503", 2), ("/long-wait", "http_429", 1), ("/slow/1", "timeout", 2),
    ("/drip", "timeout", 2), ("/short", "connection", 2), ("/loop/0", "redirect", 1), ("/hops/9", "redirect", 1),
    ("/announced", "too_large", 1), ("/endless", "too_large", 1), ("/gzip", "encoding", 1), ("/noai", "noai", 1),
])  # fmt: skip
def test_failures_have_a_kind_and_only_transient_ones_are_retried(server, path, kind, attempts):
    short = {"/slow/1": {"read_timeout_s": 0.1}, "/drip": {"total_timeout_s": 0.2}}.get(path, {})
    (got,) = download(server.home + path, **short)
    assert (got.content, got.kind, got.attempts) == (None, kind, attempts)
    assert server.asked[path] == (attempts if kind != "redirect" else 1)
    assert got.reason


@pytest.mark.parametrize("name", sorted({*BAD_BODIES, *TOO_LARGE}))
def test_a_body_of_malformed_length_fails_within_its_limit(raw_server, name):
    (got,) = download(f"{raw_server}/raw/{name}", max_attempts=1, max_bytes=2000, total_timeout_s=2)
    assert (got.content, got.kind) == (None, "too_large" if name in TOO_LARGE else "connection")


@pytest.mark.parametrize("url", ["ftp://a/b", "http://", "http://a b/", "http://user:pw@a/", "http://[::1", "nothing"])
def test_an_invalid_url_fails_without_a_request(url):
    assert download(url)[0].kind == "bad_url"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "169.254.169.254", "10.0.0.1", "[::1]", "0x7f000001"])
def test_private_addresses_are_refused_without_a_connection(host, monkeypatch):
    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (got,) = download(f"http://{host}:9/x", allow_private=False)
    assert got.kind == "private_address"


def test_a_redirect_to_a_private_address_is_refused_too(server, monkeypatch):
    monkeypatch.setattr("vila.media.http.is_public", lambda address: address == "127.0.0.1")
    (got,) = download(server.home + "/to-private", allow_private=False)
    assert got.kind == "private_address"


def test_an_unknown_host_fails_once(monkeypatch):
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    (got,) = download("http://nowhere.example/x")
    assert (got.kind, got.attempts) == ("unknown_host", 1)


def test_a_name_is_resolved_once_and_the_checked_address_is_used(server, monkeypatch):
    asked = []

    def one_address(host, *_, **__):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", one_address)
    urls = [f"http://images.example:{server.server_port}/good/{n}" for n in range(8)]
    assert [got.content for got in download(*urls)] == [jpeg(n) for n in range(8)]
    assert asked.count("images.example") == 1


def test_an_untrusted_certificate_is_refused(tmp_path):
    import ssl
    import subprocess
    import threading

    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"], capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("needs openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            try:
                plain, _ = listener.accept()
                context.wrap_socket(plain, server_side=True)
            except OSError:
                pass

        threading.Thread(target=serve, daemon=True).start()
        (got,) = download(f"https://localhost:{listener.getsockname()[1]}/x", total_timeout_s=5, connect_timeout_s=5)
    assert (got.kind, got.attempts) == ("tls", 1)


def test_concurrent_requests_to_one_host_are_limited():
    with serving() as server:
        server.delay_s = 0.02
        got = download(*(f"{server.home}/good/{n}" for n in range(12)), max_connections_per_host=3, total_timeout_s=5)
    assert all(one.content for one in got)
    assert 1 < server.most_running <= 3


def test_starts_at_one_host_are_spaced_and_retry_after_pauses_all_of_them():
    async def starts(pause_s: float) -> list[float]:
        limiter, begun = RateLimiter(max_concurrent=8, delay_s=0.02, max_pause_s=1), []

        async def one() -> None:
            with suppress(FetchError):
                async with limiter.request("a"):
                    begun.append(time.monotonic())
                    if len(begun) == 1 and pause_s:
                        raise FetchError("http_429", retry_after_s=pause_s)

        await asyncio.gather(*(one() for _ in range(4)))
        return [after - before for before, after in pairwise(begun)]

    assert min(asyncio.run(starts(0))) >= 0.0199
    assert asyncio.run(starts(0.1))[0] >= 0.0999
    assert asyncio.run(starts(2))[0] < 1


def test_retry_after_is_seconds_or_a_date():
    assert retry_after_s("7", 0) == 7
    assert retry_after_s("Thu, 01 Jan 1970 00:01:00 GMT", 10) == 50
    assert retry_after_s("Thu, 01 Jan 1970 00:00:05 GMT", 10) == 0
    assert retry_after_s("soon", 0) is None and retry_after_s(None, 0) is None


def test_urls_are_interleaved_by_host_and_none_is_lost():
    urls = ["http://a/1", "http://a/2", "http://a/3", "http://b/1", "http://[bad", "http://b/2"]
    assert interleave_hosts(urls) == [
        "http://a/1",
        "http://b/1",
        "http://[bad",
        "http://a/2",
        "http://b/2",
        "http://a/3",
    ]


def test_redirects_share_one_deadline():
    with serving() as server:
        server.delay_s = 0.1
        (got,) = download(f"{server.home}/hops/4", total_timeout_s=0.25, max_attempts=1)
    assert got.kind == "timeout"
