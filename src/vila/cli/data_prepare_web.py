"""`vila data prepare mmc4` and `coyo`: releases that are lists of addresses, whose pictures are downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vila.cli.data_fetch_flags import with_fetch_flags
from vila.cli.data_prepare_flags import (
    KeepParts,
    Out,
    PerShard,
    Quality,
    Shard,
    ShortSide,
    Sources,
    parse_shard,
    print_counts,
    print_table,
    resize_rule,
)

if TYPE_CHECKING:
    from vila.prepare.counts import Counts

_Keep = Annotated[float, typer.Option(help="Share of each file's rows to take, the best first; over 0, at most 1.")]
_Threshold = Annotated[float, typer.Option(help="Least sum of both CLIP similarities, -2 to 2; -2 takes all.")]
_PerList = Annotated[int, typer.Option(help="Rows of one list, which is one unit of work.", min=1)]


@with_fetch_flags
def mmc4(
    sources: Sources,
    out: Out,
    shard: Shard = "0/1",
    per_shard: PerShard = 1000,
    drop_incomplete: Annotated[
        bool, typer.Option("--drop-incomplete", help="A document goes with its first bad picture, as in the original.")
    ] = False,
    keep_parts: KeepParts = True,
    short_side: ShortSide = 336,
    quality: Quality = 90,
    *,
    fetch: Mapping[str, Any],
) -> None:
    """Download the pictures of MMC4's documents (.jsonl, .jsonl.gz or .jsonl.zip)."""
    from vila.cli.progress import Screen
    from vila.media.fetch_many import FetchRules
    from vila.prepare.mmc4 import prepare_mmc4

    own, resize, rules = parse_shard(shard), resize_rule(short_side, quality), FetchRules(**fetch)
    with Screen() as screen:
        index = prepare_mmc4(
            sources, out, drop_incomplete=drop_incomplete, rules=rules, resize=resize, per_shard=per_shard, shard=own,
            keep_parts=keep_parts, events=screen,
        )  # fmt: skip
    print_counts(index, out)


@with_fetch_flags
def coyo(
    sources: Sources,
    out: Out,
    keep: _Keep = 0.2,
    threshold: _Threshold = 0.6,
    rows_per_list: _PerList = 12_440,
    shard: Shard = "0/1",
    per_shard: PerShard = 10_000,
    keep_parts: KeepParts = True,
    short_side: ShortSide = 336,
    quality: Quality = 90,
    *,
    fetch: Mapping[str, Any],
) -> None:
    """Choose the best pairs of COYO's parquet files (to OUT/lists), then download their pictures."""
    from vila.cli.progress import Screen
    from vila.media.fetch_many import FetchRules
    from vila.prepare.coyo import prepare_coyo, select_coyo

    own, resize, rules = parse_shard(shard), resize_rule(short_side, quality), FetchRules(**fetch)
    lists = out / "lists"
    with Screen() as screen:
        select_coyo(
            sources, lists, share=keep, threshold=threshold, rows_per_unit=rows_per_list, shard=own, events=screen
        )
        chosen = _selected(sources, lists)
        index = None
        if chosen:
            index = prepare_coyo(
                chosen[0], out, rules=rules, resize=resize, per_shard=per_shard, shard=own, keep_parts=keep_parts,
                events=screen,
            )  # fmt: skip
    if chosen:
        print_table("rows of the tables", chosen[1].as_json())
    print_counts(index, out)


def _selected(sources: Sequence[Path], lists: Path) -> tuple[list[Path], Counts] | None:
    """The lists of all workers and what their selection left out; None while some have not selected."""
    from vila.core.errors import DataError
    from vila.prepare.counts import Counts
    from vila.prepare.coyo import read_selection
    from vila.prepare.parts import unit_names

    records = [lists / f"{name}.selected.json" for name in unit_names(sources)]
    if not all(record.is_file() for record in records):
        return None
    found = [read_selection(record) for record in records]
    files = [file for own, _ in found for file in own]
    if not files:
        raise DataError(f"{lists}: no row of {len(records)} files is good enough; lower --threshold in another folder")
    return files, Counts.total(counts for _, counts in found)
