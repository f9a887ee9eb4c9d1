"""Soak test with valid, invalid and cancelled requests: no leaks of KV rows or memory."""

import asyncio
import os
import random
import re
from pathlib import Path

import httpx2
import pytest

from tests.serve import fixtures
from tests.serve.fixtures import body, data_url, image_part, text_part

KINDS = ("text", "image", "stream", "left", "cut", "several", "no json", "no image", "no model", "too long")


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_mixture_of_requests_leaves_nothing_behind(server, count):
    _soak(server, count)


@pytest.mark.slow
def test_a_mixture_of_requests_to_the_starter_leaves_nothing_behind():
    """The trained starter, or its 4-bit form, as VILA_STARTER_MODEL names it (`vila quickstart` makes both)."""
    folder = os.environ.get("VILA_STARTER_MODEL", "")
    if not folder:
        pytest.skip("VILA_STARTER_MODEL names no trained starter (vila quickstart makes one: RUN/model)")
    with fixtures.Process(Path(folder), "--served-model-name", "tiny", "--max-queue", "16") as process:
        process.await_ready()
        _soak(process, 2000, too_long=50_000)


def _soak(server, count, too_long=5000):
    draw = random.Random(7)
    order = [draw.choice(KINDS) for _ in range(count)]
    asyncio.run(_all(server.url, order[: count // 4], too_long))
    before = _resident(server.popen.pid)
    found = asyncio.run(_all(server.url, order[count // 4 :], too_long))
    wanted = {"no json": 400, "no image": 400, "no model": 404, "too long": 400, "left": None, "cut": None}
    assert [(kind, status) for kind, status in found if status != wanted.get(kind, 200)] == []
    metrics = httpx2.get(f"{server.root}/metrics").text
    for name in ("running", "waiting", "kv_tokens_used"):
        assert f'vila_{name}{{model="tiny"}} 0.0' in metrics
    assert 'status="500"' not in metrics
    if count >= 2000:
        assert _resident(server.popen.pid) < before * 1.05


async def _all(url, order, too_long):
    """The kind of each request and its status, None where the client left; eight are open at a time."""
    room = asyncio.Semaphore(8)
    async with httpx2.AsyncClient(base_url=url, timeout=120) as client:

        async def one(number, kind):
            async with room:
                return kind, await _ask(client, number, kind, too_long)

        return await asyncio.gather(*(one(number, kind) for number, kind in enumerate(order)))


async def _ask(client, number, kind, too_long):
    words = f"question {number} {'x' * (number % 90)}"
    parts = [text_part(words)]
    changes = {"max_tokens": 1 + number % 30}
    if kind in ("image", "cut"):
        parts.insert(0, image_part(data_url(number % 40)))
    if kind == "no image":
        parts.insert(0, image_part("data:image/png;base64,aGVsbG8="))
    if kind == "several":
        changes |= {"n": 3, "temperature": 1.0}
    if kind == "no model":
        changes["model"] = "none"
    if kind == "too long":
        parts = [text_part("x " * too_long)]
    if kind in ("left", "cut"):
        changes |= {"max_tokens": 1000, "stream": True}
    asked = body(messages=[{"role": "user", "content": parts}], **changes)
    if kind == "no json":
        answer = await client.post("/chat/completions", content=b"{", headers={"Content-Type": "application/json"})
        return answer.status_code
    if kind == "stream":
        answer = await client.post("/chat/completions", json={**asked, "stream": True})
        assert answer.text.endswith("data: [DONE]\n\n")
        return answer.status_code
    if kind in ("left", "cut"):
        async with client.stream("POST", "/chat/completions", json=asked) as answer:
            assert answer.status_code == 200
            async for _ in answer.aiter_lines():
                return None
    return (await client.post("/chat/completions", json=asked)).status_code


def _resident(pid):
    """Kilobytes of memory that a process holds."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1])
