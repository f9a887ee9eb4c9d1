"""`vila bench serve`: how many answers a server gives, and how long each waits, at several loads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from vila.bench.load import Question, Server, Timing, closed_loop, open_loop
from vila.bench.load_summary import PERCENTS, LoadSummary, summarise
from vila.core.errors import ConfigError
from vila.core.events import SILENT, Events, task
from vila.core.files import write_json
from vila.core.machine import machine_facts
from vila.report.lines import Series, line_plot
from vila.report.page import Cell, Page


def served_model(base: str, key: str = "") -> str:
    """The first model that a server has. Raises ConfigError when none answers there."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{base}/models", headers=headers, timeout=30, trust_env=False)
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{base}/models does not answer as a server of the chat protocol does: {error}") from error


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
    """Every load in turn, all with the same questions: closed loops of so many clients, open loops at such rates.

    warm_up: questions asked one after another before any clock runs.
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
    """Header and rows: throughput, and waits in milliseconds as p50 / p95 / p99."""
    waits = " / ".join(f"p{percent}" for percent in PERCENTS)
    header = [
        "load", "answered", "requests/s", "new tokens/s", f"first token, ms ({waits})", f"between, ms ({waits})",
        f"whole, ms ({waits})", "tokens an answer",
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
    """Write load.json and load.html."""
    facts = {**machine_facts(), **facts}
    paths = [folder / "load.json", folder / "load.html"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(paths[0], {"facts": facts, "loads": [one.as_json() for one in summaries]})
    _page(summaries, facts).save(paths[1])
    return paths


def _page(summaries: Sequence[LoadSummary], facts: dict[str, Any]) -> Page:
    page = Page("Serving under load", subtitle=str(facts["model"]), footer=f"{facts['date']}, {facts['cpu']}")
    header, rows = table(summaries)
    page.table(header, rows, "Every load asked the same questions")
    closed = [(int(s.load.split()[0]), s) for s in summaries if "client" in s.load]
    if len(closed) > 1:
        page.section("Clients that wait for their answers")
        page.plot(
            line_plot(
                [Series("new tokens a second", [(float(n), s.new_tokens) for n, s in closed])],
                title="Throughput", x_label="clients", y_label="new tokens a second",
            )
        )  # fmt: skip
        page.plot(
            line_plot(
                [
                    Series(f"p{percent}", [(float(n), s.first_token[place]) for n, s in closed])
                    for place, percent in enumerate(PERCENTS)
                ],
                title="Time to the first token", x_label="clients", y_label="seconds",
            )
        )  # fmt: skip
    trouble: list[list[Cell]] = [[s.load, words, count] for s in summaries for words, count in s.problems]
    if trouble:
        page.section("What went wrong").table(["load", "what", "times"], trouble)
    page.section("How it was measured").table(["", ""], [[name, str(value)] for name, value in facts.items()])
    return page
