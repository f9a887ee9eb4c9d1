"""Output of `vila data` for people: findings of a check, statistics with licences, indexes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from vila.cli.data_check import Findings
    from vila.cli.data_index import Indexed
    from vila.cli.data_stats import Stats

_FIRST_IDS = 5
_FIRST_FILES = 10


def print_findings(found: Findings, unit: str) -> None:
    """Print the findings of a check of one data set."""
    from vila.cli.data_tally import histogram, spread

    faulty = f"{found.fault_count:,} with faults" if found.fault_count else "no faults"
    clips = f", {found.clips:,} distinct clips" if found.clips else ""
    typer.echo(f"{found.name}: {found.samples:,} samples, {faulty}, {found.images:,} distinct images{clips}")
    for fault in found.faults:
        typer.echo(f"  fault: {fault}")
    if found.fault_count > len(found.faults):
        typer.echo(f"  and {found.fault_count - len(found.faults):,} more faults")
    if found.missing_count:
        typer.echo(f"  missing files: {found.missing_count:,}")
        for name in found.missing:
            typer.echo(f"    {name}")
        if found.missing_count > len(found.missing):
            typer.echo(f"    and {found.missing_count - len(found.missing):,} more")
    if found.duplicate_count:
        some = ", ".join(repr(name) for name in found.duplicates[:_FIRST_IDS])
        typer.echo(f"  {found.duplicate_count:,} ids occur more than once{': ' if some else ''}{some}")
    if note := unread_note(found.unread):
        typer.echo(f"  note: {note}")
    for side, counts in (("widths", found.widths), ("heights", found.heights)):
        if counts:
            low, middle, high = spread(counts)
            typer.echo(f"  {side}: {low} to {high} pixels, median {middle}")
    if found.lengths:
        low, middle, high = spread(found.lengths)
        typer.echo(f"  {unit}: {low:,} to {high:,}, median {middle:,}; {found.supervised_share:.1%} supervised")
        bins = histogram(found.lengths)
        for bound, count in bins.items():
            bar = "#" * max(1, round(40 * count / max(bins.values())))
            typer.echo(f"  {'up to ' + bound if bound != 'more' else 'longer':>11}  {bar} {count:,}")
    for preview in (found.preview, found.rows):
        for line in preview.lines() if preview else ():
            typer.echo(f"  {line}")


def unread_note(unread: Mapping[str, int]) -> str:
    """Return a sentence about media that the records hold and the format does not read; empty if there are none."""
    if not unread:
        return ""
    names = ", ".join(f"{name} ({count:,})" for name, count in sorted(unread.items()))
    return f"records hold media that are not read: {names}; only those under the keys of the format are trained on"


def print_stats(stats: Sequence[Stats]) -> None:
    """Print a table of all data sets, and below it the licence of each."""
    from rich.console import Console
    from rich.table import Table

    table = Table("data set", "samples", "images", "tokens", "share of tokens")
    for one in stats:
        about = "" if one.exact else "about "
        share = one.share
        tokens = (f"{about}{share.tokens:,}", f"{share.token_share:.1%}") if one.has_tokens else ("-", "-")
        table.add_row(share.name, f"{share.samples:,}", f"{about}{share.images:,}", *tokens)
    Console().print(table)
    if not all(one.has_tokens for one in stats):
        typer.echo("tokens are counted with --model, which brings the tokenizer")
    for one in stats:
        if not one.licences:
            typer.echo(f"{one.share.name}: not a known data set; its licence is unknown")
        for licence in one.licences:
            read = "" if licence.checked else " (not verified at the source)"
            typer.echo(f"{one.share.name}: {licence.name}, {licence.source}")
            typer.echo(f"  licence: {licence.licence}{read}")
            typer.echo(f"  forbids: {licence.forbids}")


def print_indexed(path: str, indexed: Indexed) -> None:
    """Print the number of records and the locations of their indexes."""
    files = [*(("built", file) for file in indexed.built), *(("found", file) for file in indexed.found)]
    typer.echo(f"{path}: {indexed.records:,} records; indexes: {len(indexed.built)} built, {len(indexed.found)} found")
    for state, file in files[:_FIRST_FILES]:
        typer.echo(f"  {state}: {file}")
    if len(files) > _FIRST_FILES:
        typer.echo(f"  and {len(files) - _FIRST_FILES:,} more beside them")
