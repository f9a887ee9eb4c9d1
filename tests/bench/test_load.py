"""Load generator against a mock server with known answers, errors and timing."""

import asyncio
import json
import math
import threading
import time

import pytest

fastapi = pytest.importorskip("fastapi", reason="needs pip install 'vila-vlm[serve]'")
uvicorn = pytest.importorskip("uvicorn", reason="needs pip install 'vila-vlm[serve]'")

from fastapi import FastAPI, Request  # noqa: E402
from fastapi.responses import JSONResponse, StreamingResponse  # noqa: E402

from vila.bench.serve import (  # noqa: E402
    Server,
    Timing,
    make_requests,
    measure,
    percentiles,
    run_load,
    save,
    served_model,
    summarise,
    table,
)
from vila.core.errors import ConfigError  # noqa: E402

WORDS = 5
PAUSE = 0.02


ODD = ("{", "[" * 5000, "1" * 5000, "[]", "{}", '{"choices": 3}', '{"choices": [3]}', '{"error": 3}')


class Known:
    """Server that streams WORDS words with pauses of PAUSE; rejects, aborts or fails if the question asks for it."""

    def __init__(self):
        self.app = FastAPI()
        self.open = self.most_open = 0
        self.ports = set()
        self.refuse = 0
        self.app.post("/v1/chat/completions")(self.answer)
        self.app.get("/v1/models")(lambda: {"data": [{"id": "known"}]})

    async def answer(self, request: Request):
        self.ports.add(request.client.port)
        body = await request.json()
        if self.refuse > 0:
            self.refuse -= 1
            return JSONResponse({"error": {"message": "queue full"}}, 429, {"Retry-After": "0"})
        text = body["messages"][-1]["content"]
        if text == "fail":
            return JSONResponse({"error": {"message": "no such thing"}}, 400)
        return StreamingResponse(self.words(text), media_type="text/event-stream")

    async def words(self, text):
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            for word in range(WORDS):
                await asyncio.sleep(PAUSE)
                if text.startswith("odd"):
                    yield f"data: {ODD[int(text.removeprefix('odd'))]}\n\n"
                yield event({"choices": [{"delta": {"content": f"{word} "}}], "usage": None})
                if text == "break":
                    return
            yield event({"choices": [], "usage": {"completion_tokens": WORDS, "prompt_tokens": 3}})
            yield "data: [DONE]\n\n"
        finally:
            self.open -= 1


def event(data):
    return f"data: {json.dumps(data)}\n\n"


@pytest.fixture(scope="module")
def running():
    known = Known()
    server = uvicorn.Server(uvicorn.Config(known.app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield known, Server(f"http://127.0.0.1:{port}/v1", "known")
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def known(running):
    running[0].most_open = running[0].refuse = 0
    running[0].ports.clear()
    return running


def ask(text="hello", count=1):
    return [{"messages": [{"role": "user", "content": text}], "max_tokens": 8}] * count


def test_closed_loop_keeps_the_concurrency(known):
    state, server = known
    timings = asyncio.run(run_load(server, ask(count=9), clients=3))
    assert state.most_open == len(state.ports) == 3
    assert len(timings) == 9 and all(timing.answered for timing in timings)
    assert {timing.tokens for timing in timings} == {WORDS}
    assert {len(timing.gaps) for timing in timings} == {WORDS - 1}
    for timing in timings:
        assert timing.first - timing.start >= PAUSE
        assert timing.end - timing.start >= WORDS * PAUSE
        assert sum(timing.gaps) == pytest.approx(timing.end - timing.first, abs=PAUSE)


def test_open_loop_does_not_wait_for_answers(known):
    state, server = known
    timings = asyncio.run(run_load(server, ask(count=10), rate=200.0, seed=3))
    assert len(timings) == 10 and all(timing.answered for timing in timings)
    assert state.most_open > 4  # ten arrive in about 50 ms, an answer takes 100


def test_open_loop_limits_requests_in_flight(known):
    state, server = known
    timings = asyncio.run(run_load(server, ask(count=6), rate=1000.0, clients=1))
    assert state.most_open == 1
    waits = sorted(timing.end - timing.start for timing in timings)
    assert waits[-1] > 4 * WORDS * PAUSE


def test_closed_loop_retries_after_429(known):
    state, server = known
    state.refuse = 2
    (timing,) = asyncio.run(run_load(server, ask(), clients=1))
    assert timing.answered and timing.retries == 2
    assert timing.end - timing.start >= 2 * 0.05 + WORDS * PAUSE
    state.refuse = 1
    (timing,) = asyncio.run(run_load(server, ask(), rate=100.0))
    assert (timing.status, timing.answered, timing.problem) == (429, False, "queue full")


def test_failures_are_counted(known):
    _, server = known
    timings = asyncio.run(run_load(server, [*ask("fail", 2), *ask("break"), *ask()], clients=2))
    timings += asyncio.run(run_load(Server("http://127.0.0.1:9/v1", "known"), ask(), clients=1))
    summary = summarise("4 clients", timings)
    found = dict(summary.problems)
    assert found["400: no such thing"] == 2
    assert found["200: the stream ended before [DONE]"] == 1
    assert any(words.startswith("no connection") for words in found)
    assert (summary.asked, summary.answered) == (5, 1)


def test_invalid_events_are_failures(known):
    _, server = known
    requests = [request for number in range(len(ODD)) for request in ask(f"odd{number}")]
    timings = asyncio.run(run_load(server, requests, clients=4))
    assert all(timing.problem and not timing.answered for timing in timings)


def test_percentiles_are_of_the_nearest_rank():
    assert percentiles([float(n) for n in range(1, 101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([7.0, 1.0]) == {"p50": 1.0, "p95": 7.0, "p99": 7.0}
    assert all(math.isnan(value) for value in percentiles([]).values())


def test_throughput_is_over_the_whole_run():
    timings = [
        Timing(start=0.0, first=1.0, end=2.0, tokens=10, prompt=4, status=200),
        Timing(start=1.0, first=1.5, end=4.0, tokens=30, prompt=4, status=200),
        Timing(start=1.0, end=2.0, status=500, problem="broken"),
    ]
    summary = summarise("2 clients", timings)
    assert (summary.seconds, summary.new_tokens, summary.requests, summary.prompt_tokens) == (4.0, 10.0, 0.5, 2.0)
    assert summary.lengths == (10, 20.0, 30)
    assert summary.statuses == {"200": 2, "500": 1}


def test_a_measurement_writes_its_table_and_report(known, tmp_path):
    _, server = known
    assert served_model(server.base) == "known"
    done = measure(server, ask(count=4), clients=[1, 2], rates=[100.0])
    assert [summary.load for summary in done] == ["1 client", "2 clients", "100 a second"]
    assert done[1].new_tokens > 1.3 * done[0].new_tokens
    header, rows = table(done)
    assert all(len(row) == len(header) for row in rows)
    paths = save(done, {"model": "known"}, tmp_path)
    assert json.loads(paths[0].read_text())["loads"][0]["first_token"].keys() == {"p50", "p95", "p99"}
    assert all(name in paths[1].read_text() for name in header)


def test_a_missing_server_is_named():
    with pytest.raises(ConfigError) as caught:
        served_model("http://127.0.0.1:9/v1")
    assert caught.value.file == "http://127.0.0.1:9/v1/models"


def test_requests_have_distinct_prefixes_and_depend_on_the_seed():
    requests = make_requests(20, prompt_tokens=64, max_tokens=8, seed=1)
    texts = [request["messages"][0]["content"] for request in requests]
    assert len({" ".join(text.split()[:8]) for text in texts}) == 20
    assert requests == make_requests(20, prompt_tokens=64, max_tokens=8, seed=1)
    assert requests != make_requests(20, prompt_tokens=64, max_tokens=8, seed=2)
    with_images = make_requests(2, prompt_tokens=8, max_tokens=8, images=2, seed=1)
    kinds = [part["type"] for part in with_images[0]["messages"][0]["content"]]
    assert kinds == ["image_url", "image_url", "text"]
