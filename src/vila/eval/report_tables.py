"""Tables of the evaluation report, shared by its HTML and Markdown forms, and the report as Markdown and JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from vila.core.errors import DataError
from vila.eval.predictions import read_question_scores
from vila.eval.published import PublishedBenchmark, benchmark_title, published_table
from vila.eval.report_data import BenchmarkSummary, EvalRun, Speed
from vila.eval.significance import compare_paired
from vila.report.html import Cell, Page, write_cell
from vila.report.numbers import write_number
from vila.report.plots import Dots, dot_plot

NOT_RUN = "not run"


class Table(NamedTuple):
    """Arguments of `Page.table`."""

    header: list[str]
    rows: list[list[Cell]]
    caption: str = ""


def published_rows(run: EvalRun, summaries: Sequence[BenchmarkSummary]) -> Table | None:
    """Return the table of the ten published benchmarks; None if the run has none of them."""
    table = published_table()
    by_name = {each.name: each for each in summaries}
    if not by_name.keys() & table.benchmarks.keys():
        return None
    rows: list[list[Cell]] = []
    for name, known in table.benchmarks.items():
        each = by_name.get(name)
        rows.append(
            [
                known.title if known.unit == "%" else f"{known.title} ({known.unit})",
                _score_cell(each) if each else None,
                format_interval(each) if each else "left out" if name in run.left_out else NOT_RUN,
                *(f"{known.scores[model]:,}" for model in table.models),
            ]
        )
    header = ["benchmark", "this model", "95 % interval", *(f"{model}, published" for model in table.models)]
    return Table(header, rows, "In percent unless a unit is given.")


def other_table(summaries: Sequence[BenchmarkSummary]) -> Table | None:
    """Return the table of benchmarks without published scores; None if there are none."""
    rows: list[list[Cell]] = [
        [each.title, _score_cell(each), each.unit, format_interval(each), each.asked]
        for each in summaries
        if each.name not in published_table().benchmarks
    ]
    return Table(["benchmark", "score", "unit", "95 % interval", "questions"], rows) if rows else None


def comparison_caveats(summaries: Sequence[BenchmarkSummary]) -> list[tuple[str, str]]:
    """Return title and reasons of the benchmarks whose score is not comparable with the published one."""
    caveats = []
    for each in summaries:
        known = published_table().benchmarks.get(each.name)
        if known and each.score is not None:
            reasons = " ".join(_caveats(each, known))
            caveats += [(each.title, reasons)] if reasons else []
    return caveats


def _caveats(each: BenchmarkSummary, known: PublishedBenchmark) -> list[str]:
    reasons = [known.difference] if known.difference else []
    if each.asked != known.questions:
        reasons.append(f"This run has {each.asked:,} questions, the published score {known.questions:,}.")
    if each.protocol != "upstream":
        reasons.append(f"Scored with the protocol of {each.protocol}; the published scores are not.")
    if each.failed:
        reasons.append(f"{count_questions(each.failed)} failed.")
    if each.interval and not each.interval_is_of_score:
        reasons.append("The interval is that of the mean question score, not of the score.")
    return reasons


def missing_scores(run: EvalRun, summaries: Sequence[BenchmarkSummary]) -> list[tuple[str, str]]:
    """Return title and reason of the requested benchmarks without a score."""
    problems = [(each.title, each.problem) for each in summaries if each.score is None]
    left_out = run.left_out.items()
    return [*problems, *((benchmark_title(name), reason) for name, reason in left_out if name not in run.folders)]


def speed_table(summaries: Sequence[BenchmarkSummary]) -> Table | None:
    """Return the throughput of each benchmark; None if it was not recorded."""
    timed = [(each.title, each.speed) for each in summaries if each.speed and each.speed.seconds > 0]
    if not timed:
        return None
    counted = any(speed.tokens is not None for _, speed in timed)
    rows = [_speed_row(title, [speed], counted) for title, speed in timed]
    if len(timed) > 1:
        rows.append(_speed_row("all", [speed for _, speed in timed], counted))
    header = ["benchmark", "questions", "seconds", "questions/s"]
    if not counted:
        return Table(header, rows)
    return Table(
        [*header, "tokens/question", "tokens/s", "prompt tokens/s"],
        rows,
        "Tokens are generated tokens. Prompt tokens include image tokens and count a shared prefix once per question, "
        "also where it comes from the cache.",
    )


def _speed_row(title: str, speeds: Sequence[Speed], counted: bool) -> list[Cell]:
    seconds, answered = sum(speed.seconds for speed in speeds), sum(speed.answered for speed in speeds)
    row: list[Cell] = [title, answered, round(seconds, 1), _rate(answered, seconds)]
    if not counted:
        return row
    known = [speed for speed in speeds if speed.tokens is not None]
    if not known:
        return [*row, None, None, None]
    seconds, answered = sum(speed.seconds for speed in known), sum(speed.answered for speed in known)
    tokens, prompt = sum(speed.tokens or 0 for speed in known), sum(speed.prompt_tokens or 0 for speed in known)
    return [*row, _rate(tokens, answered), _rate(tokens, seconds), _rate(prompt, seconds) if prompt else None]


def run_rows(run: EvalRun) -> list[tuple[str, str]]:
    """Return the settings in eval.json, and the name of the folder."""
    hidden = ("benchmarks", "left_out")
    settings = run.metadata.items()
    shown = [(name, str(value)) for name, value in settings if name not in hidden and value not in ("", None)]
    return [*shown, ("folder", run.path.resolve().name)]


def flatten_metrics(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested metrics to pairs of `outer, inner` and value."""
    rows: list[tuple[str, str]] = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            rows += flatten_metrics(value, f"{prefix}{name}, ")
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            rows.append((f"{prefix}{name}", write_number(value) if number else str(value)))
    return rows


def count_questions(count: int) -> str:
    """Return `1 question`, `1,234 questions`."""
    return f"{count:,} question{'s' * (count != 1)}"


def format_headline(each: BenchmarkSummary) -> str:
    """Return the score with its interval as a sentence, or why there is none."""
    if each.score is None:
        return each.problem
    return f"{format_score(each)}\N{NO-BREAK SPACE}{each.unit}; 95 % interval {format_interval(each)}."


def format_score(each: BenchmarkSummary) -> str:
    """Return the score with two decimals; "" for none."""
    return "" if each.score is None else f"{each.score:,.2f}"


def format_interval(each: BenchmarkSummary) -> str:
    """Return the bounds of the interval, or why there is none; with its mean if that is not the score."""
    if each.score is None:
        return "not scored here"
    if not each.interval:
        return "no question scores"
    low, high, mean = (each.interval[key] for key in ("low", "high", "mean"))
    if each.interval_is_of_score:
        return f"{low:,.1f} to {high:,.1f}"
    return f"{low:.1f} to {high:.1f} (mean question score {mean:.1f}\N{NO-BREAK SPACE}%)"


def format_signed(value: float) -> str:
    """Return a difference with its sign and two decimals."""
    text = f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    return "0.00" if float(f"{value:.2f}") == 0 else text


def format_p_value(p: float) -> str:
    """Return a p-value with three decimals."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _score_cell(each: BenchmarkSummary) -> Cell:
    return None if each.score is None else format_score(each)


def _rate(count: int, of: float) -> float | None:
    return count / of if of > 0 else None


# Few-shot evaluation: score by number of examples, with correct and with wrong answers in the examples.

_FEW_SHOT_NAME = re.compile(r"(?P<base>.+)_(?P<shots>\d+)shot(?P<wrong>_shuffled)?")
FEW_SHOT_CAPTION = (
    "Questions after few-shot examples, each an image, a question and an answer. If examples with wrong answers score "
    "as well as correct ones, the model takes only the answer format from them."
)


@dataclass
class FewShotCurves:
    """Summaries of one benchmark by number of examples, with correct and with wrong answers in the examples."""

    base: str
    correct: dict[int, BenchmarkSummary] = field(default_factory=dict)
    wrong: dict[int, BenchmarkSummary] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Title of the section."""
        return f"Few-shot: {benchmark_title(self.base)}"


def few_shot_curves(summaries: Sequence[BenchmarkSummary]) -> list[FewShotCurves]:
    """Return the curves of every benchmark with few-shot variants; both start at the zero-shot score."""
    by_name = {each.name: each for each in summaries}
    found: dict[str, FewShotCurves] = {}
    for each in summaries:
        if match := _FEW_SHOT_NAME.fullmatch(each.name):
            curves = found.setdefault(match["base"], FewShotCurves(match["base"]))
            (curves.wrong if match["wrong"] else curves.correct)[int(match["shots"])] = each
    for curves in found.values():
        if zero_shot := by_name.get(curves.base):
            for curve in filter(None, (curves.correct, curves.wrong)):
                curve[0] = zero_shot
    return list(found.values())


def add_few_shot_sections(page: Page, run: EvalRun, summaries: Sequence[BenchmarkSummary]) -> None:
    """Add a section with a plot and a table for each benchmark with few-shot variants."""
    for curves in few_shot_curves(summaries):
        page.section(curves.title, FEW_SHOT_CAPTION)
        series = [_dots("correct", curves.correct), _dots("wrong", curves.wrong)]
        page.plot(
            dot_plot(
                [one for one in series if one.points],
                title="Score with 95 % intervals",
                x_label="number of examples",
            )
        )
        page.table(*few_shot_table(run, curves))


def few_shot_table(run: EvalRun, curves: FewShotCurves) -> Table:
    """Return a table with a row per number of examples, and the paired test of correct against wrong answers."""
    header = ["examples", "correct answers", "95 % interval", "wrong answers", "95 % interval", "difference", "p"]
    rows = []
    for shots in sorted({*curves.correct, *curves.wrong}):
        wrong = _cells(curves.wrong.get(shots)) if shots else [None, None]
        rows.append([shots, *_cells(curves.correct.get(shots)), *wrong, *_test(run, curves, shots)])
    return Table(
        header,
        rows,
        "Difference: correct minus wrong answers, paired by question, in percentage points with 95 % interval. p: "
        "permutation test.",
    )


def _test(run: EvalRun, curves: FewShotCurves, shots: int) -> list[Cell]:
    if not shots or shots not in curves.correct or shots not in curves.wrong:
        return [None, None]
    pair = curves.wrong[shots], curves.correct[shots]
    try:
        found = compare_paired(*(read_question_scores(run.folders[each.name]) for each in pair))
    except DataError:  # one of them has no score yet; its own cells show it
        return [None, None]
    bounds = f"({format_signed(found.low)} to {format_signed(found.high)})"
    return [f"{format_signed(found.difference)} {bounds}", format_p_value(found.p)]


def _cells(each: BenchmarkSummary | None) -> list[Cell]:
    return [None, None] if each is None else [_score_cell(each), format_interval(each)]


def _dots(answers: str, curve: dict[int, BenchmarkSummary]) -> Dots:
    scored = {shots: each for shots, each in sorted(curve.items()) if each.score is not None}
    return Dots(
        f"examples with {answers} answers",
        [(shots, each.score) for shots, each in scored.items() if each.score is not None],
        {
            shots: (each.interval["low"], each.interval["high"])
            for shots, each in scored.items()
            if each.interval and each.interval_is_of_score
        },
    )


# Markdown and JSON.


def as_markdown(run: EvalRun, summaries: Sequence[BenchmarkSummary]) -> str:
    """Return tables, notes and failures as Markdown; images are only in the HTML page."""
    parts = [f"# Evaluation of {cell(run.short_model)}"]
    if table := published_rows(run, summaries):
        parts += ["## Comparison with the published models", markdown_table(table)]
        parts += [f"Published: {published_table().source}."]
        parts += bullets("Before comparing:", comparison_caveats(summaries))
    if table := other_table(summaries):
        parts += ["## Other benchmarks", markdown_table(table)]
    parts += bullets("Without a score:", missing_scores(run, summaries))
    for curves in few_shot_curves(summaries):
        parts += [f"## {cell(curves.title)}", FEW_SHOT_CAPTION, markdown_table(few_shot_table(run, curves))]
    for each in summaries:
        parts += _benchmark(each)
    if table := speed_table(summaries):
        parts += ["## Speed", markdown_table(table)]
    return "\n\n".join([*parts, "## The run", *bullets("", run_rows(run))]) + "\n"


def _benchmark(each: BenchmarkSummary) -> list[str]:
    if each.score is None and not each.failed:
        return []
    parts = [f"## {cell(each.title)}", cell(format_headline(each))]
    if each.categories:
        rows: list[list[Cell]] = [
            [name, one.questions, f"{one.mean:.1f}", f"{one.low:.1f} to {one.high:.1f}"]
            for name, one in each.categories.items()
        ]
        parts.append(markdown_table(Table(["category", "questions", "mean score (%)", "95 % interval"], rows)))
    parts += bullets("Notes:", [("", note) for note in each.notes])
    parts += bullets(f"{count_questions(each.failed)} failed, the first of them:", each.failures)
    return parts


def as_json(run: EvalRun, summaries: Sequence[BenchmarkSummary]) -> dict[str, Any]:
    """Return everything on the page except images as plain data; NaN and infinity become null."""
    table = published_table()
    return plain(
        {
            "run": run.metadata,
            "published": {
                "source": table.source,
                "scores": {name: known.scores for name, known in table.benchmarks.items()},
            },
            "not_run": [name for name in table.benchmarks if name not in run.folders],
            "before_comparing": dict(comparison_caveats(summaries)),
            "benchmarks": {each.name: _as_json(each) for each in summaries},
        }
    )


def _as_json(each: BenchmarkSummary) -> dict[str, Any]:
    return {
        **{name: getattr(each, name) for name in each.__dataclass_fields__},
        "interval_is_of_score": each.interval_is_of_score,
        "categories": [
            {"name": name, "mean": one.mean, "low": one.low, "high": one.high, "questions": one.questions}
            for name, one in each.categories.items()
        ],
        "speed": asdict(each.speed) if each.speed else None,
        "sample": [{"question": one.question, **asdict(one.score)} for one in each.sample],
    }


def plain(value: Any) -> Any:
    """Convert mappings and sequences to JSON types; NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown_table(table: Table) -> str:
    """Return a table as Markdown; numbers are formatted as on the page."""
    lines = [table.header, ["---"] * len(table.header), *([write_cell(one) for one in row] for row in table.rows)]
    text = "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)
    return f"{text}\n\n{table.caption}" if table.caption else text


def bullets(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    """Return a title and a bullet list; an empty list without rows."""
    lines = [f"- {cell(name)}: {cell(text)}" if name else f"- {cell(text)}" for name, text in rows]
    return [part for part in (title, "\n".join(lines)) if part] if lines else []


def cell(text: str) -> str:
    """Return text on one line, with Markdown characters escaped."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)
