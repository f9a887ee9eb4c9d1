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
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from vila.core.errors import ConfigError, DataError
from vila.core.files import write_json
from vila.core.progress import SILENT, Events, task
from vila.core.reading import parse_json
from vila.core.system import system_info
from vila.quant.calibration import packaged_documents
from vila.report.html import Cell, Page
from vila.report.plots import Series, line_plot

PERCENTILES = (50, 95, 99)
_MAX_RETRY_S = 30.0
_TOKENS_PER_WORD = 1.35


@dataclass(frozen=True, slots=True)
class Question:
    """A request: its messages in the OpenAI format, and max_tokens."""

    messages: Sequence[dict[str, Any]]
    max_tokens: int


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
    timeout: float = 600.0


Advance = Callable[[Timing], None]


async def closed_loop(
    server: Server, questions: Sequence[Question], clients: int, advance: Advance = lambda timing: None
) -> list[Timing]:
    """Send each client's next request after its previous answer; retry after 429 as the Retry-After header says."""
    waiting = iter(questions)
    done: list[Timing] = []

    async with _client(server, clients) as http:

        async def client() -> None:
            for question in waiting:
                timing = await ask(http, server, question, retry=True)
                done.append(timing)
                advance(timing)

        await asyncio.gather(*(client() for _ in range(min(clients, len(questions)))))
    return done


async def open_loop(
    server: Server,
    questions: Sequence[Question],
    rate: float,
    seed: int = 0,
    advance: Advance = lambda timing: None,
    max_open: int = 1000,
) -> list[Timing]:
    """Send requests as a Poisson process of `rate` per second, independent of the answers.

    With `max_open` requests in flight further ones wait, timed from their scheduled start. A 429 counts as a failure.
    """
    draw = random.Random(seed)
    done: list[Timing] = []
    gate = asyncio.Semaphore(max_open)
    async with _client(server, max_open) as http, asyncio.TaskGroup() as group:

        async def one(question: Question, due: float) -> None:
            try:
                timing = await ask(http, server, question, due=due)
            finally:
                gate.release()
            done.append(timing)
            advance(timing)

        due = time.perf_counter()
        for question in questions:
            due += draw.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            await gate.acquire()
            group.create_task(one(question, due))
    return done


async def ask(
    http: httpx.AsyncClient, server: Server, question: Question, *, due: float = 0.0, retry: bool = False
) -> Timing:
    """Stream one answer. Failures are recorded in the result and never raised."""
    timing = Timing(due or time.perf_counter())
    body = {
        "model": server.model,
        "messages": list(question.messages),
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    while True:
        retry_after = 0.0
        try:
            async with http.stream("POST", "/chat/completions", json=body) as answer:
                timing.status = answer.status_code
                if answer.status_code == 200:
                    await _follow(answer, timing)
                else:
                    timing.problem = _error_message(await answer.aread())
                    retry_after = _retry_after(answer)
        except httpx.HTTPError as error:
            timing.problem = f"{type(error).__name__}: {error}"
        if not (retry and timing.status == 429 and retry_after):
            timing.end = time.perf_counter()
            return timing
        timing.retries += 1
        timing.problem = ""
        await asyncio.sleep(min(retry_after, _MAX_RETRY_S))


async def _follow(answer: httpx.Response, timing: Timing) -> None:
    last, ended = 0.0, False
    async for event in _events(answer):
        now = time.perf_counter()
        if event == "[DONE]":
            ended = True
            continue
        try:
            data = parse_json(event, file=None, surrogates=True)
            if "error" in data:
                error = data["error"]
                timing.problem = str(error.get("message", error) if isinstance(error, dict) else error)
                continue
            if usage := data.get("usage"):
                timing.tokens, timing.prompt = int(usage["completion_tokens"]), int(usage["prompt_tokens"])
            is_text = bool(data["choices"] and data["choices"][0]["delta"].get("content"))
        except (DataError, LookupError, TypeError, ValueError, AttributeError) as error:
            timing.problem = f"invalid event ({error}): {event[:80]!r}"
            return
        if is_text:
            if last:
                timing.gaps.append(now - last)
            timing.first = timing.first or now
            last = now
    if not ended and not timing.problem:
        timing.problem = "the stream ended before [DONE]"


async def _events(answer: httpx.Response) -> AsyncIterator[str]:
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def _client(server: Server, connections: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=server.base,
        headers={"Authorization": f"Bearer {server.key}"} if server.key else {},
        timeout=server.timeout,
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        trust_env=False,
    )


def _retry_after(answer: httpx.Response) -> float:
    try:
        return max(0.05, float(answer.headers.get("retry-after", "1")))
    except ValueError:
        return 1.0


def _error_message(body: bytes) -> str:
    try:
        return str(parse_json(body, file=None, surrogates=True)["error"]["message"])
    except (DataError, LookupError, TypeError):
        return body[:200].decode(errors="replace")


def problems(timings: Sequence[Timing]) -> Iterator[tuple[str, int]]:
    """Yield each kind of failure with its count, the most frequent first."""
    counts: dict[str, int] = {}
    for timing in timings:
        if not timing.answered:
            text = f"{timing.status or 'no connection'}: {timing.problem}"
            counts[text] = counts.get(text, 0) + 1
    yield from sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def questions(
    count: int, *, prompt_tokens: int, max_tokens: int, images: int = 0, image_size: int = 224, seed: int = 0
) -> list[Question]:
    """Return `count` questions of about `prompt_tokens` tokens of English text and `images` images each.

    Each text starts at a random word, so that prefix caching has no effect. Raises ConfigError for invalid numbers.
    """
    if prompt_tokens < 1 or max_tokens < 1 or images < 0 or count < 1:
        raise ConfigError(
            f"{count} questions of {prompt_tokens} tokens, {images} images, {max_tokens} new tokens",
            expected="positive numbers (images: from 0)",
        )
    draw = random.Random(seed)
    words = " ".join(document for document in packaged_documents() if isinstance(document, str)).split()
    length = max(1, round(prompt_tokens / _TOKENS_PER_WORD))
    out = []
    for _ in range(count):
        start = draw.randrange(len(words))
        text = " ".join((words[start:] + words * (1 + length // len(words)))[:length])
        out.append(Question([{"role": "user", "content": _content(text, images, image_size, draw)}], max_tokens))
    return out


def _content(text: str, images: int, size: int, draw: random.Random) -> Any:
    if not images:
        return text
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _image_url(size, draw)}} for _ in range(images)
    ]
    return [*parts, {"type": "text", "text": text}]


def _image_url(size: int, draw: random.Random) -> str:
    """Return a random PNG of 4 x 4 coloured squares as a data URL."""
    small = Image.new("RGB", (4, 4))
    for x in range(4):
        for y in range(4):
            small.putpixel((x, y), (draw.randrange(256), draw.randrange(256), draw.randrange(256)))
    buffer = io.BytesIO()
    small.resize((size, size), Image.Resampling.NEAREST).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """Results of one load. Times are seconds; percentiles (`PERCENTILES`) are over answered requests.

    load:          `8 clients` (closed loop) or `2.5 a second` (open loop).
    seconds:       from the first request to the last answer.
    requests, new_tokens, prompt_tokens: per second, over all requests.
    first_token:   time to first token.
    between:       time between the pieces of an answer.
    whole:         time from the request to the end of its answer.
    lengths:       minimum, mean and maximum tokens per answer; a model may stop before max_tokens.
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
    first_token: tuple[float, ...]
    between: tuple[float, ...]
    whole: tuple[float, ...]
    lengths: tuple[int, float, int]
    problems: tuple[tuple[str, int], ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain data, with percentiles by name."""
        out = asdict(self)
        for name in ("first_token", "between", "whole"):
            out[name] = {f"p{percent}": value for percent, value in zip(PERCENTILES, getattr(self, name), strict=True)}
        return out


def summarise(load: str, timings: Sequence[Timing]) -> LoadSummary:
    """Summarise one load; percentiles are NaN if no request was answered."""
    good = [timing for timing in timings if timing.answered]
    seconds = max((t.end for t in timings), default=0.0) - min((t.start for t in timings), default=0.0)
    tokens = [timing.tokens for timing in good]
    rate = 1 / seconds if seconds > 0 else math.nan
    return LoadSummary(
        load=load,
        asked=len(timings),
        answered=len(good),
        statuses=dict(Counter(str(timing.status or "no connection") for timing in timings)),
        retries=sum(timing.retries for timing in timings),
        seconds=seconds,
        requests=len(good) * rate,
        new_tokens=sum(tokens) * rate,
        prompt_tokens=sum(timing.prompt for timing in good) * rate,
        first_token=percentiles([timing.first - timing.start for timing in good if timing.first]),
        between=percentiles([gap for timing in good for gap in timing.gaps]),
        whole=percentiles([timing.end - timing.start for timing in good]),
        lengths=(min(tokens, default=0), sum(tokens) / len(tokens) if tokens else 0.0, max(tokens, default=0)),
        problems=tuple(problems(timings)),
    )


def percentiles(values: Sequence[float]) -> tuple[float, ...]:
    """Return the `PERCENTILES` of the values (nearest rank), NaN if there are none."""
    ordered = sorted(values)
    if not ordered:
        return tuple(math.nan for _ in PERCENTILES)
    return tuple(ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] for percent in PERCENTILES)


def served_model(base: str, key: str = "") -> str:
    """Return the name of a server's first model. Raises ConfigError if it cannot be read."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{base}/models", headers=headers, timeout=30, trust_env=False)
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"not an OpenAI-compatible server ({error})", file=f"{base}/models") from error


def measure(
    server: Server,
    questions: Sequence[Question],
    *,
    clients: Sequence[int] = (),
    rates: Sequence[float] = (),
    seed: int = 0,
    warm_up: int = 2,
    events: Events = SILENT,
) -> list[LoadSummary]:
    """Run every load with the same questions: closed loops by number of clients, then open loops by rate.

    warm_up: number of requests before the measurement.
    """
    asyncio.run(closed_loop(server, questions[:warm_up], 1))
    out = []
    for load, run in [
        *((f"{n} client{'s' * (n != 1)}", ("closed", n)) for n in clients),
        *((f"{rate:g} a second", ("open", rate)) for rate in rates),
    ]:

        def advance(timing: Timing, load: str = load) -> None:
            events.advanced(load)

        kind, value = run
        with task(events, load, len(questions), "answers"):
            if kind == "closed":
                timings = asyncio.run(closed_loop(server, questions, int(value), advance))
            else:
                timings = asyncio.run(open_loop(server, questions, float(value), seed, advance))
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
            *(_milliseconds(getattr(s, name)) for name in ("first_token", "between", "whole")),
            f"{s.lengths[1]:.0f} ({s.lengths[0]}-{s.lengths[2]})",
        ]
        for s in summaries
    ]
    return header, rows


def _milliseconds(values: Sequence[float]) -> str:
    return " / ".join(f"{value * 1000:.0f}" for value in values)


def save(summaries: Sequence[LoadSummary], facts: dict[str, Any], folder: Path) -> list[Path]:
    """Write load.json and load.html; return their paths."""
    facts = {**system_info(), **facts}
    paths = [folder / "load.json", folder / "load.html"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(paths[0], {"facts": facts, "loads": [one.as_json() for one in summaries]})
    _page(summaries, facts).save(paths[1])
    return paths


def _page(summaries: Sequence[LoadSummary], facts: dict[str, Any]) -> Page:
    page = Page("Serving under load", subtitle=str(facts["model"]), footer=f"{facts['date']}, {facts['cpu']}")
    header, rows = table(summaries)
    page.table(header, rows, "All loads use the same questions")
    closed = [(int(s.load.split()[0]), s) for s in summaries if "client" in s.load]
    if len(closed) > 1:
        page.section("Closed loops")
        page.plot(
            line_plot(
                [Series("new tokens per second", [(float(n), s.new_tokens) for n, s in closed])],
                title="Throughput", x_label="clients", y_label="new tokens per second",
            )
        )  # fmt: skip
        page.plot(
            line_plot(
                [
                    Series(f"p{percent}", [(float(n), s.first_token[place]) for n, s in closed])
                    for place, percent in enumerate(PERCENTILES)
                ],
                title="Time to first token", x_label="clients", y_label="seconds",
            )
        )  # fmt: skip
    failures: list[list[Cell]] = [[s.load, text, count] for s in summaries for text, count in s.problems]
    if failures:
        page.section("Failures").table(["load", "error", "count"], failures)
    page.section("Settings").table(["", ""], [[name, str(value)] for name, value in facts.items()])
    return page
