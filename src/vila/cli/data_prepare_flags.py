"""What the commands of `vila data prepare` share: their flags, and what they print at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vila.cli import options

if TYPE_CHECKING:
    from vila.prepare.resize import ResizeRule

_STORED = "Stored pictures"

Sources = Annotated[list[Path], typer.Argument(help="The published files, all of them on every worker.")]
Out = Annotated[
    Path, typer.Option(help="Folder of the result; one for each data set.", callback=options.output_directory)
]
Shard = Annotated[str, typer.Option(metavar="K/N", help="This worker and their number, k from 0.")]
PerShard = Annotated[int, typer.Option(help="Most samples in one shard.", min=1)]
KeepParts = Annotated[
    bool,
    typer.Option("--keep-parts/--delete-parts", help="Keep OUT/parts at the end, which takes the disk space twice."),
]
Decode = Annotated[bool, typer.Option("--decode", help="Also decode every picture; about 160 a second and core.")]
ShortSide = Annotated[
    int,
    typer.Option(
        help="Pixels that a longer short side is shrunk to; 0 stores pictures as they came.",
        min=0,
        rich_help_panel=_STORED,
    ),
]
Quality = Annotated[
    int, typer.Option(help="JPEG quality of shrunk pictures, 1 to 100.", min=1, max=100, rich_help_panel=_STORED)
]


def parse_shard(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8). Raises ConfigError."""
    from vila.core.errors import ConfigError

    index, _, workers = text.partition("/")
    if not (index.isdecimal() and workers.isdecimal() and int(index) < int(workers)):
        raise ConfigError(f"--shard {text!r}: expected k/n with k from 0 to n - 1, such as 0/4")
    return int(index), int(workers)


def resize_rule(short_side: int, quality: int) -> ResizeRule:
    """The rule that two flags ask for."""
    from vila.prepare.resize import ResizeRule

    return ResizeRule(short_side or None, quality)


def print_counts(index: dict[str, Any] | None, out: Path) -> None:
    """A table of what came in, what went out and why the rest did not; without an index, what to wait for."""
    if index is None:
        typer.echo(f"{out}: this worker is done; run the same command again when the others are")
        return
    print_table("records", index["counts"])
    shards = index["shards"]
    typer.echo(f"{out}: {sum(one['samples'] for one in shards):,} samples in {len(shards):,} files")
    if index["counts"]["dropped"] or index["counts"]["noted"]:
        typer.echo(f"what was left out: {out / 'log' / 'failures.jsonl'}")


def print_table(title: str, counts: dict[str, Any]) -> None:
    """Stored counts as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title, "number")
    table.add_row("in", f"{counts['in']:,}")
    table.add_row("out", f"{counts['out']:,}")
    for kind in ("dropped", "noted"):
        for name, number in counts[kind].items():
            table.add_row(f"{kind}: {name}", f"{number:,}")
    Console().print(table)
