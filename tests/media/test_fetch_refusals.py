"""What is refused before anything is connected to; data URLs; how messages name a URL."""

import base64
import socket

import pytest

from vila.core.errors import MediaError
from vila.media.connection import is_public
from vila.media.fetch import data_url_bytes, fetch, shown

BODY = bytes(range(256)) * 4


@pytest.fixture
def no_connection(monkeypatch):
    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


PRIVATE = (
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "localhost", "0.0.0.0", "10.0.0.1", "172.16.0.1",
    "192.168.1.1", "169.254.169.254", "100.64.0.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "[::1]", "[::]", "[fe80::1]", "[fc00::1]", "[fec0::1]", "[ff02::1]", "[::ffff:127.0.0.1]", "[::ffff:a00:1]",
    "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::127.0.0.1]", "[2001:db8::1]",
)  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_refused_without_a_connection(host, no_connection):
    with pytest.raises(MediaError, match="which is not a public address; download the file and give its path"):
        fetch(f"http://{host}/latest/meta-data", timeout_s=5)


@pytest.mark.parametrize(
    "address", ("93.184.216.34", "8.8.8.8", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808")
)
def test_public_addresses_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "url, message",
    (
        ("file:///etc/passwd", "only http and https addresses are opened, not 'file'"),
        ("gopher://example.org/", "not 'gopher'"),
        ("cat.jpg", "only http and https addresses are opened, not ''"),
        ("http:///a.png", "names no valid host"),
        ("http://ex ample.org/", "names no valid host"),
        ("http://[::1/", "not a valid URL"),
        ("http://a..b/", "not a valid URL"),
        ("http://example.org:99999/", "not a valid URL"),
        ("http://me:secret@example.org/", "^http://example.org/: holds a user name or password"),
    ),
)
def test_what_is_not_a_plain_web_address_is_refused_without_a_connection(url, message, no_connection):
    with pytest.raises(MediaError, match=message):
        fetch(url, timeout_s=5)


def test_data_urls_are_decoded_within_the_limit():
    text = base64.b64encode(BODY).decode()
    assert data_url_bytes(f"data:image/png;base64,{text}") == BODY
    assert data_url_bytes(f"DATA:;base64,{text[:40]}\n {text[40:].rstrip('=')}") == BODY
    assert data_url_bytes(f"data:;base64,{base64.urlsafe_b64encode(BODY).decode()}") == BODY
    assert data_url_bytes("data:,a%20b") == b"a b"
    assert data_url_bytes(f"data:;base64,{text}", max_bytes=len(BODY)) == BODY
    for url in (f"data:;base64,{text}", "data:," + "a" * 2000):
        with pytest.raises(MediaError, match="larger than the limit of 1,000 bytes"):
            data_url_bytes(url, max_bytes=1000)
    with pytest.raises(MediaError, match=r"data:image/png;base64,\*\*: its base64 is damaged"):
        data_url_bytes("data:image/png;base64,**")
    with pytest.raises(MediaError, match="not a data URL"):
        data_url_bytes("data:image/png")


def test_messages_hide_queries_and_passwords_and_stay_short():
    assert shown("https://me:pw@host/a.png?token=secret") == "https://host/a.png?..."
    assert shown("https://host/" + "a" * 1000).endswith("... (1013 characters)")
    assert (
        shown("data:image/png;base64," + "A" * 1000) == "data:image/png;base64,AAAAAAAAAAAAAAAAAA... (1022 characters)"
    )
    assert shown("http://host/\x1b[31m") == "http://host/_[31m"
