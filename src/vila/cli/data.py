"""`vila data ...`: convert, check, inspect, count and index training data."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vila.cli.data_prepare import app as prepare_app
from vila.cli.options import output_directory, output_file
from vila.core.errors import ConfigError
from vila.core.progress import SILENT, Events

if TYPE_CHECKING:
    from vila.config.schema import Recipe
    from vila.core.vision_spec import ImageMode
    from vila.data.check import DataSets, Findings
    from vila.data.dataset import DatasetEntry, SampleReader
    from vila.data.mixture import Mixture
    from vila.data.stats import DatasetStats
    from vila.prepare.csv_table import Converted
    from vila.prepare.licences import DataLicence


app = typer.Typer(
    help="Convert, check, inspect and count training data.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
)
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
    typer.Option(help="Base directory of relative image paths. Default: the directory of FILE."),
]
_Options = Annotated[
    list[str] | None,
    typer.Option("--format-option", metavar="NAME=VALUE", help="Option of the data format. Repeatable."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_Template = Annotated[str, typer.Option(help="Conversation template. Default: that of the recipe or model.")]
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
            callback=output_directory,
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Read all samples and images of [bold]RECIPE|FILE[/bold] and list errors. Exit code 1 if there are any."""
    from vila.cli.progress import Screen
    from vila.data.check import check_data

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
            typer.echo(f"{save_images}: {len(saved)} preprocessed images")
    opened.require_images()
    if any(one.num_errors for one in found):
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
        typer.Option(help="Also write an HTML page with the images.", callback=output_file),
    ] = None,
) -> None:
    """Show samples as the model sees them; trained text is green and in angle quotes."""
    from rich.console import Console

    from vila.cli.data_inspect import as_card, as_terminal_text, token_runs
    from vila.cli.progress import Screen
    from vila.report.html import Page

    with Screen() as screen:
        opened = open_data(
            data, form=form, image_root=image_root, options=options or (), template=template, model=model, events=screen
        )
    every = ((part, at) for part in opened.mixture.datasets for at in range(len(part.source)))
    chosen = list(islice(every, number, number + count))
    if not chosen:
        total = sum(len(part.source) for part in opened.mixture.datasets)
        raise ConfigError(f"{data} has {total:,} samples, counted from 0", field="--index", value=number)
    page = Page(f"Samples of {data}", f"template {opened.template}")
    cards = []
    for part, at in chosen:
        tokens = opened.tokenize(part, part.source[at])
        runs = token_runs(tokens, opened.tokenizer, opened.tokens_per_image)
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
    from vila.cli.progress import Screen
    from vila.data.dataset import DatasetEntry

    entry = DatasetEntry(format=form, path=path, image_root=image_root, options=parse_options(options or ()))
    with Screen() as screen:
        indexed = index_data(entry, screen)
    print_indexed(path, indexed)


def _print_json(facts: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(facts, indent=1))


# --- opening data sets

DEFAULT_TEMPLATE = "vicuna_v1"
"""Template if neither flags nor recipe nor model name one."""


def open_data(
    data: str,
    *,
    form: str = "",
    image_root: str = "",
    options: Sequence[str] = (),
    template: str = "",
    model: str = "",
    events: Events = SILENT,
) -> DataSets:
    """Open the data sets of a recipe, or of one file, directory or pattern.

    options: `NAME=VALUE` options of the format.
    model:   "" uses the model of the recipe if it is a local directory.
    events:  progress of indexing.
    """
    from vila.config.load import load_recipe, recipe_names
    from vila.data.check import DataSets
    from vila.data.dataset import DatasetEntry, build_mixture, open_mixture

    recipe: Recipe | None = None
    origins: dict[str, str] = {}
    if data.endswith((".yaml", ".yml")) or (data in recipe_names() and not Path(data).exists()):
        if form or image_root or options:
            hint = "leave out --format, --image-root and --format-option"
            raise ConfigError("a recipe names the formats of its data", file=data, hint=hint)
        recipe = load_recipe(data, origins=origins)
        mixture = build_mixture(recipe, events)
        path = recipe.model.path
        model = model or (path if path and Path(path).is_dir() else "")
        template = template or recipe.data.template or recipe.model.template
    else:
        entry = DatasetEntry(
            format=form or "messages", path=data, image_root=image_root, options=parse_options(options)
        )
        mixture = open_mixture([entry], 0, events)
    if model:
        reader, tokenizer = _reader(mixture, template, model, recipe.model.image_mode if recipe else None)
        template = reader.template
    else:
        reader, tokenizer = None, None
    paths = tuple(Path(entry.path) for entry in recipe.data.mixture) if recipe else (Path(data),)
    return DataSets(
        mixture, paths, template or DEFAULT_TEMPLATE, reader, tokenizer, recipe, origins.get("data.max_length", "")
    )


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Parse `--format-option NAME=VALUE`; values are YAML. Raises ConfigError for words that are not NAME=VALUE."""
    import yaml

    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(field="--format-option", value=word, expected="NAME=VALUE, such as max_images=4")
        try:
            options[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{value[:80]!r} is not YAML ({error})", field="--format-option", value=word) from error
    return options


def _reader(mixture: Mixture, template: str, model: str, image_mode: ImageMode | None) -> tuple[SampleReader, Any]:
    """Return the sample reader and tokenizer of a model. image_mode: overrides the model's; None keeps it."""
    from vila.data.dataset import SampleReader
    from vila.model.loading import open_checkpoint

    processor = open_checkpoint(model, template=template or None).processor
    chosen = template or processor.find_template().name
    spec = replace(processor.spec, image_mode=image_mode) if image_mode else processor.spec
    return SampleReader(mixture, chosen, processor.span_tokenizer, spec), processor.tokenizer


# --- statistics


@dataclass(frozen=True, slots=True)
class Stats:
    """Statistics of one data set in one epoch.

    exact:      whether all samples were counted; else tokens and images are estimates.
    has_tokens: whether a tokenizer counted; else `share.tokens` and `share.token_share` are undefined and a video
                counts as one image.
    licences:   licences of known public data sets; empty for other data.
    """

    share: DatasetStats
    path: Path
    exact: bool
    has_tokens: bool
    licences: tuple[DataLicence, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain data; None for values that were not counted."""
        return {
            "name": self.share.name,
            "path": str(self.path),
            "samples": self.share.samples,
            "images": self.share.images,
            "tokens": self.share.tokens if self.has_tokens else None,
            "token_share": round(self.share.token_share, 4) if self.has_tokens else None,
            "exact": self.exact,
            "surveyed": self.share.num_measured,
            "licences": [
                {"name": one.name, "licence": one.licence, "forbids": one.forbids, "source": one.source}
                | {"checked": one.checked}
                for one in self.licences
            ],
        }


def stats_of(data: DataSets, sample: int) -> list[Stats]:
    """Return the statistics of each data set, from at most `sample` samples of it (0: all).

    Training logs the same numbers before its first step. No image is opened.
    """
    from vila.data.stats import dataset_stats
    from vila.prepare.licences import licences_of

    largest = max(len(part.source) for part in data.mixture.datasets)
    shares = dataset_stats(data.mixture, data.tokenize if data.reader else None, sample or largest)
    return [
        Stats(
            share,
            path,
            # A fraction of a data set differs between epochs, and so does its number of images.
            exact=share.num_measured == len(part.source) and share.samples % (len(part.source) or 1) == 0,
            has_tokens=data.reader is not None,
            licences=licences_of(path),
        )
        for share, part, path in zip(shares, data.mixture.datasets, data.paths, strict=True)
    ]


# --- printed output

_FIRST_IDS = 5
_FIRST_FILES = 10


def print_findings(found: Findings, unit: str) -> None:
    """Print the check result of one data set."""
    from vila.data.check import unread_note
    from vila.data.stats import histogram, min_median_max

    errors = f"{found.num_errors:,} with errors" if found.num_errors else "no errors"
    videos = f", {found.videos:,} distinct videos" if found.videos else ""
    typer.echo(f"{found.name}: {found.samples:,} samples, {errors}, {found.images:,} distinct images{videos}")
    for error in found.errors:
        typer.echo(f"  error: {error}")
    if found.num_errors > len(found.errors):
        typer.echo(f"  and {found.num_errors - len(found.errors):,} more errors")
    if found.num_missing:
        typer.echo(f"  missing files: {found.num_missing:,}")
        for name in found.missing:
            typer.echo(f"    {name}")
        if found.num_missing > len(found.missing):
            typer.echo(f"    and {found.num_missing - len(found.missing):,} more")
    if found.num_duplicates:
        some = ", ".join(repr(name) for name in found.duplicates[:_FIRST_IDS])
        typer.echo(f"  {found.num_duplicates:,} ids occur more than once{': ' if some else ''}{some}")
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


def print_stats(stats: Sequence[Stats]) -> None:
    """Print a table of all data sets and their licences."""
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
        typer.echo("give --model to count tokens")
    for one in stats:
        if not one.licences:
            typer.echo(f"{one.share.name}: unknown data set and licence")
        for licence in one.licences:
            read = "" if licence.checked else " (not verified at the source)"
            typer.echo(f"{one.share.name}: {licence.name}, {licence.source}")
            typer.echo(f"  licence: {licence.licence}{read}")
            typer.echo(f"  forbids: {licence.forbids}")


def print_indexed(path: str, indexed: Indexed) -> None:
    """Print the number of records and the paths of their indexes."""
    files = [*(("built", file) for file in indexed.built), *(("found", file) for file in indexed.found)]
    typer.echo(f"{path}: {indexed.records:,} records; indexes: {len(indexed.built)} built, {len(indexed.found)} found")
    for state, file in files[:_FIRST_FILES]:
        typer.echo(f"  {state}: {file}")
    if len(files) > _FIRST_FILES:
        typer.echo(f"  and {len(files) - _FIRST_FILES:,} more")


# --- indexes

_NAME_END = 200


@dataclass(frozen=True, slots=True)
class Indexed:
    """Number of records of a data set, and its index files: built now, or found from before."""

    records: int
    built: tuple[Path, ...]
    found: tuple[Path, ...]


def index_data(entry: DatasetEntry, events: Events = SILENT) -> Indexed:
    """Open a data set, which indexes its files without an index or with a stale one."""
    from vila.data.dataset import open_dataset

    before = _indexes(entry.path)
    records = len(open_dataset(entry, events))
    after = _indexes(entry.path)
    found = {file for file, state in after.items() if before.get(file) == state}
    return Indexed(records, tuple(sorted(after.keys() - found)), tuple(sorted(found)))


def _indexes(path: str) -> dict[Path, tuple[int, int]]:
    """Return the index files of a file, directory or pattern, with inode and modification time."""
    from vila.data.readers.index import index_folder, read_header

    # An index stores the last characters of the path of its file.
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
