"""`vila compare`: paired comparison of two runs of `vila eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vila.cli import options


def compare(
    first: Annotated[Path, typer.Argument(help="Output directory of vila eval: the baseline.")],
    second: Annotated[
        Path, typer.Argument(help="Output directory of vila eval: the run to compare with the baseline.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Output directory of the report. Default: compare/ in SECOND.",
            callback=options.output_directory,
        ),
    ] = None,
    fail_on_regression: Annotated[
        bool,
        typer.Option("--fail-on-regression", help="Exit with code 1 if a benchmark is worse with p <= 0.05."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the content of compare.json.")] = False,
) -> None:
    """Test whether [bold]SECOND[/bold] is better than [bold]FIRST[/bold] on their common questions."""
    import json

    from rich.console import Console

    from vila.core.files import check_writable
    from vila.core.reading import read_json
    from vila.eval.compare import SIGNIFICANCE_LEVEL, compare_runs

    target = out or second / "compare"
    check_writable(target, field="--output")
    paths = compare_runs(first, second, target)
    found: dict[str, Any] = read_json(next(path for path in paths if path.suffix == ".json"))
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        console.print(_table(found["benchmarks"]))
        console.print("change: mean score in percentage points; better, worse: numbers of questions.")
        for name, why in found["not_compared"].items():
            console.print(f"{name}: not compared: {why}", markup=False)
        console.print(str(paths[0]), markup=False, soft_wrap=True)
    worse = [
        name for name, row in found["benchmarks"].items() if row["difference"] < 0 and row["p"] <= SIGNIFICANCE_LEVEL
    ]
    if fail_on_regression and worse:
        typer.echo(f"worse: {', '.join(worse)}", err=True)
        raise typer.Exit(1)


def _table(rows: dict[str, Any]) -> Any:
    """Return a table with one line per benchmark; significant differences are bold."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from vila.eval.compare import SIGNIFICANCE_LEVEL
    from vila.eval.report_tables import format_p_value, format_signed

    # Column lines would exceed 80 characters.
    table = Table(title="Second run against the first", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("benchmark", overflow="fold")
    for name in ("first", "second", "change", "95 %", "p", "better", "worse"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            name,
            *("-" if score is None else f"{score:,.2f}" for score in row["scores"]),
            format_signed(row["difference"]),
            f"{format_signed(row['low'])} to {format_signed(row['high'])}",
            format_p_value(row["p"]),
            *(f"{row[key]:,.0f}" for key in ("better", "worse")),
            style="bold" if row["p"] <= SIGNIFICANCE_LEVEL else "",
        )
    return table
