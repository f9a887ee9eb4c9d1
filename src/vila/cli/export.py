"""`vila export`: write a model in a format that only another program reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vila.cli import options
from vila.cli.options import CheckpointOptions, with_option_groups


@with_option_groups
def export(
    model: options.Model = "",
    format_name: Annotated[str, typer.Option("--format", metavar="NAME", help="Export format; see --list.")] = "",
    out: Annotated[Path | None, typer.Option("--output", "-o", help="Output directory.")] = None,
    precision: Annotated[
        str,
        typer.Option(help="Weight precision. Default: the first one that --list shows for the format."),
    ] = "",
    group_size: Annotated[
        int,
        typer.Option(
            help="Input channels per INT4 scale; 0: that of the INT4 model, or the largest fitting of 128, 64, 32.",
            min=0,
        ),
    ] = 0,
    load_awq: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="AWQ search result to fold into the weights: search.safetensors, or an awq_cache .pt of llm-awq.",
        ),
    ] = None,
    tp_size: Annotated[
        int, typer.Option(help="Tensor-parallel size: number of ranks that the weights are split for.", min=1)
    ] = 1,
    checkpoint_options: CheckpointOptions = options.CHECKPOINT,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing export in --output.")] = False,
    list_formats: Annotated[bool, typer.Option("--list", help="List the formats and exit.")] = False,
) -> None:
    """Export [bold]MODEL[/bold] for another program, with a README that shows how to run it there.

    Layouts that vila also reads are written by [bold]vila convert[/bold].
    """
    if list_formats:
        _list()
        return
    from vila.core.errors import ConfigError

    missing = [name for name, value in (("MODEL", model), ("--format", format_name), ("--output", out)) if not value]
    if missing or out is None:
        raise ConfigError("missing", field=", ".join(missing), hint="vila export --list names the formats")
    from vila.export.base import EXPORTS, ExportOptions, resolve_options

    asked = resolve_options(EXPORTS[format_name], ExportOptions(precision, group_size, tp_size))

    from vila.cli.convert import stop_cleanly
    from vila.cli.info import human_bytes
    from vila.cli.progress import Screen
    from vila.export.base import DEFAULT_GROUP, check_output, choose_group_size, write_export
    from vila.export.source import open_source

    target = out.expanduser()
    # Before the model, which may come from the hub.
    check_output(target, Path(model), overwrite)
    stop_cleanly()
    with Screen() as events:
        source = open_source(
            model,
            **checkpoint_options.overrides,
            revision=checkpoint_options.revision or None,
            search=None if load_awq is None else load_awq.expanduser(),
            events=events,
        )
        rounds = asked.precision.startswith("int4") and "group_size" in EXPORTS[format_name].options
        if (
            rounds
            and not source.int4
            and not group_size
            and (size := choose_group_size(source, asked)) != DEFAULT_GROUP
        ):
            events.log(f"group size: {size}, the largest of 128, 64 and 32 that divides the widths of this model")
        write_export(source, format_name, target, asked, overwrite=overwrite)
    files = [path for path in target.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    typer.echo(f"{target}: {format_name} {asked.precision}, {len(files)} files, {human_bytes(total)}")
    typer.echo(f"how to run it: {target / 'README.md'}")


def _list() -> None:
    from vila.export.base import EXPORTS

    for name in EXPORTS:
        target = EXPORTS[name]
        typer.echo(f"{name:<22}{target.summary}")
        for precision, about in target.precisions.items():
            typer.echo(f"{'':<22}  {precision:<16}{about}")
