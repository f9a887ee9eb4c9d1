"""What is refused before anything is connected to; data URLs; how messages name a URL."""

import base64
import ipaddress
import random
import socket

import pytest

from vila.core.errors import MISSING, MediaError
from vila.media.http import data_url_bytes, fetch, redact_url
from vila.media.ssrf import is_public

BODY = bytes(range(256)) * 4


@pytest.fixture
def no_connection(monkeypatch):
    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# As they may be written in a URL.
PRIVATE = (
    "127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "localhost",
    "LOCALHOST", "localhost.", "127.0.0.1.", "\uff11\uff12\uff17.0.0.1", "127\u30020\u30020\u30021", "0.0.0.0", "0",
    "10.0.0.1", "169.254.169.254", "0xa9fea9fe", "2852039166", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[fe80::1]",
    "[fe80::1%25lo]", "[::ffff:127.0.0.1]", "[::ffff:a00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::127.0.0.1]",
)  # fmt: skip
SPECIAL = (
    "0.1.2.3", "10.255.255.255", "100.64.0.1", "100.100.100.200", "100.127.255.255", "127.255.255.255",
    "168.63.129.16", "169.254.169.254", "172.16.0.0", "172.31.255.255", "192.0.0.0", "192.0.0.192", "192.0.0.255",
    "192.0.2.1", "192.31.196.1", "192.52.193.1", "192.88.99.1", "192.168.0.1", "192.175.48.1", "198.18.0.1",
    "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::ffff:0:0", "::ffff:10.0.0.1", "::ffff:0:10.0.0.1", "::10.0.0.1", "64:ff9b::10.0.0.1",
    "64:ff9b::192.0.0.1", "64:ff9b:1::1", "100::1", "100:0:0:1::1", "2001::1", "2001:0:53aa:64c::1", "2001:1::1",
    "2001:2::1", "2001:3::1", "2001:4:112::1", "2001:10::1", "2001:20::1", "2001:30::1", "2001:db8::1",
    "2002:a00:1::", "2002:808:808::", "2620:4f:8000::1", "3fff::1", "3fff:fff::1", "4000::1", "5f00::1", "fc00::1",
    "fd00:ec2::254", "fd20:ce::254", "fe80::1", "fe80::1%eth0", "2606:4700::1%1", "fec0::1", "feff::1", "ff02::1", "",
    "localhost", "1.2.3", "8.8.8.8.8", "0x08080808",
)  # fmt: skip
PUBLIC = (
    "93.184.216.34", "8.8.8.8", "1.1.1.1", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0",
    "168.63.129.17", "172.15.255.255", "172.32.0.0", "192.0.1.0", "192.167.255.255", "198.17.255.255", "198.20.0.0",
    "223.255.255.255", "2606:2800:220:1::1", "2001:200::1", "2001:4860:4860::8888", "2a00:1450::1", "3ffe::1",
    "::ffff:8.8.8.8", "64:ff9b::808:808",
)  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_refused_without_a_connection(host, no_connection):
    with pytest.raises(MediaError) as caught:
        fetch(f"http://{host}/latest/meta-data", timeout_s=5)
    assert caught.value.file
    assert caught.value.field in ("host", None)  # None: not a valid URL on this platform


def test_special_addresses_are_not_public_and_their_neighbours_are():
    assert [address for address in SPECIAL if is_public(address)] == []
    assert [address for address in PUBLIC if not is_public(address)] == []


def test_no_special_address_by_python_is_public():
    """The registry of the Python at hand may be older than ours, but not stricter."""
    draw = random.Random(0)
    for bits, kind in ((32, ipaddress.IPv4Address), (128, ipaddress.IPv6Address)):
        for _ in range(2000):
            # Half of all IPv6 addresses drawn evenly are far from anything allocated.
            number = draw.getrandbits(bits) >> (draw.randrange(0, 16) if bits == 128 else 0)
            address = kind(number)
            assert address.is_global or not is_public(str(address))


@pytest.mark.parametrize(
    "url, scheme",
    (
        ("file:///etc/passwd", "file"),
        ("gopher://example.org/", "gopher"),
        ("cat.jpg", ""),
        ("http:///a.png", None),
        ("http://ex ample.org/", None),
        ("http://[::1/", None),
        ("http://a..b/", None),
        ("http://example.org:99999/", None),
        ("http://me:secret@example.org/", None),
    ),
)
def test_what_is_not_a_plain_web_address_is_refused_without_a_connection(url, scheme, no_connection):
    with pytest.raises(MediaError) as caught:
        fetch(url, timeout_s=5)
    assert caught.value.file == redact_url(url)
    assert (caught.value.field, caught.value.value) == (("scheme", scheme) if scheme is not None else (None, MISSING))


def test_data_urls_are_decoded_within_the_limit():
    text = base64.b64encode(BODY).decode()
    assert data_url_bytes(f"data:image/png;base64,{text}") == BODY
    assert data_url_bytes(f"DATA:;base64,{text[:40]}\n {text[40:].rstrip('=')}") == BODY
    assert data_url_bytes(f"data:;base64,{base64.urlsafe_b64encode(BODY).decode()}") == BODY
    assert data_url_bytes("data:,a%20b") == b"a b"
    assert data_url_bytes(f"data:;base64,{text}", max_bytes=len(BODY)) == BODY
    for url in (f"data:;base64,{text}", "data:," + "a" * 2000):
        with pytest.raises(MediaError) as caught:
            data_url_bytes(url, max_bytes=1000)
        assert caught.value.field == "max_bytes"
    for url in ("data:image/png;base64,**", "data:image/png"):
        with pytest.raises(MediaError) as caught:
            data_url_bytes(url)
        assert caught.value.file == url


def test_messages_hide_queries_and_passwords_and_stay_short():
    assert redact_url("https://me:pw@host/a.png?token=secret") == "https://host/a.png?..."
    assert redact_url("https://host/" + "a" * 1000).endswith("... (1013 characters)")
    assert (
        redact_url("data:image/png;base64," + "A" * 1000)
        == "data:image/png;base64,AAAAAAAAAAAAAAAAAA... (1022 characters)"
    )
    assert redact_url("http://host/\x1b[31m") == "http://host/_[31m"
