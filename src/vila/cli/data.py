"""`vila data ...`: convert, check, inspect, count and index training data."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vila.cli.data_prepare import app as prepare_app
from vila.cli.options import output_directory, output_file
from vila.core.progress import SILENT, Events

if TYPE_CHECKING:
    from vila.cli.data_check import Findings, Stats
    from vila.data.dataset import DatasetEntry
    from vila.prepare.csv_table import Converted


app = typer.Typer(help="Convert, check, inspect and count training data.", no_args_is_help=True)
app.add_typer(prepare_app, name="prepare")

_VIEWS = 8
START_MODEL = "runs/starter/model"
"""Model that `vila quickstart` writes; the commands after `from-csv` train it."""

_Data = Annotated[
    str, typer.Argument(metavar="RECIPE|FILE", help="Recipe (name or .yaml), or data file, directory or pattern.")
]
_Format = Annotated[str, typer.Option("--format", help="Data format of FILE. Default: messages.", show_default=False)]
_ImageRoot = Annotated[
    str,
    typer.Option(help="Base directory of relative image paths. Default: the directory of FILE.", show_default=False),
]
_Options = Annotated[
    list[str] | None,
    typer.Option("--format-option", metavar="NAME=VALUE", help="Option of the data format. Repeatable."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_Template = Annotated[str, typer.Option(help="Conversation template. Default: of the recipe or model.")]
_Model = Annotated[
    str,
    typer.Option(
        help="Model whose tokenizer counts tokens. Default: the model of the recipe, if it is a local directory."
    ),
]


@app.command("from-csv")
def from_csv(
    table: Annotated[
        Path, typer.Argument(help="CSV file with the columns image, question, answer, or image, caption.")
    ],
    image_root: Annotated[Path, typer.Option(help="Directory of the images.")],
    out: Annotated[
        Path,
        typer.Option("--output", "-o", help="JSON Lines file to write, in the format messages.", callback=output_file),
    ],
) -> None:
    """Convert a CSV table to training data, and print the commands to check it and train on it."""
    from vila.prepare.csv_table import convert_csv

    written = convert_csv(table, image_root, out)
    typer.echo(f"{out}: {written.samples:,} samples")
    if written.linked:
        typer.echo(f"images outside of the directory of {out.name} were linked or copied to {written.linked}")
    typer.echo("\nnext:")
    for command in _next_commands(written):
        typer.echo(f"  {command}")


def _next_commands(written: Converted) -> list[str]:
    """Return shell commands that check the data, train on them, and run the trained model."""
    import json
    import shlex

    has_model = Path(START_MODEL).is_dir()
    run = written.out.parent / f"{written.out.stem}_run"
    mixture = json.dumps([{"format": "messages", "path": str(written.out)}])
    fields = [f"model.path={START_MODEL}", f"data.mixture={mixture}", "budget.tokens=0", "budget.epochs=3"]
    image = ["--image", str(written.first.image)] if written.first.image else []
    commands = [
        ["vila", "data", "check", str(written.out), *(["--model", START_MODEL] if has_model else [])],
        *([] if has_model else [["vila", "quickstart"]]),
        ["vila", "train", "starter/3_sft", *fields, f"output.dir={run}"],
        ["vila", "run", str(run / "model"), *image, "--prompt", written.first.question],
    ]
    return [shlex.join(command) for command in commands]


@app.command()
def check(
    data: _Data,
    form: _Format = "",
    image_root: _ImageRoot = "",
    options: _Options = None,
    num_samples: Annotated[int, typer.Option(help="Number of samples to check per data set; 0: all.", min=0)] = 0,
    template: _Template = "",
    model: _Model = "",
    max_shown: Annotated[
        int, typer.Option(help="Maximum number of errors and missing files to list; all are counted.", min=0)
    ] = 10,
    save_images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Save up to 8 preprocessed images per data set as PNG, as the vision tower sees them.",
            show_default=False,
            callback=output_directory,
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Read all samples and images of [bold]RECIPE|FILE[/bold] and list errors. Exit code 1 if there are any."""
    from vila.cli.data_check import check_data
    from vila.cli.data_sets import open_data
    from vila.cli.progress import Screen

    with Screen() as screen:
        opened = open_data(
            data, form=form, image_root=image_root, options=options or (), template=template, model=model, events=screen
        )
        saved = opened.save_views(save_images, _VIEWS) if save_images else []
        found = check_data(opened, sample=num_samples, max_shown=max_shown, events=screen)
    if as_json:
        _print_json({"unit": opened.unit, "template": opened.template, "data_sets": [one.as_json() for one in found]})
    else:
        for one in found:
            print_findings(one, opened.unit)
        if save_images:
            typer.echo(f"{save_images}: {len(saved)} images as the tower sees them")
    opened.require_images()
    if any(one.fault_count for one in found):
        raise typer.Exit(1)


@app.command()
def inspect(
    data: _Data,
    number: Annotated[int, typer.Option("--index", help="Index of the first sample, from 0.", min=0)] = 0,
    count: Annotated[int, typer.Option(help="Number of samples to show.", min=1)] = 1,
    form: _Format = "",
    image_root: _ImageRoot = "",
    options: _Options = None,
    template: _Template = "",
    model: _Model = "",
    html: Annotated[
        Path | None,
        typer.Option(help="Also write an HTML page with the images.", show_default=False, callback=output_file),
    ] = None,
) -> None:
    """Show samples as the model sees them; supervised text is green and between angle quotes."""
    from rich.console import Console

    from vila.cli.data_inspect import as_card, as_terminal_text, runs_of
    from vila.cli.data_sets import open_data
    from vila.cli.progress import Screen
    from vila.core.errors import ConfigError
    from vila.report.html import Page

    with Screen() as screen:
        opened = open_data(
            data, form=form, image_root=image_root, options=options or (), template=template, model=model, events=screen
        )
    every = ((part, at) for part in opened.mixture.datasets for at in range(len(part.source)))
    places = list(islice(every, number, number + count))
    if not places:
        total = sum(len(part.source) for part in opened.mixture.datasets)
        raise ConfigError(f"{data} has {total:,} samples, counted from 0", field="--index", value=number)
    page = Page(f"Samples of {data}", f"template {opened.template}")
    cards = []
    for part, at in places:
        tokens = opened.tokenize(part, part.source[at])
        runs = runs_of(tokens, opened.tokenizer, opened.slots_per_image)
        typer.echo(f"{part.name} sample {tokens.id}: {len(tokens):,} tokens")
        Console(highlight=False).print(as_terminal_text(runs), soft_wrap=True)
        if html:
            cards.append(as_card(tokens, runs))
    if html:
        page.gallery(cards).save(html)


@app.command()
def stats(
    data: _Data,
    form: _Format = "",
    image_root: _ImageRoot = "",
    options: _Options = None,
    model: _Model = "",
    num_samples: Annotated[
        int, typer.Option(help="Number of samples per data set for the estimate; 0: all.", min=0)
    ] = 64,
    as_json: _Json = False,
) -> None:
    """Print samples, images, tokens and licence of each data set of [bold]RECIPE|FILE[/bold] in one epoch."""
    from vila.cli.data_check import stats_of
    from vila.cli.data_sets import open_data
    from vila.cli.progress import Screen

    with Screen() as screen:
        opened = open_data(data, form=form, image_root=image_root, options=options or (), model=model, events=screen)
    found = stats_of(opened, num_samples)
    if as_json:
        _print_json({"data_sets": [one.as_json() for one in found]})
    else:
        print_stats(found)


@app.command()
def index(
    path: Annotated[str, typer.Argument(metavar="FILE", help="Data file, directory of shards, or pattern.")],
    form: _Format = "messages",
    image_root: _ImageRoot = "",
    options: _Options = None,
) -> None:
    """Build the record index of [bold]FILE[/bold] before its first use, and print its path."""
    from vila.cli.data_sets import parse_options
    from vila.cli.progress import Screen
    from vila.data.dataset import DatasetEntry

    entry = DatasetEntry(format=form, path=path, image_root=image_root, options=parse_options(options or ()))
    with Screen() as screen:
        indexed = index_data(entry, screen)
    print_indexed(path, indexed)


def _print_json(facts: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(facts, indent=1))


# --- data_shown
# Output of `vila data` for people: findings of a check, statistics with licences, indexes.


_FIRST_IDS = 5
_FIRST_FILES = 10


def print_findings(found: Findings, unit: str) -> None:
    """Print the findings of a check of one data set."""
    from vila.data.stats import histogram, min_median_max

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
            low, middle, high = min_median_max(counts)
            typer.echo(f"  {side}: {low} to {high} pixels, median {middle}")
    if found.lengths:
        low, middle, high = min_median_max(found.lengths)
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


# --- data_index
# `vila data index`: where the indexes of data files lie, and whether they were there before.


_NAME_END = 200


@dataclass(frozen=True, slots=True)
class Indexed:
    """What indexing came to: the number of records, and the index files that were built and that were found."""

    records: int
    built: tuple[Path, ...]
    found: tuple[Path, ...]


def index_data(entry: DatasetEntry, events: Events = SILENT) -> Indexed:
    """Open a data set, which indexes each of its files that has no index or a stale one."""
    from vila.data.dataset import open_dataset

    before = _indexes(entry.path)
    records = len(open_dataset(entry, events))
    after = _indexes(entry.path)
    found = {file for file, state in after.items() if before.get(file) == state}
    return Indexed(records, tuple(sorted(after.keys() - found)), tuple(sorted(found)))


def _indexes(path: str) -> dict[Path, tuple[int, int]]:
    """The index files that speak of a file, a folder's files or a pattern's, each with what a new file changes."""
    from vila.data.readers.index import index_folder, read_header

    # An index names its file by the end of the path.
    names = {os.path.realpath(file)[-_NAME_END:] for file in _files(path)}
    return {
        file: (file.stat().st_ino, file.stat().st_mtime_ns)
        for file in sorted(index_folder().glob("*.index"))
        if (read_header(file) or {}).get("path") in names
    }


def _files(path: str) -> list[str]:
    if Path(path).is_dir():
        return [str(file) for file in Path(path).iterdir()]
    return [path] if Path(path).exists() else glob.glob(path)  # noqa: PTH207 the pattern may be absolute
