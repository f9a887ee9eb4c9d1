"""Load on a server of the chat protocol: clients that wait for their answers, or arrivals that wait for nobody."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from vila.core.errors import DataError
from vila.core.reading import parse_json

_MOST_WAIT = 30.0


@dataclass(frozen=True, slots=True)
class Question:
    """One request: messages of the chat protocol, and most tokens of its answer."""

    messages: Sequence[dict[str, Any]]
    max_tokens: int


@dataclass(slots=True)
class Timing:
    """How one request went. Times are seconds of one clock.

    start:   when it was due: in an open loop that may be before it could be sent.
    first:   when the first piece of text came; 0 for none. `gaps` are the times between the pieces.
    tokens:  of the answer, by the server's count; `prompt` of the question.
    status:  of HTTP; 0 when the connection failed. `retries` counts refusals with 429 before.
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
        """Whether the whole answer came."""
        return self.status == 200 and not self.problem


@dataclass(frozen=True, slots=True)
class Server:
    """Where the questions go: base with `/v1`, the model's name there, and a key or none."""

    base: str
    model: str
    key: str = ""
    timeout: float = 600.0


Advance = Callable[[Timing], None]


async def closed_loop(
    server: Server, questions: Sequence[Question], clients: int, advance: Advance = lambda timing: None
) -> list[Timing]:
    """Every client asks, waits for the answer, and asks the next; one refused with 429 waits as told and asks again."""
    waiting = iter(questions)
    done: list[Timing] = []

    async with _client(server, clients) as http:

        async def client() -> None:
            for question in waiting:
                timing = await ask(http, server, question, patient=True)
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
    most_open: int = 1000,
) -> list[Timing]:
    """Questions arrive as a Poisson process of `rate` a second, whether earlier ones are answered or not.

    Above `most_open` unanswered ones, arrivals wait; their clock runs from when they were due. A 429 is an end.
    """
    draw = random.Random(seed)
    done: list[Timing] = []
    gate = asyncio.Semaphore(most_open)
    async with _client(server, most_open) as http, asyncio.TaskGroup() as group:

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
    http: httpx.AsyncClient, server: Server, question: Question, *, due: float = 0.0, patient: bool = False
) -> Timing:
    """One streamed answer. A failure is part of the result, never an exception."""
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
        again = 0.0
        try:
            async with http.stream("POST", "/chat/completions", json=body) as answer:
                timing.status = answer.status_code
                if answer.status_code == 200:
                    await _follow(answer, timing)
                else:
                    timing.problem = _words(await answer.aread())
                    again = _retry_after(answer)
        except httpx.HTTPError as error:
            timing.problem = f"{type(error).__name__}: {error}"
        if not (patient and timing.status == 429 and again):
            timing.end = time.perf_counter()
            return timing
        timing.retries += 1
        timing.problem = ""
        await asyncio.sleep(min(again, _MOST_WAIT))


async def _follow(answer: httpx.Response, timing: Timing) -> None:
    last, ended = 0.0, False
    async for event in _events(answer):
        now = time.perf_counter()
        if event == "[DONE]":
            ended = True
            continue
        try:
            told = parse_json(event, file=None, surrogates=True)
            if "error" in told:
                fault = told["error"]
                timing.problem = str(fault.get("message", fault) if isinstance(fault, dict) else fault)
                continue
            if usage := told.get("usage"):
                timing.tokens, timing.prompt = int(usage["completion_tokens"]), int(usage["prompt_tokens"])
            is_text = bool(told["choices"] and told["choices"][0]["delta"].get("content"))
        except (DataError, LookupError, TypeError, ValueError, AttributeError) as error:
            timing.problem = f"an event that is no chat completion ({error}): {event[:80]!r}"
            return
        if is_text:
            if last:
                timing.gaps.append(now - last)
            timing.first = timing.first or now
            last = now
    if not ended and not timing.problem:
        timing.problem = "the stream broke off before [DONE]"


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


def _words(body: bytes) -> str:
    try:
        return str(parse_json(body, file=None, surrogates=True)["error"]["message"])
    except (DataError, LookupError, TypeError):
        return body[:200].decode(errors="replace")


def problems(timings: Sequence[Timing]) -> Iterator[tuple[str, int]]:
    """What went wrong, and how often; the commonest first."""
    counts: dict[str, int] = {}
    for timing in timings:
        if not timing.answered:
            words = f"{timing.status or 'no connection'}: {timing.problem}"
            counts[words] = counts.get(words, 0) + 1
    yield from sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
