"""Slow, half-open and many connections."""

import asyncio
import json
import socket
import threading
import time

import httpx2
import pytest

from tests.serve import fixtures
from tests.serve.fixtures import body, on_a_port
from vila.serve import messages
from vila.serve.app import create_app
from vila.serve.messages import Limits

CUT_S = 5.0
"""How long a test waits for what should come at once."""


def connect(port):
    connection = socket.create_connection(("127.0.0.1", port))
    connection.settimeout(CUT_S)
    return connection


def ended(connection):
    """Bytes that the server sends before it closes the connection."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def head(length, *more):
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


@pytest.mark.parametrize("begun", [b"", b"POST /v1/chat/comp", b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: "])
def test_idle_connections_time_out(app, begun):
    with on_a_port(app, head_s=0.2) as port, connect(port) as connection:
        connection.sendall(begun)
        assert ended(connection) == b""
        assert httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_slow_headers_do_not_extend_the_timeout(app):
    with on_a_port(app, head_s=0.3) as port, connect(port) as connection:
        until = time.monotonic() + CUT_S
        with pytest.raises(OSError, match="reset|pipe"):
            while time.monotonic() < until:
                connection.sendall(b"X")
                time.sleep(0.05)


def test_the_header_timeout_applies_to_further_requests(app):
    with on_a_port(app, head_s=0.2) as port, connect(port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        while not received.endswith(b"}"):
            received += connection.recv(65536)
        connection.sendall(b"GET /hea")
        assert ended(connection) == b""


def test_a_missing_body_times_out_with_408(service):
    app = create_app(service, body_s=0.2)
    with on_a_port(app) as port, connect(port) as connection:
        connection.sendall(head(1000) + b'{"model": ')
        received = ended(connection)
    assert received.startswith(b"HTTP/1.1 408 ")


def test_a_client_that_does_not_read_is_disconnected(service):
    cancelled = service.models.models[0].batcher.stats().cancelled
    with on_a_port(create_app(service), stall_s=0.2) as port:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", port))
        asked = json.dumps(body(max_tokens=1900, stream=True, logprobs=True, top_logprobs=20, n=4)).encode()
        connection.sendall(head(len(asked)) + asked)
        until = time.monotonic() + 20
        while service.models.models[0].batcher.stats().cancelled == cancelled and time.monotonic() < until:
            time.sleep(0.05)
        connection.close()
    assert service.models.models[0].batcher.stats().cancelled > cancelled
    assert service.models.models[0].batcher.stats().running == 0


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "in chunks"])
def test_a_client_that_sends_too_much_receives_the_error(service, announced):
    piece = b" " * 500_000

    def pieces():
        for _ in range(100):
            yield piece

    headers = {"Content-Type": "application/json", **({"Content-Length": "50000000"} if announced else {})}
    app = create_app(service)
    with on_a_port(app) as port:
        answer = httpx2.post(f"http://127.0.0.1:{port}/v1/chat/completions", content=pieces(), headers=headers)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
        assert httpx2.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body()).status_code == 200


def test_large_bodies_at_once_do_not_fill_the_memory(service, monkeypatch):
    monkeypatch.setattr(service, "limits", Limits(body=10_000))
    with on_a_port(create_app(service)) as port:
        waiting = [connect(port) for _ in range(9)]
        for connection in waiting:
            connection.sendall(head(9_900) + b" " * 9_800)
        for _ in range(100):
            refused = httpx2.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body(user="x" * 5000))
            if refused.status_code == 429:
                break
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        for connection in waiting:
            connection.close()


def test_200_concurrent_requests_get_an_answer_or_429():
    service = fixtures.ready(max_num_seqs=4, max_queue=20)

    async def burst(port):
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=60) as client:
            asked = [client.post("/v1/chat/completions", json=body(max_tokens=24)) for _ in range(200)]
            return await asyncio.gather(*asked)

    with on_a_port(create_app(service)) as port:
        answers = asyncio.run(burst(port))
        assert {answer.status_code for answer in answers} == {200, 429}
        good = [answer.json()["choices"][0]["message"]["content"] for answer in answers if answer.status_code == 200]
        assert len(good) >= 20
        assert len(set(good)) == 1
        assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 429)
        assert httpx2.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body()).status_code == 200
    stats = service.models.models[0].batcher.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    service.models.close()


def test_requests_of_disconnected_clients_are_cancelled(service):
    cancelled = service.models.models[0].batcher.stats().cancelled
    asked = json.dumps(body(max_tokens=1900)).encode()
    with on_a_port(create_app(service)) as port:
        connection = connect(port)
        connection.sendall(head(len(asked)) + asked)
        until = time.monotonic() + CUT_S
        while service.models.models[0].batcher.stats().running == 0 and time.monotonic() < until:
            time.sleep(0.01)
        connection.close()
        while service.models.models[0].batcher.stats().running and time.monotonic() < until:
            time.sleep(0.01)
    assert service.models.models[0].batcher.stats().cancelled == cancelled + 1


def test_slow_urls_do_not_block_other_requests(service, monkeypatch):
    held = threading.Event()
    opened = messages.open_source

    def slow(url, *arguments, **options):
        if url.startswith("http"):
            held.wait(CUT_S)
        return opened(url, *arguments, **options)

    monkeypatch.setattr(messages, "open_source", slow)
    fetched = body(messages=[{"role": "user", "content": [fixtures.image_part("http://127.0.0.1/a.png")]}])
    inline = body(messages=[{"role": "user", "content": [fixtures.image_part(fixtures.data_url())]}])

    async def both(port):
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            waiting = [asyncio.ensure_future(client.post("/v1/chat/completions", json=fetched)) for _ in range(8)]
            await asyncio.sleep(0.05)
            answer = await client.post("/v1/chat/completions", json=inline)
            early = not any(one.done() for one in waiting)
            held.set()
            return answer.status_code, early, {one.status_code for one in await asyncio.gather(*waiting)}

    with on_a_port(create_app(service)) as port:
        assert asyncio.run(both(port)) == (200, True, {400})
