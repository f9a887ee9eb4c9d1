"""`vila quickstart`: train a small visual language model in three stages, evaluate it and print the results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vila.cli import options

if TYPE_CHECKING:
    from rich.console import Console


def quickstart(
    parts: Annotated[
        list[str] | None, typer.Argument(help="Other base models: starter.llm=ID_OR_DIR starter.vision=ID_OR_DIR")
    ] = None,
    out: Annotated[
        Path, typer.Option("--output", "-o", help="Output directory.", callback=options.output_directory)
    ] = Path("runs/starter"),
    minutes: Annotated[
        float,
        typer.Option(help="Approximate training time in minutes on two CPU cores; less time means lower accuracy."),
    ] = 7.0,
    eval_limit: Annotated[int, typer.Option(help="Approximate number of test questions; 0 uses all 9,673.")] = 0,
    seed: Annotated[int, typer.Option(help="Random seed of initialization and data order.")] = 0,
) -> None:
    """Train and evaluate a small visual language model, starting from an open LLM and vision tower.

    Resumes after an interruption.
    """
    from rich.console import Console

    from vila.cli.progress import Screen
    from vila.starter.quickstart import Quickstart, QuickstartOptions

    asked = QuickstartOptions(out=out, minutes=minutes, questions=eval_limit, seed=seed, **_parts(parts or []))
    with Screen() as screen:
        result = Quickstart(asked, screen).run()
    _show(Console(highlight=False), result, asked.out)


def _parts(overrides: list[str]) -> dict[str, Any]:
    from vila.core.errors import ConfigError

    found = {}
    for item in overrides:
        key, _, value = item.partition("=")
        if key not in ("starter.llm", "starter.vision") or not value:
            expected = "starter.llm=ID_OR_DIR or starter.vision=ID_OR_DIR"
            raise ConfigError(field="PARTS", value=item, expected=expected)
        found[key.removeprefix("starter.")] = value
    return found


def _show(console: Console, result: dict[str, Any], out: Path) -> None:
    from rich.table import Table

    table = Table(title=f"easy-VQA, {result['questions']:,} test questions", title_justify="left")
    for column in ("question", "count", "accuracy", "best blind guess"):
        table.add_column(column, justify="left" if column == "question" else "right")
    for kind, row in result["accuracy_by_type"].items():
        table.add_row(kind, f"{row['count']:,}", f"{row['accuracy']:.2%}", f"{row['blind']:.2%}")
    table.add_row(
        "all", f"{result['questions']:,}", f"{result['accuracy']:.2%}", f"{result['blind_accuracy']:.2%}", style="bold"
    )
    console.print(table)
    console.print(f"accuracy with swapped images: {result['swapped_accuracy']:.2%}")
    for example in result["examples"][:3]:
        console.print(
            f"{example['image']}\n  {example['question']} [bold]{example['answer']}[/bold] (truth: {example['truth']})"
        )
    few = result["few_shot"]
    console.print("two-shot prompt:")
    for line in few["prompt"].splitlines():
        console.print(f"  {line}", markup=False)
    console.print(f"  [bold]{few['answer']}[/bold] (truth: {few['truth']})")
    console.print(
        f"\nmodel   {out / 'model'}\nreport  {out / 'report.html'}\nfigures {out / 'report.json'}\n", markup=False
    )
    for purpose, command in result["commands"].items():
        console.print(f"{purpose}:\n  [cyan]{command}[/cyan]")
