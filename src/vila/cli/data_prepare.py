"""`vila data prepare ...`: public releases to shards, by the steps of `vila.prepare`; run again to go on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Turn public releases into shards; run again to go on after a stop.", no_args_is_help=True)

_Out = Annotated[Path, typer.Option(help="Folder of the result.")]
_Shard = Annotated[str, typer.Option(help="This worker and their number, k/n with k from 0.")]
_Sources = Annotated[list[Path], typer.Argument(help="The published files, all of them on every worker.")]


@app.command()
def mmc4(
    sources: _Sources,
    out: _Out,
    shard: _Shard = "0/1",
    drop_incomplete: Annotated[bool, typer.Option("--drop-incomplete", help="As in the original.")] = False,
    allow_private: Annotated[bool, typer.Option("--allow-private", help="Also fetch from this network.")] = False,
) -> None:
    """Download the pictures of MMC4's documents."""
    from vila.cli.progress import Screen
    from vila.media.fetch_many import FetchRules
    from vila.prepare.mmc4 import prepare_mmc4

    rules, own = FetchRules(allow_private=allow_private), parse_shard(shard)
    with Screen() as screen:
        index = prepare_mmc4(sources, out, drop_incomplete=drop_incomplete, rules=rules, shard=own, events=screen)
    _print_counts(index, out)


@app.command()
def flan(sources: _Sources, out: _Out, shard: _Shard = "0/1", rows: int = 1_000_000) -> None:
    """Take evenly spaced rows of FLAN's parquet files."""
    from vila.cli.progress import Screen
    from vila.prepare.flan import prepare_flan

    own = parse_shard(shard)
    with Screen() as screen:
        index = prepare_flan(sources, out, rows=rows, shard=own, events=screen)
    _print_counts(index, out)


@app.command()
def sharegpt4v(
    source: Path,
    out: _Out,
    images: Annotated[Path | None, typer.Option(help="Root of the pictures; none: not checked.")] = None,
    keep_sam: Annotated[bool, typer.Option("--keep-sam", help="Keep records with SA-1B pictures.")] = False,
) -> None:
    """Leave out SA-1B pictures and repetitive answers of ShareGPT4V."""
    from vila.cli.progress import Screen
    from vila.prepare.sharegpt4v import prepare_sharegpt4v

    with Screen() as screen:
        index = prepare_sharegpt4v(source, out, images=images, keep_sam=keep_sam, events=screen)
    _print_counts(index, out)


def parse_shard(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8). Raises ConfigError."""
    from vila.core.errors import ConfigError

    index, _, workers = text.partition("/")
    if not (index.isdecimal() and workers.isdecimal() and int(index) < int(workers)):
        raise ConfigError(f"--shard {text!r}: expected k/n with k from 0 to n - 1, such as 0/4")
    return int(index), int(workers)


def _print_counts(index: dict[str, Any] | None, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    if index is None:
        typer.echo(f"{out}: this worker is done; run again when the others are")
        return
    counts = index["counts"]
    table = Table("records", "number")
    for name, number in (("in", counts["in"]), ("out", counts["out"]), *counts["dropped"].items()):
        table.add_row(name, f"{number:,}")
    Console().print(table)
