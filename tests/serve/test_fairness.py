"""Limits on connections, concurrency and memory are fair between clients."""

import asyncio
import json
import socket
import time
from contextlib import ExitStack

import httpx2
import pytest
from starlette.datastructures import Headers

from tests.serve import fixtures
from tests.serve.fixtures import body, on_a_port
from tests.serve.test_connections import connect, ended, head
from vila.serve.admission import ConcurrencyLimit
from vila.serve.app import create_app
from vila.serve.connections import ANSWERING, READING, Connections, client_address, connection_limit
from vila.serve.errors import ApiError
from vila.serve.messages import Limits
from vila.serve.middleware import BodyReader

KEYS = ["mine", "theirs"]
SOCKETS = 80
"""More than the requests that the service of these tests holds."""


@pytest.fixture(scope="module")
def service():
    service = fixtures.ready(max_num_seqs=4, max_queue=20)
    yield service
    service.models.close()


def asks(port, key="mine", **changes):
    headers = {"Authorization": f"Bearer {key}"}
    return httpx2.post(
        f"http://127.0.0.1:{port}/v1/chat/completions", json=body(**changes), headers=headers, timeout=30
    )


def opened(stack, port, count, sent, source=None):
    """Connections that send bytes and stay open."""
    out = []
    for _ in range(count):
        address = (source, 0) if source else None
        out.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), source_address=address)))
        out[-1].sendall(sent)
    return out


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1",
        b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n",
        b"POST /v2/unknown HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
        b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nAuthorization: Bearer theirs\r\n\r\n{",
        head(1000) + b"{",
        head(1000, "Authorization: Bearer wrong") + b"{",
        head(1000, "Authorization: Bearer theirs") + b"{",
    ],
    ids=["silent", "health", "chunked", "options", "unknown", "models", "no key", "wrong key", "another key"],
)
def test_unfinished_bodies_do_not_block_other_clients(service, sent):
    with on_a_port(create_app(service, keys=KEYS)) as port, ExitStack() as stack:
        opened(stack, port, SOCKETS, sent)
        assert asks(port).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/openapi.json", "/v1/models", "/v1/nothing"])
@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
def test_unexpected_bodies_are_rejected_unread(service, method, path):
    with on_a_port(create_app(service)) as port, connect(port) as connection:
        connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    assert fixtures.send(create_app(service), method, path, headers={"Content-Length": "0"}).status_code != 400


def test_a_stalled_body_times_out(service):
    app = create_app(service, stall_s=0.2)
    with on_a_port(app) as port, connect(port) as connection:
        connection.sendall(head(1000) + b"{")
        assert ended(connection).startswith(b"HTTP/1.1 408 ")


def test_idle_connections_are_closed_for_new_ones(service):
    limits = Connections(limit=20, per_address=20)
    with on_a_port(create_app(service), limits) as port, ExitStack() as stack:
        held = opened(stack, port, 30, b"GET /hea")
        assert asks(port).status_code == 200
        assert len(limits) <= 20
        held[0].settimeout(5)
        assert held[0].recv(10) == b""


def test_connections_are_limited_per_address(service):
    limits = Connections(limit=40, per_address=20)
    with on_a_port(create_app(service), limits) as port, ExitStack() as stack:
        others = opened(stack, port, 2, b"GET /hea", source="127.0.0.2")
        opened(stack, port, 50, head(1000) + b"{", source="127.0.0.3")
        assert len(limits) <= 22
        for one in others:
            one.settimeout(5)
            one.sendall(b"lth HTTP/1.1\r\nHost: x\r\n\r\n")
            assert one.recv(20).startswith(b"HTTP/1.1 200")


def test_connections_are_counted_until_they_are_closed(service):
    limits = Connections()
    with on_a_port(create_app(service), limits) as port:
        with ExitStack() as stack:
            opened(stack, port, 10, b"")
            assert asks(port).status_code == 200
            assert len(limits) >= 10
        until = time.monotonic() + 5
        while len(limits) and time.monotonic() < until:
            time.sleep(0.01)
        assert len(limits) == 0


def test_connections_with_a_running_request_are_kept():
    limits = Connections(limit=2)
    with socket.create_server(("127.0.0.1", 0)) as listening, ExitStack() as stack:
        ends = [stack.enter_context(socket.create_connection(listening.getsockname())) for _ in range(4)]
        one, two, three, four = ends
        assert limits.admit(one, ("10.0.0.1", 1)) and limits.admit(two, ("10.0.0.2", 1))
        limits.set_stage(one.fileno(), ANSWERING)
        limits.set_stage(two.fileno(), READING)
        assert limits.admit(three, ("10.0.0.3", 1))  # in place of two
        limits.set_stage(three.fileno(), ANSWERING)
        assert not limits.admit(four, ("10.0.0.4", 1))
        limits.release(one.fileno())
        assert limits.admit(four, ("10.0.0.4", 1))


def test_client_addresses():
    assert client_address(("10.1.2.3", 5)) == "10.1.2.3"
    assert client_address(("::ffff:10.1.2.3", 5, 0, 0)) == "10.1.2.3"
    assert client_address(("2001:db8:1:2:3::4", 5, 0, 0)) == client_address(("2001:db8:1:2::9", 7, 0, 0))
    assert client_address(("2001:db8:1:2::", 5)) != client_address(("2001:db8:1:3::", 5))
    assert client_address(("fe80::1%eth0", 5)) == "fe80::/64"
    assert client_address(None) == client_address(["unix"]) == "local"


def test_the_connection_limit_respects_the_file_limit():
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        assert connection_limit(500) <= 500
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
        fitted = connection_limit(600)
        assert fitted <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_bodies_in_tiny_chunks_are_disconnected(service):
    asked = json.dumps(body(user="x" * 40_000)).encode()
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in asked)
    start = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    with on_a_port(create_app(service)) as port, connect(port) as connection:
        try:
            connection.sendall(start + pieces + b"0\r\n\r\n")
            received = ended(connection)
        except OSError:
            received = b""
        assert received == b""
        # Pieces as clients send them are fine.
        large = b"".join(
            b"%x\r\n%s\r\n" % (len(asked[i : i + 500]), asked[i : i + 500]) for i in range(0, len(asked), 500)
        )
        with connect(port) as other:
            other.sendall(start + large + b"0\r\n\r\n")
            assert other.recv(20).startswith(b"HTTP/1.1 200")


def test_one_client_cannot_lock_others_out(service):
    """One key sends more requests than the limit; another one is answered at once, and then has a share."""

    async def both(port):
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=60) as client:

            async def ask(key, tokens):
                headers = {"Authorization": f"Bearer {key}"}
                return await client.post("/v1/chat/completions", json=body(max_tokens=tokens), headers=headers)

            many = [asyncio.ensure_future(ask("mine", 300)) for _ in range(60)]
            until = time.monotonic() + 20
            while service.models.models[0].concurrency.active < 24 and time.monotonic() < until:
                await asyncio.sleep(0.01)
            other = await ask("theirs", 2)
            unanswered = sum(not one.done() or one.result().status_code == 200 for one in many)
            statuses = [(await one).status_code for one in many]
            return other.status_code, unanswered, statuses

    service.models.models[0].concurrency = ConcurrencyLimit(24)
    with on_a_port(create_app(service, keys=KEYS)) as port:
        other, unanswered, statuses = asyncio.run(both(port))
    assert other == 200
    assert unanswered >= 24
    assert statuses.count(200) >= 24 and set(statuses) == {200, 429}
    assert service.models.models[0].concurrency.active == 0


def test_active_clients_have_equal_shares():
    limit = ConcurrencyLimit(16)
    for _ in range(16):
        limit.acquire("a")
    with pytest.raises(ApiError):
        limit.acquire("a")
    limit.acquire("b")
    limit.acquire("c")
    with pytest.raises(ApiError):
        limit.acquire("d")
    assert limit.is_full
    limit.release("a")
    with pytest.raises(ApiError):
        limit.acquire("a")
    for _ in range(11):
        limit.release("a")
    for _ in range(3):
        limit.acquire("b")
    with pytest.raises(ApiError) as raised:
        limit.acquire("b")
    assert raised.value.status == 429
    for client in "abc":
        while limit._active[client]:
            limit.release(client)
    assert limit.active == 0


def test_a_request_with_n_answers_counts_n(service):
    app = create_app(service)
    limit = service.models.models[0].concurrency
    limit.acquire("x", 20)
    try:
        assert fixtures.ask(app, n=16).status_code == 429
        assert fixtures.ask(app, n=2).status_code == 200
    finally:
        limit.release("x", 20)


def test_a_client_may_use_half_of_the_body_memory():
    reader = BodyReader(max_bytes=100, max_total_bytes=400, timeout_s=5)

    def piece(count):
        async def receive():
            return {"type": "http.request", "body": b"x" * count, "more_body": False}

        return receive

    async def read(client, count):
        return await reader.read(Headers(), piece(count), client)

    for _ in range(2):
        assert len(asyncio.run(read("a", 100))) == 100
    with pytest.raises(ApiError) as raised:
        asyncio.run(read("a", 1))
    assert raised.value.status == 429
    assert len(asyncio.run(read("b", 100))) == 100
    reader.release("a", 200)
    reader.release("b", 100)
    assert reader.buffered.total() == 0


def test_memory_of_rejected_bodies_is_released(service, monkeypatch):
    monkeypatch.setattr(service, "limits", Limits(body=1000))
    app = create_app(service)
    for content in (b"x" * 2000, b"{", json.dumps(body()).encode()):
        fixtures.send(app, content=content, headers={"Content-Type": "application/json"})
    assert app.state.bodies.buffered.total() == 0
