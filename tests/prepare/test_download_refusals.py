"""Every kind of server failure: the image is left out, counted by kind and listed."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from tests.prepare.image_server import Handler, jpeg, serving
from tests.prepare.test_resumable_download import OPTIONS, document, failures, samples, write_shard
from vila.prepare.mmc4 import prepare_mmc4
from vila.prepare.resumable_download import KEEP_ORIGINAL

QUICK = {"read_timeout_s": 0.3, "total_timeout_s": 0.4}
FAILURES = {
    "/missing": ("http_404", 1),
    "/long-wait": ("http_429", 1),
    "/always-500": ("http_500", 2),
    "/down": ("http_503", 2),
    "/drip": ("timeout", 2),
    "/short": ("connection", 2),
    "/html": ("not_an_image", 1),
    "/loop/0": ("redirect", 1),
    "/bomb": ("not_an_image", 1),
}


class Failing(Handler):
    """Also knows a page that fails at every attempt."""

    def _serve(self, path: list[str], asked: int) -> None:
        if path[0] == "always-500":
            self._send(500, b"")
        else:
            super()._serve(path, asked)


@contextmanager
def failing():
    with serving() as server:
        server.RequestHandlerClass = Failing
        yield server


@pytest.mark.parametrize("path", FAILURES)
def test_a_failed_image_is_left_out_counted_and_listed(path, tmp_path):
    kind, attempts = FAILURES[path]
    options = replace(OPTIONS, **QUICK) if kind == "timeout" else OPTIONS
    with failing() as server:
        shard = write_shard(tmp_path / "a.jsonl", [document(server.home, path, "/good/1", "/busy/a", "/shaky/a")])
        index = prepare_mmc4([shard], tmp_path / "out", download=options, resize=KEEP_ORIGINAL)
        (listed,) = failures(tmp_path / "out")
        assert (listed["url"], listed["kind"], listed["attempts"]) == (server.home + path, kind, attempts)
    ((_, members),) = samples(tmp_path / "out").items()
    # Single failures with 429 or 500 were retried.
    assert [members[f"{n}.jpg"] for n in range(3)] == [jpeg(1)] * 3
    assert index["counts"]["noted"] == {"documents without some image": 1, kind: 1}
