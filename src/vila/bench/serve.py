"""`vila bench serve`: throughput and latency of an OpenAI-compatible server at several loads.

A closed loop keeps a fixed number of requests in flight; an open loop sends them as a Poisson process.
"""

from __future__ import annotations

import asyncio
import base64
import io
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from vila.core.errors import ConfigError, DataError
from vila.core.files import write_json
from vila.core.progress import SILENT, Events, task
from vila.core.reading import parse_json
from vila.core.system import system_info
from vila.media.http import retry_after_s
from vila.quant.calibration import packaged_documents
from vila.report.html import Cell, Page
from vila.report.plots import Series, line_plot

Request = dict[str, Any]
"""Body of a chat completion request: messages and max_tokens; `ask` adds the rest."""

PERCENTILES = (50, 95, 99)
_TIMEOUT_S = 600.0
_MAX_IN_FLIGHT = 1000
_MIN_RETRY_S, _MAX_RETRY_S = 0.05, 30.0
_TOKENS_PER_WORD = 1.35
_IMAGE_SIZE = 224


@dataclass(slots=True)
class Timing:
    """Timing of one request, in seconds of a common clock.

    start:   scheduled time; in an open loop the request may be sent later.
    first:   arrival of the first piece of text, 0 if there was none. `gaps` are the times between pieces.
    tokens:  completion tokens reported by the server; `prompt`: prompt tokens.
    status:  HTTP status, 0 if the connection failed. `retries` counts earlier responses with 429.
    problem: error text, empty for a complete answer.
    """

    start: float
    first: float = 0.0
    end: float = 0.0
    tokens: int = 0
    prompt: int = 0
    status: int = 0
    retries: int = 0
    problem: str = ""
    gaps: list[float] = field(default_factory=list)

    @property
    def answered(self) -> bool:
        """Whether the answer was complete."""
        return self.status == 200 and not self.problem


@dataclass(frozen=True, slots=True)
class Server:
    """A server: its base URL with `/v1`, the model's name, and the API key if any."""

    base: str
    model: str
    key: str = ""

    def connect(self, max_connections: int) -> httpx2.AsyncClient:
        """Return an HTTP client."""
        return httpx2.AsyncClient(
            base_url=self.base,
            headers=_authorization(self.key),
            timeout=_TIMEOUT_S,
            limits=httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
            trust_env=False,
        )


def _authorization(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def served_model(base: str, key: str = "") -> str:
    """Return the name of a server's first model. Raises ConfigError if it cannot be read."""
    try:
        answer = httpx2.get(f"{base}/models", headers=_authorization(key), timeout=30, trust_env=False)
        return str(answer.json()["data"][0]["id"])
    except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"not an OpenAI-compatible server ({error})", file=f"{base}/models") from error


async def run_load(
    server: Server,
    requests: Sequence[Request],
    *,
    clients: int = 0,
    rate: float = 0.0,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Send all requests, with at most `clients` in flight (0: 1000), and return their timings.

    rate:    open loop: a Poisson process of this many requests per second, independent of the answers. Requests that
             wait are timed from their scheduled start, and a 429 counts as a failure. 0: closed loop, in which each
             request follows an answer and is sent again after a 429, as the Retry-After header says.
    advance: called after every answer.
    """
    draw = random.Random(seed)
    limit = clients or _MAX_IN_FLIGHT
    in_flight = asyncio.Semaphore(limit)

    async def send(request: Request, due: float) -> Timing:
        await asyncio.sleep(due - time.perf_counter())
        async with in_flight:
            timing = await ask(http, server.model, request, due=due, retry=not rate)
        advance()
        return timing

    dues = [0.0] * len(requests)
    if rate:
        dues = list(accumulate((draw.expovariate(rate) for _ in requests), initial=time.perf_counter()))[1:]
    async with server.connect(limit) as http:
        return await asyncio.gather(*map(send, requests, dues))


async def ask(
    http: httpx2.AsyncClient, model: str, request: Request, *, due: float = 0.0, retry: bool = False
) -> Timing:
    """Stream one answer. Failures are recorded in the result and never raised."""
    timing = Timing(due or time.perf_counter())
    options = {"model": model, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    while True:
        timing.status, timing.problem, wait_s = 0, "", None
        try:
            async with http.sse("/chat/completions", method="POST", json=request | options) as events:
                timing.status = events.response.status_code
                if timing.status == 200:
                    await _read_answer(events, timing)
                else:
                    timing.problem = _error_message(await events.response.aread())
                    wait_s = retry_after_s(events.response.headers.get("retry-after"), time.time())
        except httpx2.HTTPError as error:
            timing.problem = f"{type(error).__name__}: {error}"
        if not retry or timing.status != 429:
            timing.end = time.perf_counter()
            return timing
        timing.retries += 1
        await asyncio.sleep(min(max(_MIN_RETRY_S, 1.0 if wait_s is None else wait_s), _MAX_RETRY_S))


async def _read_answer(events: httpx2.EventSource, timing: Timing) -> None:
    last, ended = 0.0, False
    async for event in events:  # to the end of the response, so that its connection is used again
        now = time.perf_counter()
        if event.data == "[DONE]":
            ended = True
            continue
        try:
            data = parse_json(event.data, file=None, surrogates=True)
            if "error" in data:
                timing.problem = _error_message(event.data.encode())
                continue
            if usage := data.get("usage"):
                timing.tokens, timing.prompt = int(usage["completion_tokens"]), int(usage["prompt_tokens"])
            is_text = bool(data["choices"] and data["choices"][0]["delta"].get("content"))
        except (DataError, LookupError, TypeError, ValueError, AttributeError) as error:
            timing.problem = f"invalid event ({error}): {event.data[:80]!r}"
            return
        if is_text:
            if last:
                timing.gaps.append(now - last)
            timing.first, last = timing.first or now, now
    if not ended and not timing.problem:
        timing.problem = "the stream ended before [DONE]"


def _error_message(body: bytes) -> str:
    try:
        return str(parse_json(body, file=None, surrogates=True)["error"]["message"])
    except (DataError, LookupError, TypeError):
        return body[:200].decode(errors="replace")


def make_requests(count: int, *, prompt_tokens: int, max_tokens: int, images: int = 0, seed: int = 0) -> list[Request]:
    """Return `count` requests of about `prompt_tokens` tokens of English text and `images` images each.

    Each text starts at a random word, so that prefix caching has no effect.
    """
    draw = random.Random(seed)
    words = " ".join(map(str, packaged_documents())).split()
    num_words = max(1, round(prompt_tokens / _TOKENS_PER_WORD))
    out = []
    for _ in range(count):
        start = draw.randrange(len(words))
        content: Any = " ".join(islice(cycle(words), start, start + num_words))
        if images:
            parts = [{"type": "image_url", "image_url": {"url": _image_url(draw)}} for _ in range(images)]
            content = [*parts, {"type": "text", "text": content}]
        out.append({"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens})
    return out


def _image_url(draw: random.Random) -> str:
    """Return a random PNG of 4 x 4 coloured squares as a data URL."""
    squares = Image.frombytes("RGB", (4, 4), draw.randbytes(48))
    buffer = io.BytesIO()
    squares.resize((_IMAGE_SIZE, _IMAGE_SIZE), Image.Resampling.NEAREST).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """Results of one load. Times are seconds; percentiles are over answered requests, by name (`p50`).

    load:          `8 clients` (closed loop) or `2.5 a second` (open loop).
    seconds:       from the first request to the last answer.
    requests, new_tokens, prompt_tokens: per second, over all requests.
    first_token:   time to first token.
    between:       time between the pieces of an answer.
    whole:         time from the request to the end of its answer.
    lengths:       minimum, mean and maximum tokens per answer; a model may stop before max_tokens.
    problems:      each kind of failure with its count, the most frequent first.
    """

    load: str
    asked: int
    answered: int
    statuses: dict[str, int]
    retries: int
    seconds: float
    requests: float
    new_tokens: float
    prompt_tokens: float
    first_token: dict[str, float]
    between: dict[str, float]
    whole: dict[str, float]
    lengths: tuple[int, float, int]
    problems: list[tuple[str, int]]


def summarise(load: str, timings: Sequence[Timing]) -> LoadSummary:
    """Summarise one load; percentiles are NaN if no request was answered."""
    good = [timing for timing in timings if timing.answered]
    bad = Counter(f"{t.status or 'no connection'}: {t.problem}" for t in timings if not t.answered)
    seconds = max(t.end for t in timings) - min(t.start for t in timings)
    tokens = [timing.tokens for timing in good] or [0]
    return LoadSummary(
        load=load,
        asked=len(timings),
        answered=len(good),
        statuses=dict(Counter(str(timing.status or "no connection") for timing in timings)),
        retries=sum(timing.retries for timing in timings),
        seconds=seconds,
        requests=len(good) / seconds,
        new_tokens=sum(tokens) / seconds,
        prompt_tokens=sum(timing.prompt for timing in good) / seconds,
        first_token=percentiles([timing.first - timing.start for timing in good if timing.first]),
        between=percentiles([gap for timing in good for gap in timing.gaps]),
        whole=percentiles([timing.end - timing.start for timing in good]),
        lengths=(min(tokens), sum(tokens) / len(tokens), max(tokens)),
        problems=bad.most_common(),
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the `PERCENTILES` of the values by name (nearest rank), NaN if there are none."""
    found = np.percentile(values or [math.nan], PERCENTILES, method="inverted_cdf").tolist()
    return {f"p{percent}": value for percent, value in zip(PERCENTILES, found, strict=True)}


def measure(
    server: Server,
    requests: Sequence[Request],
    *,
    clients: Sequence[int] = (),
    rates: Sequence[float] = (),
    seed: int = 0,
    events: Events = SILENT,
) -> list[LoadSummary]:
    """Run every load with the same requests: closed loops by number of clients, then open loops by rate.

    Two requests precede the measurement, to warm up the server.
    """
    asyncio.run(run_load(server, requests[:2], clients=1))
    loads: list[tuple[str, dict[str, Any]]] = [(f"{n} client{'s' * (n != 1)}", {"clients": n}) for n in clients]
    loads += [(f"{rate:g} a second", {"rate": rate, "seed": seed}) for rate in rates]
    out = []
    for load, options in loads:
        with task(events, load, len(requests), "answers"):
            timings = asyncio.run(run_load(server, requests, **options, advance=partial(events.advanced, load)))
        out.append(summarise(load, timings))
    return out


def table(summaries: Sequence[LoadSummary]) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of the result table; latencies in milliseconds as p50 / p95 / p99."""
    percents = " / ".join(f"p{percent}" for percent in PERCENTILES)
    header = [
        "load", "answered", "requests/s", "new tokens/s", f"TTFT, ms ({percents})", f"inter-token, ms ({percents})",
        f"latency, ms ({percents})", "tokens per answer",
    ]  # fmt: skip
    rows = [
        [
            s.load,
            f"{s.answered} of {s.asked}",
            f"{s.requests:.2f}",
            f"{s.new_tokens:.1f}",
            *(
                " / ".join(f"{value * 1000:.0f}" for value in times.values())
                for times in (s.first_token, s.between, s.whole)
            ),
            f"{s.lengths[1]:.0f} ({s.lengths[0]}-{s.lengths[2]})",
        ]
        for s in summaries
    ]
    return header, rows


def save(summaries: Sequence[LoadSummary], facts: dict[str, Any], folder: Path) -> list[Path]:
    """Write load.json and load.html; return their paths."""
    facts = {**system_info(), **facts}
    paths = [folder / "load.json", folder / "load.html"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(paths[0], {"facts": facts, "loads": [asdict(summary) for summary in summaries]})
    _page(summaries, facts).save(paths[1])
    return paths


def _page(summaries: Sequence[LoadSummary], facts: dict[str, Any]) -> Page:
    page = Page("Serving under load", subtitle=str(facts["model"]), footer=f"{facts['date']}, {facts['cpu']}")
    page.table(*table(summaries), "All loads use the same requests")
    closed = [(float(s.load.split()[0]), s) for s in summaries if "client" in s.load]
    if len(closed) > 1:
        rate = "new tokens per second"
        throughput = [Series(rate, [(n, s.new_tokens) for n, s in closed])]
        ttft = [Series(name, [(n, s.first_token[name]) for n, s in closed]) for name in closed[0][1].first_token]
        page.section("Closed loops")
        page.plot(line_plot(throughput, title="Throughput", x_label="clients", y_label=rate))
        page.plot(line_plot(ttft, title="Time to first token", x_label="clients", y_label="seconds"))
    failures: list[list[Cell]] = [[s.load, text, count] for s in summaries for text, count in s.problems]
    if failures:
        page.section("Failures").table(["load", "error", "count"], failures)
    page.section("Settings").table(["", ""], [[name, str(value)] for name, value in facts.items()])
    return page
