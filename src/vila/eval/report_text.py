"""A report as Markdown and as plain data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vila.eval.published import published_table
from vila.eval.report_digest import Digest, RunFolder
from vila.eval.report_sample import Shown
from vila.eval.report_shots import SENSE, curves_of, shots_table
from vila.eval.report_tables import (
    Table,
    before_comparing,
    counted,
    other_table,
    published_rows,
    run_facts,
    speed_table,
    without_score,
    write_headline,
)
from vila.report.page import Cell, write_cell


def as_markdown(run: RunFolder, digests: Sequence[Digest]) -> str:
    """Tables, notes and failures; pictures are in the HTML page alone."""
    parts = [f"# Evaluation of {cell(run.short_model)}"]
    if table := published_rows(run, digests):
        parts += ["## Beside the published models", markdown_table(table), f"Published: {published_table().source}."]
        parts += bullets("Before comparing:", before_comparing(digests))
    if table := other_table(digests):
        parts += ["## Other benchmarks", markdown_table(table)]
    parts += bullets("Without a score:", without_score(run, digests))
    for curves in curves_of(digests):
        parts += [f"## {cell(curves.title)}", SENSE, markdown_table(shots_table(run, curves))]
    for each in digests:
        parts += _benchmark(each)
    if table := speed_table(digests):
        parts += ["## Speed", markdown_table(table)]
    return "\n\n".join([*parts, "## The run", *bullets("", run_facts(run))]) + "\n"


def _benchmark(each: Digest) -> list[str]:
    if each.score is None and not each.failed:
        return []
    parts = [f"## {cell(each.title)}", cell(write_headline(each))]
    if each.kinds:
        rows: list[list[Cell]] = [
            [kind.name, kind.questions, f"{kind.mean:.1f}", f"{kind.low:.1f} to {kind.high:.1f}"] for kind in each.kinds
        ]
        parts.append(markdown_table(Table(["kind", "questions", "points won (%)", "95 % interval"], rows)))
    parts += bullets("Notes:", [("", note) for note in each.notes])
    parts += bullets(f"{counted(each.failed)} could not be asked, the first of them:", each.failures)
    return parts


def as_json(run: RunFolder, digests: Sequence[Digest]) -> dict[str, Any]:
    """Everything the page shows but its pictures; numbers that are not finite are null."""
    table = published_table()
    return plain(
        {
            "run": run.facts,
            "published": {
                "source": table.source,
                "scores": {name: known.scores for name, known in table.benchmarks.items()},
            },
            "not_run": [name for name in table.benchmarks if name not in run.folders],
            "before_comparing": dict(before_comparing(digests)),
            "benchmarks": {each.name: _as_json(each) for each in digests},
        }
    )


def _as_json(each: Digest) -> dict[str, Any]:
    shallow = {name: getattr(each, name) for name in each.__dataclass_fields__}
    return {
        **shallow,
        "interval_is_of_score": each.interval_is_of_score,
        "kinds": [asdict(kind) for kind in each.kinds],
        "speed": asdict(each.speed) if each.speed else None,
        "sample": [_shown(one) for one in each.sample],
    }


def _shown(one: Shown) -> dict[str, Any]:
    return {"question": one.question, **asdict(one.mark)}


def plain(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown_table(table: Table) -> str:
    """A table; cells that are numbers are written as the page writes them."""
    lines = [table.header, ["---"] * len(table.header), *([write_cell(one) for one in row] for row in table.rows)]
    text = "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)
    return f"{text}\n\n{table.caption}" if table.caption else text


def bullets(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    """A list under a line of its own; nothing for no rows."""
    lines = [f"- {cell(name)}: {cell(text)}" if name else f"- {cell(text)}" for name, text in rows]
    return [part for part in (title, "\n".join(lines)) if part] if lines else []


def cell(text: str) -> str:
    """Text on one line that no Markdown reader takes for markup or for the end of a cell."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)
