"""`report.html`, `report.md` and `report.json` of a run: its scores beside the published ones, and what is behind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from vila.core.files import write_json, write_text
from vila.eval.benchmark import Benchmark, Item
from vila.eval.compare import compare_runs
from vila.eval.published import published_table
from vila.eval.report_data import Digest, RunFolder, Shown, digest, questions_from, read_run, shorten
from vila.eval.report_tables import (
    Table,
    add_shots,
    as_json,
    as_markdown,
    before_comparing,
    counted,
    flat,
    other_table,
    published_rows,
    run_facts,
    speed_table,
    without_score,
    write_headline,
    write_interval,
    write_score,
)
from vila.report.html import Card, Figure, Page
from vila.report.numbers import write_seconds
from vila.report.plots import Group, bar_plot

__all__ = ["compare_runs", "write_report"]

_RULES = {
    "upstream": "Scored by the rules that the published table was made with.",
    "lmms-eval": "Scored by lmms-eval's rules.",
}
_FIGURES_SHOWN = 80
_LONGEST_VALUE = 200


def write_report(folder: Path, opened: Mapping[str, Benchmark] | None = None) -> list[Path]:
    """Write the three files into a run's folder, each whole or not at all, and return their paths.

    folder: as `vila eval` leaves it, finished or not.
    opened: benchmarks by name, whose pictures are shown; others are opened where the run says that its data are.
    The page loads nothing and is bounded, whatever the benchmarks' sizes. Pictures that cannot be shown are left out,
    and it is said why. Raises DataError when `folder` is no run, or a file in it is not what the runner writes.
    """
    run = read_run(folder)
    given = opened or {}

    def items(name: str) -> Sequence[Item]:
        return given[name].items() if name in given else questions_from(name, run.data)

    digests = [digest(name, where, partial(items, name)) for name, where in run.folders.items()]
    paths = [folder / f"report.{kind}" for kind in ("html", "md", "json")]
    _page(run, digests).save(paths[0])
    write_text(paths[1], as_markdown(run, digests))
    write_json(paths[2], as_json(run, digests))
    return paths


def _page(run: RunFolder, digests: Sequence[Digest]) -> Page:
    page = Page(
        f"Evaluation of {run.short_model}",
        " ".join(_RULES[rules] for rules in sorted({each.rules for each in digests if each.rules})),
        "This file is complete in itself and loads nothing. Its figures are in report.json, every answer in "
        "BENCHMARK/predictions.jsonl, every mark in BENCHMARK/marks.jsonl.",
    )
    _headline(page, digests)
    _published(page, run, digests)
    _others(page, run, digests)
    add_shots(page, run, digests)
    for each in digests:
        _benchmark(page, each)
    _speed(page, digests)
    page.section("The run").table((), run_facts(run))
    return page


def _headline(page: Page, digests: Sequence[Digest]) -> None:
    scored = [each for each in digests if each.score is not None]
    failed = sum(each.failed for each in digests)
    tiles: dict[str, Figure] = {}
    if len(scored) == 1:
        tiles[scored[0].title] = Figure(write_score(scored[0]), f"95 % interval {write_interval(scored[0])}")
    else:
        tiles["benchmarks scored"] = Figure(len(scored), f"of {len(digests)} in this run")
    tiles["questions"] = Figure(sum(each.asked for each in digests), f"{failed:,} of them could not be asked")
    if seconds := sum(each.speed.seconds for each in digests if each.speed):
        tiles["time"] = Figure(write_seconds(seconds), "reading pictures and answering")
    page.figures(tiles)


def _published(page: Page, run: RunFolder, digests: Sequence[Digest]) -> None:
    table = published_table()
    rows = published_rows(run, digests)
    if rows is None:
        return
    page.section(
        "Beside the published models",
        f"Published: {table.source}. Intervals are of this model's score: 95 of 100 draws of pictures lie in them.",
    )
    _add(page, rows)
    _pairs(page, "Before comparing", before_comparing(digests))
    _pairs(page, "Without a score", without_score(run, digests))


def _others(page: Page, run: RunFolder, digests: Sequence[Digest]) -> None:
    rows = other_table(digests)
    if rows is None:
        return
    page.section("Other benchmarks", "They have no published figures of VILA to stand beside.")
    _add(page, rows)
    if published_rows(run, digests) is None:
        _pairs(page, "Without a score", without_score(run, digests))


def _benchmark(page: Page, each: Digest) -> None:
    if each.score is None and not each.failed:
        return
    known = published_table().benchmarks.get(each.name)
    page.section(each.title, f"The published figure is {known.figure}." if known else "")
    page.text(write_headline(each))
    if each.kinds:
        groups = [
            Group(f"{kind.name} ({kind.questions:,})", {"score": kind.mean}, {"score": (kind.low, kind.high)})
            for kind in each.kinds
        ]
        page.plot(
            bar_plot(groups, title="Points won, by kind of question", write=_percent, full=100.0),
            "Mean mark with its 95 % interval, drawn over pictures; in brackets the number of questions.",
        )
    for note in each.notes:
        page.text(f"Note: {note}")
    if each.failed:
        more = "" if each.failed == len(each.failures) else f", the first {len(each.failures)}"
        page.table(["question", "error"], each.failures, f"{counted(each.failed)} could not be asked{more}.")
    _gallery(page, each)
    if each.figures:
        rows = flat(each.figures)
        inner = page.details("All figures")
        inner.table((), [(name, shorten(str(value), _LONGEST_VALUE)) for name, value in rows[:_FIGURES_SHOWN]])
        if len(rows) > _FIGURES_SHOWN:
            inner.text(f"{len(rows) - _FIGURES_SHOWN} more are in report.json.")


def _gallery(page: Page, each: Digest) -> None:
    if not each.sample:
        return
    page.gallery(
        [card(one) for one in each.sample],
        f"{len(each.sample)} of {each.wrong:,} answers that won less than half of their points, chosen by a hash of "
        "their ids, so that another run shows the same questions where it fails on them too.",
        photos=True,
    )


def card(one: Shown) -> Card:
    """A wrong answer with everything that decided its mark."""
    lines = [
        ("", one.question or one.mark.id),
        ("answer", shorten(one.mark.answer) or "(empty)"),
        ("truth", shorten(one.mark.truth)),
        ("rule", one.mark.rule),
        ("points", f"{one.mark.value:.2f}" if one.mark.value else ""),
        ("kind", one.mark.kind),
        ("picture", "" if one.picture else one.no_picture),
    ]
    return Card(one.picture, [(label, text) for label, text in lines if text], good=False)


def _speed(page: Page, digests: Sequence[Digest]) -> None:
    rows = speed_table(digests)
    if rows is not None:
        page.section("Speed", "Questions answered, pictures read and transformed within the same time.")
        _add(page, rows)


def _add(page: Page, table: Table) -> None:
    page.table(table.header, table.rows, table.caption)


def _pairs(page: Page, caption: str, rows: Sequence[tuple[str, str]]) -> None:
    if rows:
        page.text(f"{caption}:").table((), rows)


def _percent(value: float) -> str:
    return f"{value:.1f}\N{NO-BREAK SPACE}%" if math.isfinite(value) else ""
