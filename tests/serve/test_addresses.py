"""SSRF protection of image URLs: private addresses are never fetched."""

import httpcore2
import pytest

from tests import tiny
from tests.serve.fixtures import ask, data_url, image_part, pages
from vila.media import http
from vila.media.limits import MediaLimits

V4 = (
    "127.0.0.1 localhost 127.1 2130706433 0x7f000001 0x7f.1 0177.0.0.1 017700000001 0 0.0.0.0 10.0.0.1 172.16.0.1 "
    "192.168.1.1 169.254.169.254 100.64.0.1 198.18.0.1 224.0.0.1 "
    "255.255.255.255 \u2460\u2461\u2466.\u24ea.\u24ea.\u2460"
)
V6 = (
    "::1 :: ::ffff:127.0.0.1 ::ffff:7f00:1 0:0:0:0:0:ffff:a9fe:a9fe ::127.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: "
    "2001:0:0:0:0:0:80ff:fffe fe80::1 fc00::1 fec0::1 ff02::1"
)
PRIVATE = [*V4.split(), *(f"[{address}]" for address in V6.split())]


def asked(app, url):
    return ask(app, messages=[{"role": "user", "content": [image_part(url)]}])


@pytest.fixture
def dialled(monkeypatch):
    """Addresses that a connection was tried to."""
    tried = []

    async def connect(self, host, port, *_):
        tried.append(host)
        raise httpcore2.ConnectError("no test connects to the network")

    monkeypatch.setattr(httpcore2.AnyIOBackend, "connect_tcp", connect)
    return tried


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_rejected_without_a_connection(app, dialled, host):
    answer = asked(app, f"http://{host}/a.png")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].content[0]"
    assert dialled == []


def test_the_check_detects_a_connection(app, dialled):
    assert asked(app, "http://93.184.215.14/a.png").status_code == 400
    assert dialled == ["93.184.215.14"]


def test_a_host_is_resolved_once_and_all_its_addresses_must_be_public(app, dialled, monkeypatch):
    import socket

    answers = [["93.184.215.14"], ["127.0.0.1"], ["93.184.215.14", "10.0.0.1"]]
    looked_up = []

    def look_up(host, port, **options):
        looked_up.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in answers[len(looked_up) - 1]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    # The second answer of the name server is never asked for: what was checked is what is dialled.
    assert asked(app, "http://rebind.example/a.png").status_code == 400
    assert (looked_up, dialled) == (["rebind.example"], ["93.184.215.14"])
    for _ in range(2):
        error = asked(app, "http://rebind.example/a.png").json()["error"]
        assert error["code"] == "invalid_media"
        assert "127.0.0.1" not in error["message"] and "10.0.0.1" not in error["message"]
    assert len(dialled) == 1


@pytest.mark.parametrize(
    "target", ["http://127.0.0.2/a.png", "http://[::1]/a.png", "file:///etc/passwd", "ftp://a.b/c"]
)
def test_redirects_to_private_addresses_are_rejected(app, monkeypatch, target):
    is_public = http.is_public
    monkeypatch.setattr(http, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
    with pages({"/a.png": target}) as web:
        answer = asked(app, f"{web}/a.png")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_media"


def test_an_allowed_private_address_is_fetched(service, monkeypatch):
    from vila.serve.app import create_app
    from vila.serve.messages import Limits

    monkeypatch.setattr(service, "limits", Limits(allow_private=True, media=MediaLimits(image_bytes=10_000)))
    with pages({"/a.png": tiny.image(1).source, "/big.png": bytes(20_000)}) as web:
        app = create_app(service)
        assert asked(app, f"{web}/a.png").status_code == 200
        for path, word in (("big.png", "10,000"), ("none.png", "404")):
            error = asked(app, f"{web}/{path}").json()["error"]
            assert (error["code"], error["param"]) == ("invalid_media", "messages[0].content[0]")
            assert word in error["message"]


def test_only_allowed_domains_are_fetched_from(service, dialled, monkeypatch):
    from vila.serve.app import create_app
    from vila.serve.messages import Limits

    monkeypatch.setattr(service, "limits", Limits(allowed_domains=("93.184.215.14",)))
    app = create_app(service)
    assert asked(app, "http://93.184.215.15/a.png").status_code == 400
    assert dialled == []
    assert asked(app, "http://93.184.215.14/a.png").status_code == 400
    assert dialled == ["93.184.215.14"]
    assert asked(app, data_url()).status_code == 200
