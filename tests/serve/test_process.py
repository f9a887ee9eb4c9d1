"""The server process: log output, shutdown, and start errors."""

import json
import signal
import socket
import ssl
import subprocess
import threading
import time
from contextlib import suppress

import httpx2
import pytest

from tests.serve.fixtures import Process, body
from vila.core.errors import ConfigError
from vila.serve.connections import Connections, listen


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-keyout", key, "-out", cert, "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def test_sigterm_in_mid_stream_lets_the_answer_end_and_refuses_new_ones(model_folder, certificate):
    """One process shows it all: HTTPS, two models with names, a key of the environment, and the end."""
    cert, key = certificate
    options = [
        "--served-model-name",
        "a,first",
        "--served-model-name",
        "b",
        "--ssl-certfile",
        cert,
        "--ssl-keyfile",
        key,
        "--root-path",
        "x",
    ]
    trust = {"verify": ssl.create_default_context(cafile=cert), "headers": {"Authorization": "Bearer k"}}
    with Process(model_folder, model_folder, *options, VILA_API_KEY="k") as server:
        assert server.url.startswith("https://127.0.0.1:")
        assert server.url.endswith("/x/v1")
        assert httpx2.get(f"{server.root}/health", **trust).status_code == 200
        assert httpx2.post(f"{server.url}/chat/completions", json=body(model="b"), **trust).status_code == 503
        server.await_ready(**trust)
        assert httpx2.get(f"{server.url}/models", verify=trust["verify"]).status_code == 401
        listed = httpx2.get(f"{server.url}/models", **trust).json()["data"]
        assert [model["id"] for model in listed] == ["a", "b"]
        asked = body(model="first", max_tokens=1000, stream=True)
        with httpx2.stream("POST", f"{server.url}/chat/completions", json=asked, timeout=60, **trust) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.popen.send_signal(signal.SIGTERM)
            refused = httpx2.post(f"{server.url}/chat/completions", json=body(model="b"), **trust)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
            assert refused.headers["retry-after"]
            assert httpx2.get(f"{server.root}/ready", **trust).json()["status"] == "stopping"
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert server.popen.wait(20) == 0
        assert "Traceback" not in "".join(server.log_lines)


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(model_folder):
    with Process(model_folder, "--shutdown-timeout", "60") as server:
        server.await_ready()
        threading.Thread(target=_ask_for_long, args=(server.url,), daemon=True).start()
        _until(lambda: 'vila_running{model="tiny"} 8' in httpx2.get(f"{server.root}/metrics").text)
        server.popen.send_signal(signal.SIGTERM)
        _until(lambda: httpx2.get(f"{server.root}/ready").json()["status"] == "stopping")
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(20) == -signal.SIGTERM


def _ask_for_long(url):
    with suppress(httpx2.HTTPError):
        httpx2.post(f"{url}/chat/completions", json=body(max_tokens=1900, n=8), timeout=60)


def _until(what):
    limit = time.monotonic() + 20
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_port_that_is_taken_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            listen("127.0.0.1", port, Connections())
        assert (caught.value.field, caught.value.value) == ("--port", port)
