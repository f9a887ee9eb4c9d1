"""Two runs side by side: paired differences on the questions of both, and which answers changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.files import write_json, write_text
from vila.eval.benchmark import Mark
from vila.eval.predictions import MERGED
from vila.eval.published import title_of
from vila.eval.report_data import (
    RunFolder,
    Shown,
    questions_from,
    read_marks,
    read_run,
    read_scores,
    shorten,
    show,
    spread,
)
from vila.eval.report_tables import Table, bullets, cell, markdown_table, plain, write_chance, write_signed
from vila.eval.stats import Comparison, compare
from vila.report.html import Card, Cell, Figure, Page
from vila.report.plots import Group, bar_plot

_CHANGES_SHOWN = 6
"""Of each kind: answers that became better, and answers that became worse."""
SURE = 0.05
"""Largest p of a difference that is counted as one."""


@dataclass(frozen=True)
class Change:
    """One question and its two marks; `shown` has the second."""

    before: Mark
    shown: Shown


@dataclass(frozen=True)
class Pair:
    """One benchmark of both runs. scores: the headlines. changes: better ones, then worse ones, a fixed sample."""

    name: str
    scores: tuple[float | None, float | None]
    unit: str
    found: Comparison
    changes: tuple[Change, ...]
    remark: str


def compare_runs(first: Path, second: Path, out: Path) -> list[Path]:
    """Write compare.html, compare.md and compare.json into `out`: the second run against the first.

    first, second: directories that `vila eval` wrote. Benchmarks are paired by name, questions by id. A difference is
    that of mean marks in points of a hundred, which for some benchmarks is not the difference of the headlines.
    Raises DataError when a directory is no run, or when nothing can be compared.
    """
    runs = read_run(first), read_run(second)
    pairs: list[Pair] = []
    left_out: list[tuple[str, str]] = []
    for name in dict.fromkeys([*runs[0].folders, *runs[1].folders]):
        try:
            pairs.append(_pair(name, *runs))
        except DataError as error:
            left_out.append((title_of(name), str(error)))
    if not pairs:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out)
        raise DataError(f"{first} and {second}: nothing to compare ({reasons or 'no benchmarks'})")
    names = _names(*runs)
    paths = [out / f"compare.{kind}" for kind in ("html", "md", "json")]
    _page(names, runs, pairs, left_out).save(paths[0])
    write_text(paths[1], _markdown(names, pairs, left_out))
    write_json(paths[2], _json(runs, pairs, left_out))
    return paths


def _pair(name: str, first: RunFolder, second: RunFolder) -> Pair:
    for run in (first, second):
        if name not in run.folders:
            raise DataError(f"not in the run {run.path}")
    folders = first.folders[name], second.folders[name]
    scores = [_scores(folder / "scores.json") for folder in folders]
    if scores[0]["rules"] != scores[1]["rules"]:
        raise DataError(f"scored by other rules: {scores[0]['rules']} and {scores[1]['rules']}")
    before, after = (read_marks(folder / "marks.jsonl") for folder in folders)
    known = {mark.id: mark for mark in before}
    common = [mark for mark in after if mark.id in known]
    lost = len(before) + len(after) - 2 * len(common)
    return Pair(
        name,
        (scores[0]["score"], scores[1]["score"]),
        scores[1]["unit"],
        compare(before, after),
        tuple(_changes(name, known, common, folders[1], second.data)),
        f"{lost:,} questions were scored in one of the runs only and do not count" if lost else "",
    )


def _changes(name: str, known: dict[str, Mark], common: Sequence[Mark], folder: Path, data: str) -> list[Change]:
    better = [mark for mark in common if mark.value > known[mark.id].value]
    worse = [mark for mark in common if mark.value < known[mark.id].value]
    chosen = [mark for marks in (better, worse) for mark in spread(marks, name, _CHANGES_SHOWN)]
    shown = show(chosen, folder / MERGED, lambda: questions_from(name, data))
    return [Change(known[one.mark.id], one) for one in shown]


def _scores(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path.parent}: not finished: no scores.json")
    scores = read_scores(path)
    if scores.get("score") is None:
        raise DataError(f"{path.parent}: {scores.get('problem') or 'no score'}")
    return scores


def _names(first: RunFolder, second: RunFolder) -> tuple[str, str]:
    """What to call the runs: their models, or their folders where the models have one name."""
    models = first.short_model, second.short_model
    if models[0] != models[1]:
        return models
    folders = first.path.resolve().name, second.path.resolve().name
    return folders if folders[0] != folders[1] else (str(first.path), str(second.path))


def _page(
    names: tuple[str, str], runs: tuple[RunFolder, RunFolder], pairs: Sequence[Pair], left_out: list[tuple[str, str]]
) -> Page:
    page = Page(
        f"{names[1]} against {names[0]}",
        "Paired by question. Above zero the second run is the better one.",
        f"First run: {runs[0].path}. Second run: {runs[1].path}. This file is complete in itself and loads nothing.",
    )
    sure = [pair for pair in pairs if pair.found.p <= SURE]
    up = sum(pair.found.difference > 0 for pair in sure)
    page.figures(
        {
            "benchmarks better": Figure(up, f"of {len(pairs)}, with p at most {SURE}"),
            "benchmarks worse": Figure(len(sure) - up, f"of {len(pairs)}, with p at most {SURE}"),
            "questions": Figure(sum(pair.found.questions for pair in pairs), "asked of both"),
        }
    )
    page.section(
        "Differences",
        "Of mean marks, in points of a hundred, with 95 % intervals over pictures. p: how often chance alone gives as "
        "large a difference, for one benchmark; among twenty, one falls below 0.05 by chance.",
    )
    groups = [
        Group(
            title_of(pair.name),
            {"difference": pair.found.difference},
            {"difference": (pair.found.low, pair.found.high)},
        )
        for pair in pairs
    ]
    page.plot(bar_plot(groups, title="Second run minus first, in points of a hundred", write=write_signed))
    table = _table(names, pairs)
    page.table(table.header, table.rows)
    if remarks := _remarks(pairs, left_out):
        page.text("To mind:").table((), remarks)
    for pair in pairs:
        if not pair.changes:
            continue
        page.section(title_of(pair.name), f"Better: {pair.found.better:,} answers. Worse: {pair.found.worse:,}.")
        page.gallery(
            [_card(names, change) for change in pair.changes],
            "A fixed sample: answers that became better, then answers that became worse.",
            photos=True,
        )
    return page


def _card(names: tuple[str, str], change: Change) -> Card:
    before, after = change.before, change.shown.mark
    lines = [
        ("", change.shown.question or after.id),
        (names[0], shorten(before.answer) or "(empty)"),
        (names[1], shorten(after.answer) or "(empty)"),
        ("truth", shorten(after.truth)),
        ("points", f"{before.value:.2f} to {after.value:.2f}" if {before.value, after.value} - {0, 1} else ""),
        ("picture", "" if change.shown.picture else change.shown.no_picture),
    ]
    better = after.value > before.value
    kept = [(label, text) for label, text in lines if text]
    return Card(change.shown.picture, kept, better, verdict="better" if better else "worse")


def _table(names: tuple[str, str], pairs: Sequence[Pair]) -> Table:
    rows: list[list[Cell]] = [
        [
            f"{title_of(pair.name)} ({pair.unit})",
            *(None if score is None else f"{score:,.2f}" for score in pair.scores),
            write_signed(pair.found.difference),
            f"{write_signed(pair.found.low)} to {write_signed(pair.found.high)}",
            write_chance(pair.found.p),
            pair.found.better,
            pair.found.worse,
            pair.found.questions,
        ]
        for pair in pairs
    ]
    return Table(["benchmark", *names, "difference", "95 % interval", "p", "better", "worse", "questions"], rows)


def _remarks(pairs: Sequence[Pair], left_out: list[tuple[str, str]]) -> list[tuple[str, str]]:
    remarks = [(title_of(pair.name), pair.remark) for pair in pairs if pair.remark]
    return [*remarks, *((name, f"not compared: {why}") for name, why in left_out)]


def _markdown(names: tuple[str, str], pairs: Sequence[Pair], left_out: list[tuple[str, str]]) -> str:
    parts = [
        f"# {cell(names[1])} against {cell(names[0])}",
        markdown_table(_table(names, pairs)),
        "Difference of mean marks in points of a hundred, second run minus first, on the questions of both.",
        *bullets("To mind:", _remarks(pairs, left_out)),
    ]
    return "\n\n".join(parts) + "\n"


def _json(runs: tuple[RunFolder, RunFolder], pairs: Sequence[Pair], left_out: list[tuple[str, str]]) -> Any:
    return plain(
        {
            "first": str(runs[0].path),
            "second": str(runs[1].path),
            "benchmarks": {
                pair.name: {
                    "scores": pair.scores,
                    "unit": pair.unit,
                    **pair.found.as_json(),
                    "remark": pair.remark,
                    "changes": [_change(change) for change in pair.changes],
                }
                for pair in pairs
            },
            "not_compared": dict(left_out),
        }
    )


def _change(change: Change) -> dict[str, Any]:
    mark = change.shown.mark
    return {
        "id": mark.id,
        "question": change.shown.question,
        "first": change.before.answer,
        "second": mark.answer,
        "truth": mark.truth,
        "values": [change.before.value, mark.value],
    }
