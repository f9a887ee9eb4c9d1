"""The table of scores that `vila eval` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table

if TYPE_CHECKING:
    from vila.eval.runner import Result


def score_table(result: Result) -> Table:
    """Accuracy in all and by kind, beside the majority and the best blind guess."""
    table = Table(title=f"{result.benchmark}: accuracy", title_justify="left")
    for name in ("questions", "count", "accuracy", "majority answer", "best blind guess"):
        table.add_column(name, justify="left" if name == "questions" else "right")
    for kind, row in (*result.scores["by_type"].items(), ("all", result.scores)):
        style = "bold" if kind == "all" else ""
        cells = (f"{row[key]:.2%}" for key in ("accuracy", "majority", "blind"))
        table.add_row(kind, str(row["count"]), *cells, style=style)
    return table


def result_table(results: Sequence[Result]) -> RenderableType:
    """One benchmark by kind of question where it can be, several a line each."""
    from vila.eval.statistics import score_interval

    if len(results) == 1 and results[0].scored and "blind" in results[0].scored.figures:
        return score_table(results[0])
    table = Table(title="Scores", title_justify="left")
    for name in ("benchmark", "questions", "score", "95 %", "failed"):
        table.add_column(name, justify="left" if name == "benchmark" else "right")
    reasons = []
    for one in results:
        failed = f"{len(one.failed):,}" if one.failed else ""
        if one.scored is None:
            table.add_row(one.benchmark, f"{len(one.predictions):,}", "-", "", failed)
            reasons.append(f"{one.benchmark}: {one.problem}")
            continue
        sure = score_interval(one.scored)
        # A figure that is neither the mean mark nor says how it follows from the marks has no interval of its own.
        own = sure is not None and abs(sure.mean - one.scored.score) < 0.01
        bounds = f"{sure.low:,.1f} to {sure.high:,.1f}" if sure and own else ""
        score = f"{one.scored.score:,.2f} {one.scored.unit}"
        table.add_row(one.benchmark, f"{len(one.predictions):,}", score, bounds, failed)
    return Group(table, *reasons)
