"""Compare two evaluation runs: paired differences per benchmark and samples of the answers that changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.files import write_json, write_text
from vila.eval.benchmark import QuestionScore
from vila.eval.predictions import PREDICTIONS_FILE, read_question_scores
from vila.eval.published import benchmark_title
from vila.eval.report_data import (
    EvalRun,
    SampleQuestion,
    load_samples,
    questions_from,
    read_run,
    read_scores,
    sample_scores,
    shorten,
)
from vila.eval.report_tables import Table, bullets, cell, format_p_value, format_signed, markdown_table, plain
from vila.eval.significance import PairedComparison, compare_paired
from vila.report.html import Card, Cell, Figure, Page
from vila.report.plots import Group, bar_plot

_MAX_CHANGES = 6
"""Answers shown per benchmark that became better, and as many that became worse."""
SIGNIFICANCE_LEVEL = 0.05
"""Differences with a p-value up to this one count as significant."""


@dataclass(frozen=True)
class AnswerChange:
    """One question with its scores in both runs; `after` has that of the second run."""

    before: QuestionScore
    after: SampleQuestion


@dataclass(frozen=True)
class BenchmarkComparison:
    """One benchmark of both runs. changes: a fixed sample, better answers first. remark: questions not compared."""

    name: str
    scores: tuple[float | None, float | None]
    unit: str
    paired: PairedComparison
    changes: tuple[AnswerChange, ...]
    remark: str

    @property
    def title(self) -> str:
        """Title of the benchmark."""
        return benchmark_title(self.name)


@dataclass(frozen=True)
class RunComparison:
    """The second of two runs against the first. left_out: title of benchmarks that are not compared, and why."""

    runs: tuple[EvalRun, EvalRun]
    benchmarks: list[BenchmarkComparison]
    left_out: list[tuple[str, str]]

    @property
    def names(self) -> tuple[str, str]:
        """Names of the runs: their models, or their folders if the models have the same name."""
        first, second = self.runs
        models = first.short_model, second.short_model
        if models[0] != models[1]:
            return models
        folders = first.path.resolve().name, second.path.resolve().name
        return folders if folders[0] != folders[1] else (str(first.path), str(second.path))

    @property
    def remarks(self) -> list[tuple[str, str]]:
        """Title of a benchmark and what was not compared."""
        remarks = [(one.title, one.remark) for one in self.benchmarks if one.remark]
        return [*remarks, *((name, f"not compared: {reason}") for name, reason in self.left_out)]


def compare_runs(first: Path, second: Path, out: Path) -> list[Path]:
    """Write compare.html, compare.md and compare.json into `out`: the second run against the first.

    first, second: directories that `vila eval` wrote. Benchmarks are paired by name, questions by id. A difference is
    that of the mean question scores, in percentage points; for MME and POPE it is not the difference of the scores.
    Raises DataError if a directory is not a run folder or nothing can be compared.
    """
    found = RunComparison((read_run(first), read_run(second)), [], [])
    for name in dict.fromkeys(name for run in found.runs for name in run.folders):
        try:
            found.benchmarks.append(_compare(name, *found.runs))
        except DataError as error:
            found.left_out.append((benchmark_title(name), str(error)))
    if not found.benchmarks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.left_out)
        raise DataError(f"nothing to compare with {first} ({reasons or 'no benchmarks'})", file=second)
    paths = [out / f"compare.{suffix}" for suffix in ("html", "md", "json")]
    _page(found).save(paths[0])
    write_text(paths[1], _markdown(found))
    write_json(paths[2], _json(found))
    return paths


def _compare(name: str, first: EvalRun, second: EvalRun) -> BenchmarkComparison:
    for run in (first, second):
        if name not in run.folders:
            raise DataError("not in this run", file=run.path)
    folders = first.folders[name], second.folders[name]
    scores = [_scores(folder / "scores.json") for folder in folders]
    if scores[0]["rules"] != scores[1]["rules"]:
        raise DataError(f"scored with different protocols: {scores[0]['rules']} and {scores[1]['rules']}")
    before, after = (read_question_scores(folder) for folder in folders)
    known = {score.id: score for score in before}
    common = [score for score in after if score.id in known]
    unpaired = len(before) + len(after) - 2 * len(common)
    return BenchmarkComparison(
        name,
        (scores[0]["score"], scores[1]["score"]),
        scores[1]["unit"],
        compare_paired(before, after),
        tuple(_changes(name, known, common, folders[1], second.data)),
        f"{unpaired:,} questions have a score in only one of the runs and are not compared" if unpaired else "",
    )


def _changes(
    name: str, known: dict[str, QuestionScore], common: Sequence[QuestionScore], folder: Path, data: str
) -> list[AnswerChange]:
    better = [score for score in common if score.value > known[score.id].value]
    worse = [score for score in common if score.value < known[score.id].value]
    chosen = [score for scores in (better, worse) for score in sample_scores(scores, name, _MAX_CHANGES)]
    samples = load_samples(chosen, folder / PREDICTIONS_FILE, lambda: questions_from(name, data))
    return [AnswerChange(known[sample.score.id], sample) for sample in samples]


def _scores(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError("not finished: no scores.json", file=path.parent)
    scores = read_scores(path)
    if scores.get("score") is None:
        raise DataError(scores.get("problem") or "no score", file=path.parent)
    return scores


def _page(found: RunComparison) -> Page:
    names, comparisons = found.names, found.benchmarks
    page = Page(
        f"{names[1]} against {names[0]}",
        "Paired by question. Positive differences: the second run is better.",
        f"First run: {found.runs[0].path}. Second run: {found.runs[1].path}. This file is self-contained.",
    )
    significant = [one for one in comparisons if one.paired.p <= SIGNIFICANCE_LEVEL]
    better = sum(one.paired.difference > 0 for one in significant)
    level = f"of {len(comparisons)}, with p at most {SIGNIFICANCE_LEVEL}"
    page.figures(
        {
            "benchmarks better": Figure(better, level),
            "benchmarks worse": Figure(len(significant) - better, level),
            "questions": Figure(sum(one.paired.questions for one in comparisons), "in both runs"),
        }
    )
    page.section(
        "Differences",
        "Differences of the mean question scores, in percentage points, with 95 % intervals resampled by image. p: "
        "permutation test per benchmark, not corrected for the number of benchmarks.",
    )
    groups = [
        Group(one.title, {"difference": one.paired.difference}, {"difference": (one.paired.low, one.paired.high)})
        for one in comparisons
    ]
    page.plot(bar_plot(groups, title="Second run minus first, in percentage points", write=format_signed))
    page.table(*_table(found))
    if found.remarks:
        page.text("Remarks:").table((), found.remarks)
    for one in comparisons:
        if not one.changes:
            continue
        page.section(one.title, f"Better: {one.paired.better:,} answers. Worse: {one.paired.worse:,}.")
        page.gallery(
            [_card(names, change) for change in one.changes],
            "A fixed sample: answers that became better, then answers that became worse.",
            photos=True,
        )
    return page


def _card(names: tuple[str, str], change: AnswerChange) -> Card:
    sample, before, after = change.after, change.before, change.after.score
    lines = [
        ("", sample.question or after.id),
        (names[0], shorten(before.answer) or "(empty)"),
        (names[1], shorten(after.answer) or "(empty)"),
        ("truth", shorten(after.truth)),
        ("points", f"{before.value:.2f} to {after.value:.2f}" if {before.value, after.value} - {0, 1} else ""),
        ("image", "" if sample.image else sample.no_image),
    ]
    better = after.value > before.value
    shown = [(label, text) for label, text in lines if text]
    return Card(sample.image, shown, better, verdict="better" if better else "worse")


def _table(found: RunComparison) -> Table:
    rows: list[list[Cell]] = [
        [
            f"{one.title} ({one.unit})",
            *(None if score is None else f"{score:,.2f}" for score in one.scores),
            format_signed(one.paired.difference),
            f"{format_signed(one.paired.low)} to {format_signed(one.paired.high)}",
            format_p_value(one.paired.p),
            one.paired.better,
            one.paired.worse,
            one.paired.questions,
        ]
        for one in found.benchmarks
    ]
    return Table(["benchmark", *found.names, "difference", "95 % interval", "p", "better", "worse", "questions"], rows)


def _markdown(found: RunComparison) -> str:
    names = found.names
    parts = [
        f"# {cell(names[1])} against {cell(names[0])}",
        markdown_table(_table(found)),
        "Difference of the mean question scores in percentage points, second run minus first, on shared questions.",
        *bullets("Remarks:", found.remarks),
    ]
    return "\n\n".join(parts) + "\n"


def _json(found: RunComparison) -> Any:
    benchmarks = {
        one.name: {
            "scores": one.scores,
            "unit": one.unit,
            **one.paired.as_json(),
            "remark": one.remark,
            "changes": [_change(change) for change in one.changes],
        }
        for one in found.benchmarks
    }
    first, second = (str(run.path) for run in found.runs)
    return plain({"first": first, "second": second, "benchmarks": benchmarks, "not_compared": dict(found.left_out)})


def _change(change: AnswerChange) -> dict[str, Any]:
    score = change.after.score
    return {
        "id": score.id,
        "question": change.after.question,
        "first": change.before.answer,
        "second": score.answer,
        "truth": score.truth,
        "values": [change.before.value, score.value],
    }
