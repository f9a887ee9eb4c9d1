"""The demo's page as a program: launched on an address, until Ctrl-C."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vila.core.errors import ConfigError
from vila.core.optional import require
from vila.serve.access import SameOrigin, hosts_of
from vila.serve.demo_client import ApiClient
from vila.serve.demo_messages import MOST_BYTES
from vila.serve.demo_page import STYLE, build
from vila.serve.demo_talk import Page

_CARD_BYTES = 1 << 20


def card_words(models: Sequence[str]) -> str:
    """Names of models, their configs and cards where they lie beside them: what the gallery is chosen by."""
    words = []
    for model in models:
        words.append(model)
        for card in (Path(model) / "README.md", Path(model) / "config.json", Path(model).parent / "README.md"):
            if card.is_file():
                words.append(card.read_bytes()[:_CARD_BYTES].decode(errors="replace"))
    return "\n".join(words)


def launch(
    client: ApiClient, words: str, folder: Path, *, host: str, port: int, allowed_hosts: Sequence[str] = ()
) -> tuple[Any, str]:
    """Open the page; the Gradio blocks and its address. Nothing is fetched from, or sent to, anybody but the server.

    allowed_hosts: names under which the page answers besides those of this machine, see `vila.serve.access.hosts_of`.
    Raises ConfigError when Gradio is missing or the port is taken.
    """
    from starlette.middleware import Middleware

    guard = Middleware(SameOrigin, hosts=hosts_of(host, allowed_hosts))
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    gr = require("gradio", "vila demo", extra="demo")
    blocks = build(Page(client, words, folder)).queue(default_concurrency_limit=8)
    fonts = ("ui-sans-serif", "system-ui", "sans-serif")
    theme = gr.themes.Soft(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=("ui-monospace", "monospace"))
    try:
        _, url, _ = blocks.launch(
            server_name=host, server_port=port or _free_port(host), share=False, quiet=True, prevent_thread_lock=True,
            allowed_paths=[str(folder)], max_file_size=MOST_BYTES, theme=theme, css=STYLE, footer_links=[],
            ssr_mode=False, enable_monitoring=False, show_error=True, app_kwargs={"middleware": [guard]},
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"port {port} of {host} cannot be opened; give another by --port ({error})") from error
    return blocks, url


def run_page(
    client: ApiClient,
    words: str,
    folder: Path,
    *,
    host: str,
    port: int,
    browser: bool,
    check: Callable[[], None] | None,
    say: Callable[[str], None],
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Open the page and stay until Ctrl-C, or until `check` raises because the server has ended."""
    blocks, url = launch(client, words, folder, host=host, port=port, allowed_hosts=allowed_hosts)
    say(f"demo at {url} (Ctrl-C ends it)")
    if browser:
        import webbrowser

        webbrowser.open(url)
    try:
        while True:
            time.sleep(0.5)
            if check is not None:
                check()
    except KeyboardInterrupt:
        pass
    finally:
        blocks.close(verbose=False)


def _free_port(host: str) -> int:
    with socket.socket() as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])
