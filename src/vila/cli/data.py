"""`vila data ...`: convert training data, check it, show it as the model sees it, and count it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from vila.cli.data_prepare import app as prepare_app
from vila.cli.options import output_directory, output_file

app = typer.Typer(help="Convert, check, show and count training data.", no_args_is_help=True)
app.add_typer(prepare_app, name="prepare")

_VIEWS = 8

_Data = Annotated[str, typer.Argument(metavar="RECIPE|FILE", help="A recipe, or a data file or directory.")]
_Format = Annotated[str, typer.Option("--format", help="Format of FILE; default: messages.", show_default=False)]
_ImageRoot = Annotated[
    str,
    typer.Option(help="Directory that relative image paths start from; default: that of FILE.", show_default=False),
]
_Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="Option of the format. May be given several times."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_Template = Annotated[str, typer.Option(help="Conversation template; default: the recipe's or the model's.")]
_Model = Annotated[str, typer.Option(help="Model to measure with; default: the recipe's, if it is here.")]


@app.command("from-csv")
def from_csv(
    table: Annotated[Path, typer.Argument(help="CSV with the columns image, question, answer, or image, caption.")],
    images: Annotated[Path, typer.Option(help="Directory of the images.")],
    out: Annotated[Path, typer.Option(help="JSON lines to write, format messages.", callback=output_file)],
) -> None:
    """Turn a table of images, questions and answers into training data, and print the commands that come next."""
    from vila.cli.data_csv import convert_csv

    written = convert_csv(table, images, out)
    typer.echo(f"{out}: {written.samples:,} samples")
    if written.linked:
        typer.echo(
            f"the images were linked, or copied, into {written.linked}, to lie below the directory of {out.name}"
        )
    typer.echo("\nnext:")
    for command in written.next_commands():
        typer.echo(f"  {command}")


@app.command()
def check(
    data: _Data,
    form: _Format = "",
    image_root: _ImageRoot = "",
    options: _Options = None,
    sample: Annotated[int, typer.Option(help="Samples of each data set to check; 0: all.", min=0)] = 0,
    template: _Template = "",
    model: _Model = "",
    max_shown: Annotated[int, typer.Option(help="Faults and missing files to list; all are counted.", min=0)] = 10,
    views: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also save up to 8 images of each data set as the vision tower sees them, PNG.",
            show_default=False,
            callback=output_directory,
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Read all samples and images of [bold]RECIPE|FILE[/bold] and list what is wrong; exit status 1 if anything is."""
    from vila.cli.data_check import check_data
    from vila.cli.data_sets import open_data
    from vila.cli.data_shown import print_findings
    from vila.cli.progress import Screen

    with Screen() as screen:
        opened = open_data(
            data, form=form, image_root=image_root, options=options or (), template=template, model=model, events=screen
        )
        saved = opened.save_views(views, _VIEWS) if views else []
        found = check_data(opened, sample=sample, max_shown=max_shown, events=screen)
    if as_json:
        _print_json({"unit": opened.unit, "template": opened.template, "data_sets": [one.as_json() for one in found]})
    else:
        for one in found:
            print_findings(one, opened.unit)
        if views:
            typer.echo(f"{views}: {len(saved)} images as the tower sees them")
    opened.require_images()
    if any(one.fault_count for one in found):
        raise typer.Exit(1)


@app.command()
def inspect(
    data: _Data,
    number: Annotated[int, typer.Option("--index", help="Number of the first sample, from 0.", min=0)] = 0,
    count: Annotated[int, typer.Option(help="Number of samples.", min=1)] = 1,
    form: _Format = "",
    image_root: _ImageRoot = "",
    options: _Options = None,
    template: _Template = "",
    model: _Model = "",
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page with the images.", show_default=False, callback=output_file),
    ] = None,
) -> None:
    """Show samples as the model sees them, the supervised text in green and between angle quotes."""
    from rich.console import Console

    from vila.cli.data_inspect import as_card, as_terminal_text, runs_of
    from vila.cli.data_sets import open_data
    from vila.cli.progress import Screen
    from vila.core.errors import ConfigError
    from vila.report.page import Page

    with Screen() as screen:
        opened = open_data(
            data, form=form, image_root=image_root, options=options or (), template=template, model=model, events=screen
        )
    every = ((part, at) for part in opened.mixture.parts for at in range(len(part.source)))
    places = list(islice(every, number, number + count))
    if not places:
        total = sum(len(part.source) for part in opened.mixture.parts)
        raise ConfigError(f"{data} has {total:,} samples, counted from 0", field="--index", value=number)
    page = Page(f"Samples of {data}", f"template {opened.template}")
    cards = []
    for part, at in places:
        tokens = opened.tokenise(part, part.source[at])
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
    sample: Annotated[int, typer.Option(help="Samples of each data set to estimate from; 0: all.", min=0)] = 64,
    as_json: _Json = False,
) -> None:
    """Print samples, images, tokens and licence of each data set in one epoch of [bold]RECIPE|FILE[/bold]."""
    from vila.cli.data_sets import open_data
    from vila.cli.data_shown import print_stats
    from vila.cli.data_stats import stats_of
    from vila.cli.progress import Screen

    with Screen() as screen:
        opened = open_data(data, form=form, image_root=image_root, options=options or (), model=model, events=screen)
    found = stats_of(opened, sample)
    if as_json:
        _print_json({"data_sets": [one.as_json() for one in found]})
    else:
        print_stats(found)


@app.command()
def index(
    path: Annotated[str, typer.Argument(metavar="FILE", help="A data file, a directory of shards, or a pattern.")],
    form: _Format = "messages",
    image_root: _ImageRoot = "",
    options: _Options = None,
) -> None:
    """Index the records of [bold]FILE[/bold] ahead of its first use, and print the location of the index."""
    from vila.cli.data_index import index_data
    from vila.cli.data_sets import parse_options
    from vila.cli.data_shown import print_indexed
    from vila.cli.progress import Screen
    from vila.data.loader import Entry

    entry = Entry(format=form, path=path, image_root=image_root, options=parse_options(options or ()))
    with Screen() as screen:
        indexed = index_data(entry, screen)
    print_indexed(path, indexed)


def _print_json(facts: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(facts, indent=1))
