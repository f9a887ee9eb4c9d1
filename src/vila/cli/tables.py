"""Tables that commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
