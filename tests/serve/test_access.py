"""API keys, allowed hosts, origins and header limits."""

import httpx2
import pytest
from starlette.responses import PlainTextResponse

from tests.serve.fixtures import body, on_a_port, send
from tests.serve.test_bad_input import refusal
from tests.serve.test_connections import connect, ended
from vila.core.errors import ConfigError
from vila.serve.admission import AllowedHosts, SameOrigin, host_name, is_loopback, parse_allowed_hosts, read_api_keys
from vila.serve.app import create_app


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:80", "127.3.2.1", "[::1]", "[::1]:8000", "a.localhost",
     "localhost."],
)  # fmt: skip
def test_a_local_server_accepts_loopback_host_names(service, host):
    app = create_app(service, hosts=parse_allowed_hosts("127.0.0.1", ()))
    assert send(app, "GET", "/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "evillocalhost",
     "10.0.0.1", "0.0.0.0", "127.0.0.1@evil.example", "evil.example#127.0.0.1", "127.0.0.1/evil", "", "[::2]", "[",
     "\u00e9.example"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics", "/openapi.json"])
def test_a_local_server_rejects_other_host_names(service, host, path):
    app = create_app(service, hosts=parse_allowed_hosts("localhost", ()))
    error = refusal(send(app, "GET", path, headers={"Host": host.encode("latin-1")}), 403)
    assert error["code"] == "host_not_allowed"


def test_the_host_is_checked_before_the_body_is_read(service):
    app = create_app(service, hosts=parse_allowed_hosts("::1", ()))
    assert refusal(send(app, json=body(), headers={"Host": "evil.example"}), 403)
    with on_a_port(app) as port, connect(port) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert ended(connection).startswith(b"HTTP/1.1 200")


def test_allowed_hosts_and_wildcards_are_accepted():
    hosts = parse_allowed_hosts("127.0.0.1", ["vila.example", "*.Lab.example"])
    for host in ("vila.example", "VILA.example.", "a.lab.example", "a.b.lab.example", "localhost"):
        assert hosts.accepts(host)
    for host in ("lab.example", "xlab.example", "vila.example.evil", "a.vila.example"):
        assert not hosts.accepts(host)


def test_a_public_server_accepts_every_host_unless_some_are_given():
    assert parse_allowed_hosts("0.0.0.0", ()) is None
    assert parse_allowed_hosts("192.168.1.5", ()) is None
    assert isinstance(parse_allowed_hosts("0.0.0.0", ["a.example"]), AllowedHosts)


@pytest.mark.parametrize("name", ["", "*", "*.", "http://a.example", "a.example:80", "a b", "a@b", "a/b", "*.*.a"])
def test_invalid_host_names_are_rejected(name):
    with pytest.raises(ConfigError) as raised:
        parse_allowed_hosts("127.0.0.1", [name])
    assert (raised.value.field, raised.value.value) == ("--allowed-host", name)


def test_host_names_of_headers():
    assert host_name("a.example:80") == "a.example"
    assert host_name("[::1]:80") == "::1"
    assert host_name("[::1") == ""
    assert is_loopback("127.0.0.1") and not is_loopback("128.0.0.1") and not is_loopback("")


def test_keys_come_from_file_command_line_and_environment(service, tmp_path):
    file = tmp_path / "keys"
    file.write_text("\ufeff# keys of the lab\nalpha\n\n  beta  \r\nalpha\n")
    keys = read_api_keys(["gamma"], file, "delta")
    assert sorted(keys) == ["alpha", "beta", "delta", "gamma"]
    app = create_app(service, keys=keys)
    for key in keys:
        assert send(app, "GET", "/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    for key in ("", "alpha.", "alphaa", "# keys of the lab", "Alpha"):
        assert refusal(send(app, "GET", "/v1/models", headers={"Authorization": f"Bearer {key}"}), 401)


@pytest.mark.parametrize(
    ("content", "record"),
    [(b"", None), (b"# nothing\n\n", None), (b"good\nwith space\n", "line 2"), ("k\u00e9y\n".encode(), "line 1"),
     (b"good\n\x01bad", "line 2"), (b"\xff\xfe\x00", None)],
)  # fmt: skip
def test_errors_name_the_key_file_and_never_show_a_key(tmp_path, content, record):
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        read_api_keys((), file)
    assert (raised.value.file, raised.value.record) == (str(file), record)
    assert not any(word in str(raised.value).replace(str(file), "") for word in ("good", "with space", "bad"))


def test_a_missing_key_file_is_named(tmp_path):
    with pytest.raises(ConfigError) as raised:
        read_api_keys((), tmp_path / "none")
    assert raised.value.file == str(tmp_path / "none")


@pytest.mark.parametrize("key", ["", " ", "a b", "k\u00e9y", "a\n"])
def test_invalid_and_empty_keys_are_rejected(key):
    with pytest.raises(ConfigError) as raised:
        read_api_keys([key], None)
    assert raised.value.field == "--api-key"


def test_without_keys_there_is_no_authentication():
    assert read_api_keys((), None, "") == ()


def test_clients_are_identified_by_key_or_address(service, monkeypatch):
    seen = []
    room = service.models.models[0].concurrency
    monkeypatch.setattr(room, "acquire", lambda client, count: seen.append((client, count)))
    monkeypatch.setattr(room, "release", lambda client, count: None)
    app = create_app(service, keys=["one", "two"])
    for key in ("two", "one"):
        assert send(app, json=body(n=2), headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert send(create_app(service), json=body()).status_code == 200
    assert seen == [("key 1", 2), ("key 0", 2), ("127.0.0.1", 1)]


@pytest.mark.parametrize(
    "headers", [{f"X-{number}": "a" for number in range(101)}, {"X-Long": "a" * 8192}, {"X" * 8192: "a"}]
)
def test_too_many_and_too_long_headers_are_rejected(service, headers):
    assert refusal(send(create_app(service), "GET", "/health", headers=headers), 431)["code"] == "headers_too_large"


def test_excessive_headers_close_the_connection(service):
    with on_a_port(create_app(service)) as port, connect(port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 20_000)
        assert ended(connection)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431", b"")


async def hello(scope, receive, send):
    await PlainTextResponse("hello")(scope, receive, send)


@pytest.mark.parametrize(
    ("origin", "status"),
    [(None, 200), ("http://127.0.0.1:7860", 200), ("http://localhost:7860", 403), ("http://127.0.0.1:7861", 403),
     ("https://evil.example", 403), ("null", 403), ("", 403), ("https://vila.example", 200)],
)  # fmt: skip
def test_the_demo_rejects_other_origins(origin, status):
    page = SameOrigin(hello, parse_allowed_hosts("127.0.0.1", ["vila.example"]))
    headers = {"Host": "127.0.0.1:7860", **({} if origin is None else {"Origin": origin})}
    assert send(page, path="/gradio_api/queue/join", json={}, headers=headers).status_code == status


def test_the_demo_accepts_loopback_host_names_only():
    page = SameOrigin(hello, parse_allowed_hosts("127.0.0.1", ()))
    assert send(page, "GET", "/", headers={"Host": "evil.example"}).status_code == 403
    assert send(page, "GET", "/", headers={"Host": "localhost:7860"}).status_code == 200
    open_to_all = SameOrigin(hello, parse_allowed_hosts("0.0.0.0", ()))
    for origin, status in (("http://box.lan:7860", 200), ("http://evil", 403)):
        headers = {"Host": "box.lan:7860", "Origin": origin}
        assert send(open_to_all, "GET", "/", headers=headers).status_code == status


def test_the_gradio_app_has_the_middleware(tmp_path):
    pytest.importorskip("gradio", reason="needs pip install 'vila-vlm[demo]'")
    from vila.serve.demo.client import ApiClient
    from vila.serve.demo.ui import launch

    blocks, url = launch(ApiClient("http://127.0.0.1:9"), ["one"], "starter", tmp_path, host="127.0.0.1", port=0)
    try:
        assert httpx2.get(url).status_code == 200
        assert httpx2.get(url, headers={"Host": "evil.example"}).status_code == 403
        assert httpx2.get(url, headers={"Origin": "https://evil.example"}).status_code == 403
    finally:
        blocks.close(verbose=False)
