"""`vila serve`: OpenAI-compatible chat completions server."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vila.cli import options
from vila.cli.options import LoadOptions, with_option_groups
from vila.core.errors import ConfigError
from vila.core.optional import require_extra

if TYPE_CHECKING:
    from vila.engine.engine import Engine
    from vila.serve.models import ServedModel

KEYS_VARIABLE = "VILA_API_KEY"
_BATCH, _LIMITS, _WEB = "Batching", "Request limits", "Access"


@with_option_groups
def serve(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Model directories, or Hugging Face Hub ids OWNER/NAME.")
    ],
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,ALIAS",
            help="Name and aliases of a model in the API; repeat in the order of MODEL. Default: directory name or id.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 accepts connections from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free port.", min=0, max=65535)] = 8000,
    loading: LoadOptions = options.LOAD,
    max_num_seqs: Annotated[
        int,
        typer.Option(help="Maximum number of concurrently running requests per model.", min=1, rich_help_panel=_BATCH),
    ] = 8,
    max_queue: Annotated[
        int,
        typer.Option(
            help="Maximum number of queued requests; further requests get HTTP 429.", min=1, rich_help_panel=_BATCH
        ),
    ] = 64,
    kv_cache_tokens: Annotated[
        int,
        typer.Option(
            help="Size of the KV cache in tokens; 0: --max-num-seqs times the context length, limited by memory.",
            rich_help_panel=_BATCH,
        ),
    ] = 0,
    prefill_chunk_size: Annotated[
        int,
        typer.Option(help="Maximum number of prompt tokens per step (chunked prefill).", min=1, rich_help_panel=_BATCH),
    ] = 256,
    max_images: Annotated[
        int, typer.Option(help="Maximum number of images and videos per request.", min=0, rich_help_panel=_LIMITS)
    ] = 16,
    max_body_mb: Annotated[
        float, typer.Option(help="Maximum size of a request body in MB.", min=0.001, rich_help_panel=_LIMITS)
    ] = 32.0,
    max_image_megapixels: Annotated[
        float, typer.Option(help="Maximum size of an image in megapixels.", min=0.001, rich_help_panel=_LIMITS)
    ] = (50.0),
    fetch_timeout: Annotated[
        float,
        typer.Option(
            help="Timeout in seconds for fetching all media URLs of a request.", min=0.1, rich_help_panel=_LIMITS
        ),
    ] = 20.0,
    request_timeout: Annotated[
        float,
        typer.Option(
            help="Timeout in seconds for a request, from arrival to the last token.", min=0.1, rich_help_panel=_LIMITS
        ),
    ] = 600.0,
    allow_private_urls: Annotated[
        bool,
        typer.Option(
            "--allow-private-urls", help="Allow media URLs with private and local addresses.", rich_help_panel=_LIMITS
        ),
    ] = False,
    allowed_media_domain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DOMAIN",
            help="Fetch media only from this host; '*.example.org' matches all subdomains. Repeatable.",
            show_default=False,
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help=f"API key that clients must send; visible to other users of the machine, unlike {KEYS_VARIABLE}.",
            show_default=False,
            rich_help_panel=_WEB,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with one API key per line.", show_default=False, rich_help_panel=_WEB),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Accepted Host header; *.NAME matches all subdomains. Repeatable. Default: local names if --host is "
            "local, else all.",
            show_default=False,
            rich_help_panel=_WEB,
        ),
    ] = None,
    max_connections: Annotated[
        int, typer.Option(help="Maximum number of open connections.", min=1, rich_help_panel=_WEB)
    ] = 1000,
    max_connections_per_ip: Annotated[
        int,
        typer.Option(
            help="Maximum number of open connections per client address; 0: half of --max-connections.",
            min=0,
            rich_help_panel=_WEB,
        ),
    ] = 0,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Origin that browsers may send requests from (CORS); '*' for all. Repeatable.",
            show_default=False,
            rich_help_panel=_WEB,
        ),
    ] = None,
    root_path: Annotated[
        str, typer.Option(help="Path prefix of the server behind a proxy.", show_default=False, rich_help_panel=_WEB)
    ] = "",
    ssl_certfile: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="TLS certificate file; enables HTTPS.", show_default=False, rich_help_panel=_WEB
        ),
    ] = "",
    ssl_keyfile: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Private key file of --ssl-certfile.", show_default=False, rich_help_panel=_WEB
        ),
    ] = "",
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds to finish running requests after SIGTERM or Ctrl-C.", min=0)
    ] = 60.0,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Log the prompts. Off by default for privacy.")
    ] = False,
) -> None:
    """Serve one or several models with an OpenAI-compatible API: vila serve runs/starter/model"""
    _check(models, served_model_name, ssl_certfile, ssl_keyfile)
    _check_domains(allowed_media_domain or ())
    require_extra("serve", "vila serve")
    from vila.serve.admission import read_api_keys
    from vila.serve.chat import Service
    from vila.serve.messages import SERVER_MEDIA, Limits
    from vila.serve.models import Batching, Models
    from vila.serve.server import ServerConfig
    from vila.serve.server import serve as run

    limits = Limits(
        body=int(max_body_mb * 1e6),
        images=max_images,
        media=replace(SERVER_MEDIA, image_pixels=int(max_image_megapixels * 1e6)),
        fetch_s=fetch_timeout,
        request_s=request_timeout,
        allow_private=allow_private_urls,
        allowed_domains=tuple(allowed_media_domain or ()),
    )
    served = Models(
        [
            _served(model, loading, given)
            for model, given in zip(models, served_model_name or [""] * len(models), strict=True)
        ],
        Batching(max_num_seqs, kv_cache_tokens, max_queue, prefill_chunk_size),
    )
    config = ServerConfig(
        host=host,
        port=port,
        root_path=_rooted(root_path),
        keys=read_api_keys(api_key or (), api_key_file, os.environ.get(KEYS_VARIABLE, "").strip()),
        origins=allowed_origin or (),
        allowed_hosts=allowed_host or (),
        certificate=ssl_certfile,
        private_key=ssl_keyfile,
        max_connections=max_connections,
        max_per_address=max_connections_per_ip,
        drain_s=shutdown_timeout,
    )
    _log_to_stderr()
    run(Service(served, limits, log_prompts), config, lambda line: typer.echo(line, err=True))


def _check(models: list[str], names: list[str] | None, certificate: str, key: str) -> None:
    if names and len(names) != len(models):
        problem, hint = f"given {len(names)} times for {len(models)} models", "give one for each model, or none"
        raise ConfigError(problem, field="--served-model-name", hint=hint)
    if bool(certificate) != bool(key):
        given, missing = ("--ssl-certfile", "--ssl-keyfile") if certificate else ("--ssl-keyfile", "--ssl-certfile")
        raise ConfigError(f"requires {missing}", field=given)
    for model in models:
        looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1
        if looks_local and not Path(model).exists():
            raise ConfigError("no such directory, and no hub id OWNER/NAME", file=model, hint="check the path")


def _check_domains(domains: Sequence[str]) -> None:
    from vila.media.ssrf import normal_host

    for domain in domains:
        try:
            is_host = "." in normal_host(domain) and not set("/:@ ") & set(domain)
        except ValueError:
            is_host = False
        if not is_host:
            expected = "a host such as images.example.org, or *.example.org, without scheme, port and path"
            raise ConfigError(field="--allowed-media-domain", value=domain, expected=expected)


def _served(model: str, loading: LoadOptions, given: str) -> ServedModel:
    from vila.serve.models import ServedModel, default_name

    names = [name for name in given.split(",") if name] or [default_name(model)]
    return ServedModel(names[0], _loader(model, loading), (*names[1:], model))


def _loader(model: str, loading: LoadOptions) -> Callable[[], Engine]:
    def load() -> Engine:
        from vila.cli.options import load_engine, open_model

        return load_engine(open_model(model, loading), loading)

    return load


def _rooted(path: str) -> str:
    path = path.strip("/")
    return f"/{path}" if path else ""


def _log_to_stderr() -> None:
    import logging

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("vila.serve").setLevel(logging.INFO)
