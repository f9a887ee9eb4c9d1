"""`vila data ...`: bring data, check it, see it as the model does, and count it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vila.cli.data_prepare import app as prepare_app

if TYPE_CHECKING:
    from vila.cli.data_check import Findings

app = typer.Typer(help="Convert, check, look at and count training data.", no_args_is_help=True)
app.add_typer(prepare_app, name="prepare")

_Data = Annotated[str, typer.Argument(metavar="RECIPE|FILE", help="A recipe, or a data file or directory.")]
_Format = Annotated[str, typer.Option("--format", help="Format of FILE; default: messages.", show_default=False)]
_ImageRoot = Annotated[
    str, typer.Option(help="Where relative picture paths start; default: beside FILE.", show_default=False)
]
_Template = Annotated[str, typer.Option(help="Conversation template, where it is not the recipe's or model's.")]
_Model = Annotated[str, typer.Option(help="Model whose tokenizer counts; default: the recipe's, if it is here.")]


@app.command("from-csv")
def from_csv(
    table: Annotated[Path, typer.Argument(help="CSV with the columns image, question, answer, or image, caption.")],
    images: Annotated[Path, typer.Option(help="Folder that the pictures lie in.")],
    out: Annotated[Path, typer.Option(help="JSON lines to write, format messages.")],
) -> None:
    """Turn a table of pictures, questions and answers into training data."""
    from vila.cli.data_csv import convert_csv

    typer.echo(f"{out}: {convert_csv(table, images, out):,} samples")


@app.command()
def check(
    data: _Data,
    form: _Format = "",
    image_root: _ImageRoot = "",
    sample: Annotated[int, typer.Option(help="Look at this many samples of each data set; 0: all.", min=0)] = 0,
    template: _Template = "",
    model: _Model = "",
    max_shown: Annotated[int, typer.Option(help="Faults of each data set to print; all are counted.", min=0)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Read all samples and pictures of [bold]RECIPE|FILE[/bold] and say what is wrong; exit status 1 if anything is."""
    import json

    from vila.cli.data_check import check_data
    from vila.cli.data_sets import open_data
    from vila.cli.progress import Screen

    opened = open_data(data, form=form, image_root=image_root, template=template, model=model)
    with Screen() as screen:
        found = check_data(opened, sample=sample, max_shown=max_shown, events=screen)
    if as_json:
        facts = {"unit": opened.unit, "template": opened.template, "data_sets": [one.as_json() for one in found]}
        typer.echo(json.dumps(facts, indent=1))
    else:
        for one in found:
            _print_findings(one, opened.unit)
    if any(one.fault_count for one in found):
        raise typer.Exit(1)


@app.command()
def inspect(
    data: _Data,
    number: Annotated[int, typer.Option("--index", help="Which sample, from 0.", min=0)] = 0,
    count: Annotated[int, typer.Option(help="How many from there on.", min=1)] = 1,
    form: _Format = "",
    image_root: _ImageRoot = "",
    template: _Template = "",
    model: _Model = "",
    html: Annotated[Path | None, typer.Option(help="Also write a page with the pictures.", show_default=False)] = None,
) -> None:
    """Show samples as the model sees them: what it learns in green, between angle quotes; the rest it is given."""
    from rich.console import Console

    from vila.cli.data_inspect import as_card, as_terminal_text, runs_of
    from vila.cli.data_sets import open_data
    from vila.core.errors import ConfigError
    from vila.report.page import Page

    opened = open_data(data, form=form, image_root=image_root, template=template, model=model)
    every = ((part, at) for part in opened.mixture.parts for at in range(len(part.source)))
    places = list(islice(every, number, number + count))
    if not places:
        total = sum(len(part.source) for part in opened.mixture.parts)
        raise ConfigError(f"--index {number}: {data} has {total:,} samples, counted from 0")
    page = Page(f"Samples of {data}", f"template {opened.template}")
    cards = []
    for part, at in places:
        tokens = opened.tokenise(part, part.source[at])
        runs = runs_of(tokens, opened.tokenizer)
        typer.echo(f"{part.name} sample {tokens.id}: {len(tokens):,} tokens")
        Console(highlight=False).print(as_terminal_text(runs), soft_wrap=True)
        if html:
            cards.append(as_card(tokens, runs))
    if html:
        page.gallery(cards).save(html)


@app.command()
def stats(recipe: _Data, model: _Model = "", sample: Annotated[int, typer.Option(min=1)] = 64) -> None:
    """Estimate the tokens, pictures and share of each data set in one epoch of [bold]RECIPE[/bold]."""
    from rich.console import Console
    from rich.table import Table

    from vila.cli.data_sets import open_data
    from vila.data.survey import survey

    opened = open_data(recipe, form="", image_root="", template="", model=model)
    table = Table("data set", "samples", "tokens", "images", "share of tokens")
    for one in survey(opened.mixture, opened.tokenise, sample):
        table.add_row(one.name, f"{one.samples:,}", f"{one.tokens:,}", f"{one.images:,}", f"{one.token_share:.1%}")
    Console().print(table)


@app.command()
def index(
    path: Annotated[Path, typer.Argument(help="A data file or directory.")],
    form: _Format = "messages",
) -> None:
    """Find the places of all records of [bold]PATH[/bold], which opening it does otherwise."""
    from vila.cli.progress import Screen
    from vila.data.formats.protocol import FORMATS

    with Screen() as screen:
        source = FORMATS[form].open(path, path if path.is_dir() else path.parent, screen)
    typer.echo(f"{path}: {len(source):,} records")


def _print_findings(found: Findings, unit: str) -> None:
    from vila.cli.data_check import histogram, spread

    faulty = f"{found.fault_count:,} with faults" if found.fault_count else "no faults"
    typer.echo(f"{found.name}: {found.samples:,} samples, {faulty}, {len(found.sizes):,} distinct images")
    for fault in found.faults:
        typer.echo(f"  fault: {fault}")
    if found.fault_count > len(found.faults):
        typer.echo(f"  and {found.fault_count - len(found.faults):,} more faults")
    if found.duplicates:
        some = ", ".join(repr(name) for name in list(found.duplicates)[:5])
        typer.echo(f"  {len(found.duplicates):,} ids come more than once: {some}")
    if found.sizes:
        for side, values in (("widths", [w for w, _ in found.sizes]), ("heights", [h for _, h in found.sizes])):
            typer.echo("  {}: {} to {} pixels, median {}".format(side, *(spread(values)[i] for i in (0, 2, 1))))
    if found.lengths:
        low, middle, high = spread(found.lengths)
        typer.echo(f"  {unit}: {low:,} to {high:,}, median {middle:,}; {found.supervised_share:.1%} supervised")
        counts = histogram(found.lengths)
        for bound, count in counts.items():
            bar = "#" * max(1, round(40 * count / max(counts.values())))
            typer.echo(f"  {'up to ' + bound if bound != 'more' else 'longer':>11}  {bar} {count:,}")
