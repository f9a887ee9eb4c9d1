"""`vila serve`: OpenAI-compatible chat completions server."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from vila.cli import options
from vila.cli.options import LoadOptions, load_engine, open_model, with_option_groups
from vila.core.errors import ConfigError
from vila.core.optional import require_extra

if TYPE_CHECKING:
    from vila.serve.models import ServedModel

KEYS_VARIABLE = "VILA_API_KEY"


@dataclass(frozen=True)
class BatchingOptions:
    """Flags of continuous batching."""

    panel: ClassVar = "Batching"

    max_num_seqs: Annotated[int, typer.Option(min=1)] = 8
    """Maximum number of concurrently running requests per model."""
    max_queue: Annotated[int, typer.Option(min=1)] = 64
    """Maximum number of queued requests; further requests get HTTP 429."""
    kv_cache_tokens: int = 0
    """Size of the KV cache in tokens; 0: --max-num-seqs times the context length, limited by memory."""
    prefill_chunk_size: Annotated[int, typer.Option(min=1)] = 256
    """Maximum number of prompt tokens per step (chunked prefill)."""


@dataclass(frozen=True)
class LimitOptions:
    """Flags that limit a request."""

    panel: ClassVar = "Request limits"

    max_images: Annotated[int, typer.Option(min=0)] = 16
    """Maximum number of images and videos per request."""
    max_body_mb: Annotated[float, typer.Option(min=0.001)] = 32.0
    """Maximum size of a request body in MB."""
    max_image_megapixels: Annotated[float, typer.Option(min=0.001)] = 50.0
    """Maximum size of an image in megapixels."""
    fetch_timeout: Annotated[float, typer.Option(min=0.1)] = 20.0
    """Timeout in seconds for fetching all media URLs of a request."""
    request_timeout: Annotated[float, typer.Option(min=0.1)] = 600.0
    """Timeout in seconds for a request, from arrival to the last token."""
    allow_private_urls: bool = False
    """Allow media URLs with private and local addresses."""
    allowed_media_domain: Annotated[list[str] | None, typer.Option(metavar="DOMAIN")] = None
    """Fetch media only from this host; '*.example.org' matches all subdomains. Repeatable."""


@dataclass(frozen=True)
class AccessOptions:
    """Flags that decide who can connect."""

    panel: ClassVar = "Access"

    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help=f"API key that clients must send; visible to other users of the machine, unlike {KEYS_VARIABLE}."
        ),
    ] = None
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE")] = None
    """File with one API key per line."""
    allowed_host: Annotated[list[str] | None, typer.Option(metavar="NAME")] = None
    """Accepted Host header; *.NAME matches all subdomains. Repeatable. Default: local names if --host is local, else
    all."""
    max_connections: Annotated[int, typer.Option(min=1)] = 1000
    """Maximum number of open connections."""
    max_connections_per_ip: Annotated[int, typer.Option(min=0)] = 0
    """Maximum number of open connections per client address; 0: half of --max-connections."""
    allowed_origin: Annotated[list[str] | None, typer.Option(metavar="ORIGIN")] = None
    """Origin that browsers may send requests from (CORS); '*' for all. Repeatable."""
    root_path: str = ""
    """Path prefix of the server behind a proxy."""
    ssl_certfile: Annotated[str, typer.Option(metavar="FILE")] = ""
    """TLS certificate file; enables HTTPS."""
    ssl_keyfile: Annotated[str, typer.Option(metavar="FILE")] = ""
    """Private key file of --ssl-certfile."""


BATCHING, LIMITS, ACCESS = BatchingOptions(), LimitOptions(), AccessOptions()


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
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 accepts connections from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free port.", min=0, max=65535)] = 8000,
    loading: LoadOptions = options.LOAD,
    batching: BatchingOptions = BATCHING,
    limits: LimitOptions = LIMITS,
    access: AccessOptions = ACCESS,
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds to finish running requests after SIGTERM or Ctrl-C.", min=0)
    ] = 60.0,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Log the prompts. Off by default for privacy.")
    ] = False,
) -> None:
    """Serve one or several models with an OpenAI-compatible API: vila serve runs/starter/model"""
    _check(models, served_model_name, access)
    _check_domains(limits.allowed_media_domain or ())
    require_extra("serve", "vila serve")
    from vila.serve.admission import read_api_keys
    from vila.serve.chat import Service
    from vila.serve.messages import SERVER_MEDIA, Limits
    from vila.serve.models import Batching, Models
    from vila.serve.server import ServerConfig
    from vila.serve.server import serve as run

    request_limits = Limits(
        body=int(limits.max_body_mb * 1e6),
        images=limits.max_images,
        media=replace(SERVER_MEDIA, image_pixels=int(limits.max_image_megapixels * 1e6)),
        fetch_s=limits.fetch_timeout,
        request_s=limits.request_timeout,
        allow_private=limits.allow_private_urls,
        allowed_domains=tuple(limits.allowed_media_domain or ()),
    )
    names = served_model_name or [""] * len(models)
    served = Models(
        [_served(model, loading, given) for model, given in zip(models, names, strict=True)],
        Batching(batching.max_num_seqs, batching.kv_cache_tokens, batching.max_queue, batching.prefill_chunk_size),
    )
    root_path = access.root_path.strip("/")
    config = ServerConfig(
        host=host,
        port=port,
        root_path=f"/{root_path}" if root_path else "",
        keys=read_api_keys(access.api_key or (), access.api_key_file, os.environ.get(KEYS_VARIABLE, "").strip()),
        origins=access.allowed_origin or (),
        allowed_hosts=access.allowed_host or (),
        certificate=access.ssl_certfile,
        private_key=access.ssl_keyfile,
        max_connections=access.max_connections,
        max_per_address=access.max_connections_per_ip,
        drain_s=shutdown_timeout,
    )
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("vila.serve").setLevel(logging.INFO)
    run(Service(served, request_limits, log_prompts), config, lambda line: typer.echo(line, err=True))


def _check(models: list[str], names: list[str] | None, access: AccessOptions) -> None:
    if names and len(names) != len(models):
        problem, hint = f"given {len(names)} times for {len(models)} models", "give one for each model, or none"
        raise ConfigError(problem, field="--served-model-name", hint=hint)
    if bool(access.ssl_certfile) != bool(access.ssl_keyfile):
        given, missing = (
            ("--ssl-certfile", "--ssl-keyfile") if access.ssl_certfile else ("--ssl-keyfile", "--ssl-certfile")
        )
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
    return ServedModel(names[0], lambda: load_engine(open_model(model, loading), loading), (*names[1:], model))
