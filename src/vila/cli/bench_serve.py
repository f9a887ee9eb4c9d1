"""`vila bench serve`: load on a server, its own or anybody's."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from vila.cli import options


def serve(
    target: Annotated[
        str,
        typer.Argument(metavar="MODEL|URL", help="A directory, served for the time of the run; or a server's address."),
    ],
    model: Annotated[
        str, typer.Option(help="Name of the model at the server; default: its first.", show_default=False)
    ] = "",
    concurrency: Annotated[
        str, typer.Option(metavar="N,N", help="Closed loops: so many clients that wait for their answers.")
    ] = "1,4,8",
    rate: Annotated[
        str, typer.Option(metavar="R,R", help="Open loops: so many arrivals a second, Poisson.", show_default=False)
    ] = "",
    requests: Annotated[int, typer.Option(help="Questions of each load.", min=1)] = 32,
    prompt_tokens: Annotated[int, typer.Option(help="Length of a question's text, about.", min=1)] = 64,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 128,
    images: Annotated[int, typer.Option(help="Pictures in each question.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of questions and arrivals.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for load.json and load.html.", show_default=False, callback=options.output_directory
        ),
    ] = None,
    key: Annotated[str, typer.Option("--key-env", help="Environment variable that holds the key.")] = "VILA_API_KEY",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Ask many questions at once; print throughput, time to the first token and between tokens."""
    import json

    from rich.console import Console
    from rich.table import Table

    from vila.core.optional import require_extra

    require_extra("serve", "vila bench serve")
    from vila.bench.load import Server
    from vila.bench.load_questions import questions
    from vila.bench.serve import measure, save, served_model, table
    from vila.cli.progress import Screen
    from vila.core.errors import VilaError
    from vila.core.files import portable_path
    from vila.serve.process import server_process

    clients = [int(number) for number in _numbers("--concurrency", concurrency, whole=True)]
    rates = _numbers("--rate", rate)
    asked = questions(requests, prompt_tokens=prompt_tokens, max_tokens=max_tokens, images=images, seed=seed)
    secret = os.environ.get(key, "")
    web = target.startswith(("http://", "https://"))
    base = target.rstrip("/") if target.rstrip("/").endswith("/v1") else f"{target.rstrip('/')}/v1"
    with ExitStack() as stack:
        if not web:
            started = stack.enter_context(server_process([target]))
            started.await_ready()
            base = started.base
        name = model or served_model(base, secret)
        screen = stack.enter_context(Screen())
        done = measure(Server(base, name, secret), asked, clients=clients, rates=rates, seed=seed, events=screen)
    facts = {
        "model": name, "requests": requests, "prompt_tokens": prompt_tokens, "max_tokens": max_tokens,
        "images": images, "seed": seed, "server": target if web or out is None else portable_path(target, out),
    }  # fmt: skip
    paths = save(done, facts, out) if out else []
    if as_json:
        typer.echo(json.dumps({"facts": facts, "loads": [one.as_json() for one in done]}))
    else:
        header, rows = table(done)
        shown = Table(title=f"{name}: {requests} questions a load", title_justify="left")
        for column in header:
            shown.add_column(column, justify="left" if column == "load" else "right")
        for row in rows:
            shown.add_row(*row)
        console = Console(highlight=False)
        console.print(shown)
        for one in done:
            for words, count in one.problems:
                console.print(f"{one.load}: {count} x {words}", markup=False)
        for path in paths:
            console.print(str(path), markup=False)
    if not any(one.answered for one in done):
        raise VilaError("no question was answered")


def _numbers(option: str, text: str, *, whole: bool = False) -> list[float]:
    from vila.core.errors import ConfigError

    try:
        found = [int(part) if whole else float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [0]
    if any(number <= 0 for number in found):
        raise ConfigError(f"{option} {text}: numbers above 0, with commas between them")
    return found
