"""`vila demo`: web demo of one model, or of two side by side."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer


def demo(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Model directory or Hub id; two models are compared side by side."),
    ] = None,
    base_url: Annotated[
        str,
        typer.Option(metavar="URL", help="URL of a running OpenAI-compatible server, instead of MODEL."),
    ] = "",
    key: Annotated[
        str, typer.Option("--api-key-env", help="Environment variable with the API key of --base-url.")
    ] = "VILA_API_KEY",
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 accepts connections from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the page; 0 picks a free port.", min=0, max=65535)] = 7860,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Additional accepted Host header; *.NAME matches all subdomains. Repeatable.",
        ),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = False,
) -> None:
    """Serve MODEL with a web page for chat about images and videos; two models are shown side by side."""
    import os

    from vila.core.errors import ConfigError
    from vila.core.optional import require_extra

    if bool(models) == bool(base_url):
        raise ConfigError("give MODEL or --base-url, not both", field="MODEL")
    if models and len(models) > 2:
        raise ConfigError(field="MODEL", value=len(models), expected="one or two models")
    require_extra("demo", "vila demo")
    from vila.serve.admission import parse_allowed_hosts
    from vila.serve.demo.client import ApiClient
    from vila.serve.demo.ui import card_words, launch, run_page
    from vila.serve.server import server_process

    parse_allowed_hosts(host, allowed_host or ())  # raises before a server is started
    with ExitStack() as stack:
        check = None
        if models:
            server = stack.enter_context(server_process(models))
            base_url, check = server.base, server.check
            typer.echo(f"loading {', '.join(models)}")
            server.await_ready()
        client = ApiClient(base_url, os.environ.get(key, ""))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vila-demo-")))
        names = client.models()
        blocks, url = launch(
            client, names, card_words([*(models or ()), *names]), folder, host=host, port=port,
            allowed_hosts=allowed_host or (), browser=browser,
        )  # fmt: skip
        typer.echo(f"demo at {url} (Ctrl-C stops it)")
        run_page(blocks, check)
