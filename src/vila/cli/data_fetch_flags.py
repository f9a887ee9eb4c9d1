"""The rules of fetching as flags: one for each field of `FetchRules`, told here because help loads no network code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

_PANEL = "Downloading"
FLAGS: dict[str, tuple[int | float | bool | str, str]] = {
    "in_flight": (256, "Requests at once, over all hosts."),
    "per_host": (4, "Requests at once to one host; 1 where many workers share a release."),
    "host_delay_s": (0.05, "Seconds from one request to a host to the next, at least."),
    "connect_timeout_s": (5.0, "Seconds for the name and the connection, and once more for TLS."),
    "read_timeout_s": (10.0, "Seconds of silence before an attempt fails."),
    "total_timeout_s": (30.0, "Seconds for one attempt, redirects included."),
    "attempts": (3, "Tries in all for timeouts, broken connections and busy servers."),
    "backoff_s": (1.0, "Seconds before the second try; they double each time."),
    "longest_wait_s": (60.0, "Seconds that a server may ask us to wait; beyond that it has failed."),
    "max_bytes": (20 * 2**20, "Bytes of the largest picture."),
    "max_redirects": (5, "Redirects that one attempt follows."),
    "allow_private": (False, "Also fetch from this machine and its network."),
    "keep_out": (True, "Leave pictures alone whose X-Robots-Tag says noai or noimageai."),
    "user_agent": ("vila", "Who we say we are; name a contact for large downloads."),
}
"""Default and help by field."""


def with_fetch_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the flags; it gets them in its last parameter `fetch`, a mapping of fields of `FetchRules`."""
    own = inspect.signature(command, eval_str=True)
    flags = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[type(default), typer.Option(help=text, rich_help_panel=_PANEL)],
        )
        for name, (default, text) in FLAGS.items()
    ]

    @wraps(command)
    def wrapper(**given: Any) -> None:
        command(**{name: given[name] for name in given.keys() - FLAGS}, fetch={name: given[name] for name in FLAGS})

    kept = [one for name, one in own.parameters.items() if name != "fetch"]
    wrapper.__signature__ = own.replace(parameters=[*kept, *flags])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {one.name: one.annotation for one in [*kept, *flags]} | {"return": None}
    return wrapper
