"""Write the report of an evaluation run: `report.html`, `report.md` and `report.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from vila.core.files import write_json, write_text
from vila.eval.benchmark import Benchmark, Item
from vila.eval.compare import compare_runs
from vila.eval.published import published_table
from vila.eval.report_data import (
    BenchmarkSummary,
    EvalRun,
    SampleQuestion,
    questions_from,
    read_run,
    shorten,
    summarize_benchmark,
)
from vila.eval.report_tables import (
    add_few_shot_sections,
    as_json,
    as_markdown,
    comparison_caveats,
    count_questions,
    flatten_metrics,
    format_headline,
    format_interval,
    format_score,
    missing_scores,
    other_table,
    published_rows,
    run_rows,
    speed_table,
)
from vila.report.html import Card, Figure, Page
from vila.report.numbers import write_seconds
from vila.report.plots import Group, bar_plot

__all__ = ["compare_runs", "write_report"]

_PROTOCOLS = {
    "upstream": "Scored with the protocol of the published table.",
    "lmms-eval": "Scored with the protocol of lmms-eval.",
}
_MAX_METRICS = 80
_MAX_VALUE_CHARS = 200


def write_report(folder: Path, opened: Mapping[str, Benchmark] | None = None) -> list[Path]:
    """Write the three files into a run folder and return their paths.

    folder: written by `vila eval`; the run may be unfinished.
    opened: benchmarks that are open already, by name; others are opened from the run's data directory for their images.
    The page makes no network requests and its size is bounded. Images that cannot be shown are replaced by the reason.
    Raises DataError if `folder` is not a run folder or a file in it is damaged.
    """
    run = read_run(folder)
    given = opened or {}

    def items(name: str) -> Sequence[Item]:
        return given[name].items() if name in given else questions_from(name, run.data)

    summaries = [summarize_benchmark(name, path, partial(items, name)) for name, path in run.folders.items()]
    paths = [folder / f"report.{suffix}" for suffix in ("html", "md", "json")]
    _page(run, summaries).save(paths[0])
    write_text(paths[1], as_markdown(run, summaries))
    write_json(paths[2], as_json(run, summaries))
    return paths


def _page(run: EvalRun, summaries: Sequence[BenchmarkSummary]) -> Page:
    page = Page(
        f"Evaluation of {run.short_model}",
        " ".join(_PROTOCOLS[protocol] for protocol in sorted({each.protocol for each in summaries if each.protocol})),
        "This file is self-contained. Its numbers are in report.json, all answers in BENCHMARK/predictions.jsonl, the "
        "score of each question in BENCHMARK/question_scores.jsonl.",
    )
    _overview(page, summaries)
    _published(page, run, summaries)
    _others(page, run, summaries)
    add_few_shot_sections(page, run, summaries)
    for each in summaries:
        _benchmark(page, each)
    _speed(page, summaries)
    page.section("The run").table((), run_rows(run))
    return page


def _overview(page: Page, summaries: Sequence[BenchmarkSummary]) -> None:
    scored = [each for each in summaries if each.score is not None]
    failed = sum(each.failed for each in summaries)
    tiles: dict[str, Figure] = {}
    if len(scored) == 1:
        tiles[scored[0].title] = Figure(format_score(scored[0]), f"95 % interval {format_interval(scored[0])}")
    else:
        tiles["benchmarks scored"] = Figure(len(scored), f"of {len(summaries)} in this run")
    tiles["questions"] = Figure(sum(each.asked for each in summaries), f"{failed:,} failed")
    if seconds := sum(each.speed.seconds for each in summaries if each.speed):
        tiles["time"] = Figure(write_seconds(seconds), "loading images and generating answers")
    page.figures(tiles)


def _published(page: Page, run: EvalRun, summaries: Sequence[BenchmarkSummary]) -> None:
    table = published_table()
    rows = published_rows(run, summaries)
    if rows is None:
        return
    page.section(
        "Comparison with the published models",
        f"Published: {table.source}. Intervals are 95 % bootstrap intervals of this model's score, resampled by image.",
    )
    page.table(*rows)
    _pairs(page, "Before comparing", comparison_caveats(summaries))
    _pairs(page, "Without a score", missing_scores(run, summaries))


def _others(page: Page, run: EvalRun, summaries: Sequence[BenchmarkSummary]) -> None:
    rows = other_table(summaries)
    if rows is None:
        return
    page.section("Other benchmarks", "VILA has no published scores on these benchmarks.")
    page.table(*rows)
    if published_rows(run, summaries) is None:
        _pairs(page, "Without a score", missing_scores(run, summaries))


def _benchmark(page: Page, each: BenchmarkSummary) -> None:
    if each.score is None and not each.failed:
        return
    known = published_table().benchmarks.get(each.name)
    page.section(each.title, f"Published metric: {known.metric}." if known else "")
    page.text(format_headline(each))
    if each.categories:
        groups = [
            Group(f"{name} ({one.questions:,})", {"score": one.mean}, {"score": (one.low, one.high)})
            for name, one in each.categories.items()
        ]
        page.plot(
            bar_plot(groups, title="Mean question score by category", write=_percent, full=100.0),
            "With 95 % bootstrap intervals, resampled by image; number of questions in brackets.",
        )
    for note in each.notes:
        page.text(f"Note: {note}")
    if each.failed:
        more = "" if each.failed == len(each.failures) else f"; the first {len(each.failures)}"
        page.table(["question", "error"], each.failures, f"{count_questions(each.failed)} failed{more}.")
    if each.sample:
        page.gallery(
            [card(one) for one in each.sample],
            f"{len(each.sample)} of {each.wrong:,} questions with less than half of the points, chosen by a hash of "
            "their id, so that the reports of two runs show the same questions.",
            photos=True,
        )
    if each.metrics:
        rows = flatten_metrics(each.metrics)
        inner = page.details("All metrics")
        inner.table((), [(name, shorten(str(value), _MAX_VALUE_CHARS)) for name, value in rows[:_MAX_METRICS]])
        if len(rows) > _MAX_METRICS:
            inner.text(f"{len(rows) - _MAX_METRICS} more are in report.json.")


def card(one: SampleQuestion) -> Card:
    """Return the card of a wrong answer: image, question, answer, reference and the rule that decided the score."""
    score = one.score
    lines = [
        ("", one.question or score.id),
        ("answer", shorten(score.answer) or "(empty)"),
        ("truth", shorten(score.truth)),
        ("rule", score.rule),
        ("points", f"{score.value:.2f}" if score.value else ""),
        ("category", score.category),
        ("image", "" if one.image else one.no_image),
    ]
    return Card(one.image, [(label, text) for label, text in lines if text], good=False)


def _speed(page: Page, summaries: Sequence[BenchmarkSummary]) -> None:
    rows = speed_table(summaries)
    if rows is not None:
        page.section("Speed", "The time includes loading and transforming images.")
        page.table(*rows)


def _pairs(page: Page, caption: str, rows: Sequence[tuple[str, str]]) -> None:
    if rows:
        page.text(f"{caption}:").table((), rows)


def _percent(value: float) -> str:
    return f"{value:.1f}\N{NO-BREAK SPACE}%" if math.isfinite(value) else ""
