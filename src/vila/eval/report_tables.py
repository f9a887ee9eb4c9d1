"""The tables of a report, the same for HTML and Markdown: cells as text, numbers and None."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vila.core.errors import DataError
from vila.eval.published import PublishedBenchmark, published_table, title_of
from vila.eval.report_data import Digest, RunFolder, Shown, Speed, read_marks
from vila.eval.stats import Comparison, compare
from vila.report.html import Cell, Page, write_cell
from vila.report.numbers import write_number
from vila.report.plots import Dots, dot_plot

NOT_RUN = "not run"


@dataclass(frozen=True)
class Table:
    """A header, rows of its length, and a caption."""

    header: list[str]
    rows: list[list[Cell]]
    caption: str = ""


def published_rows(run: RunFolder, digests: Sequence[Digest]) -> Table | None:
    """The ten benchmarks, this model and the published ones; None when the run has none of the ten."""
    table = published_table()
    by_name = {each.name: each for each in digests}
    if not by_name.keys() & table.benchmarks.keys():
        return None
    rows: list[list[Cell]] = []
    for name, known in table.benchmarks.items():
        each = by_name.get(name)
        rows.append(
            [
                known.title if known.unit == "%" else f"{known.title} ({known.unit})",
                write_score(each) if each and each.score is not None else None,
                write_interval(each) if each else "left out" if name in run.left_out else NOT_RUN,
                *(f"{known.scores[model]:,}" for model in table.models),
            ]
        )
    header = ["benchmark", "this model", "95 % interval", *(f"{model}, published" for model in table.models)]
    return Table(header, rows, "Percent where no unit is given.")


def other_table(digests: Sequence[Digest]) -> Table | None:
    """Benchmarks that are not among the ten."""
    others = [each for each in digests if each.name not in published_table().benchmarks]
    rows: list[list[Cell]] = [
        [each.title, write_score(each) if each.score is not None else None, each.unit, write_interval(each), each.asked]
        for each in others
    ]
    return Table(["benchmark", "score", "unit", "95 % interval", "questions"], rows) if rows else None


def before_comparing(digests: Sequence[Digest]) -> list[tuple[str, str]]:
    """Why a score and the published one beside it are not of the same thing, by title."""
    out = []
    for each in digests:
        known = published_table().benchmarks.get(each.name)
        if known and each.score is not None:
            reasons = " ".join(_reasons(each, known))
            out += [(each.title, reasons)] if reasons else []
    return out


def _reasons(each: Digest, known: PublishedBenchmark) -> list[str]:
    reasons = [known.here] if known.here else []
    if each.asked != known.questions:
        reasons.append(f"{each.asked:,} questions were asked; the published figure is of {known.questions:,}.")
    if each.rules != "upstream":
        reasons.append(f"Scored by the rules of {each.rules}; the published figures are not.")
    if each.failed:
        reasons.append(f"{counted(each.failed)} could not be asked.")
    if each.interval and not each.interval_is_of_score:
        reasons.append("The interval is that of the mean mark, which the score is not.")
    return reasons


def without_score(run: RunFolder, digests: Sequence[Digest]) -> list[tuple[str, str]]:
    """Titles of benchmarks that were asked for and have no score, and why."""
    problems = [(each.title, each.problem) for each in digests if each.score is None]
    return [*problems, *((title_of(name), why) for name, why in run.left_out.items() if name not in run.folders)]


def speed_table(digests: Sequence[Digest]) -> Table | None:
    """How fast each benchmark was answered; None when no speed was noted."""
    timed = [(each.title, each.speed) for each in digests if each.speed and each.speed.seconds > 0]
    if not timed:
        return None
    counted = any(speed.tokens is not None for _, speed in timed)
    rows = [_speed_row(title, [speed], counted) for title, speed in timed]
    if len(timed) > 1:
        rows.append(_speed_row("all", [speed for _, speed in timed], counted))
    header = ["benchmark", "questions", "seconds", "questions a second"]
    if not counted:
        return Table(header, rows)
    return Table(
        [*header, "tokens a question", "tokens a second", "prompt tokens a second"],
        rows,
        "Tokens are those of the answers. Prompt tokens count the places of pictures, and what several questions share "
        "as often as they are asked, computed or not.",
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


def run_facts(run: RunFolder) -> list[tuple[str, str]]:
    """What eval.json says of the run."""
    hidden = ("benchmarks", "left_out")
    shown = [(name, str(value)) for name, value in run.facts.items() if name not in hidden and value not in ("", None)]
    return [*shown, ("folder", run.path.resolve().name)]


def flat(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested figures as `outer, inner` and a value, in their order."""
    rows: list[tuple[str, str]] = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{name}, ")
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            rows.append((f"{prefix}{name}", write_number(value) if number else str(value)))
    return rows


def counted(count: int) -> str:
    """`1 question`, `1,234 questions`."""
    return f"{count:,} question{'s' * (count != 1)}"


def write_headline(each: Digest) -> str:
    """The score in a sentence, or why there is none."""
    if each.score is None:
        return each.problem
    return f"{write_score(each)}\N{NO-BREAK SPACE}{each.unit}; 95 % interval {write_interval(each)}."


def write_score(each: Digest) -> str:
    """The headline with two decimals; "" for none."""
    return "" if each.score is None else f"{each.score:,.2f}"


def write_interval(each: Digest) -> str:
    """Bounds that 95 of 100 draws lie between, or why there are none. Where the score is no mean mark, it is said."""
    if each.score is None:
        return "not scored here"
    if not each.interval:
        return "no marks"
    low, high, mean = (each.interval[key] for key in ("low", "high", "mean"))
    if each.interval_is_of_score:
        return f"{low:,.1f} to {high:,.1f}"
    return f"{low:.1f} to {high:.1f} (mean mark {mean:.1f}\N{NO-BREAK SPACE}%)"


def write_signed(value: float) -> str:
    """A difference with its sign and two decimals."""
    text = f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    return "0.00" if float(f"{value:.2f}") == 0 else text


def write_chance(p: float) -> str:
    """A p-value."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _rate(count: int, of: float) -> float | None:
    return count / of if of > 0 else None


# --- report_shots
# The part of a report on learning in context: scores by the number of examples, and true against wrong answers.


_NAME = re.compile(r"(?P<base>.+)_(?P<shots>\d+)shot(?P<wrong>_shuffled)?")
SENSE = (
    "Questions after worked examples, picture, question and answer. Where wrong answers in the examples do as well as "
    "true ones, examples teach the form of an answer and not the task."
)


@dataclass
class Curves:
    """One benchmark by the number of examples before its questions, with true answers and with wrong ones."""

    base: str
    true: dict[int, Digest] = field(default_factory=dict)
    wrong: dict[int, Digest] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Of its section."""
        return f"In context: {title_of(self.base)}"


def curves_of(digests: Sequence[Digest]) -> list[Curves]:
    """Of every benchmark that was asked after examples; both curves begin where it was asked without any."""
    by_name = {each.name: each for each in digests}
    found: dict[str, Curves] = {}
    for each in digests:
        if match := _NAME.fullmatch(each.name):
            curves = found.setdefault(match["base"], Curves(match["base"]))
            (curves.wrong if match["wrong"] else curves.true)[int(match["shots"])] = each
    for curves in found.values():
        if plain := by_name.get(curves.base):
            for curve in filter(None, (curves.true, curves.wrong)):
                curve[0] = plain
    return list(found.values())


def add_shots(page: Page, run: RunFolder, digests: Sequence[Digest]) -> None:
    """A section for each benchmark that was asked after examples: a plot and a table."""
    for curves in curves_of(digests):
        page.section(curves.title, SENSE)
        series = [_dots("true", curves.true), _dots("wrong", curves.wrong)]
        page.plot(
            dot_plot(
                [one for one in series if one.points],
                title="Score, with 95 % intervals",
                x_label="examples before the question",
            )
        )
        table = shots_table(run, curves)
        page.table(table.header, table.rows, table.caption)


def shots_table(run: RunFolder, curves: Curves) -> Table:
    """A row for each number of examples; true against wrong answers question by question."""
    header = ["examples", "true answers", "95 % interval", "wrong answers", "95 % interval", "true minus wrong", "p"]
    rows = [
        [shots, *_pair(curves.true.get(shots)), *(_pair(curves.wrong.get(shots)) if shots else [None, None]), *tested]
        for shots, tested in _tested(run, curves)
    ]
    return Table(
        header,
        rows,
        "True minus wrong: paired by question, in points of a hundred, with its 95 % interval. p: how often chance "
        "alone gives as large a difference.",
    )


def _tested(run: RunFolder, curves: Curves) -> Iterator[tuple[int, list[Cell]]]:
    for shots in sorted({*curves.true, *curves.wrong}):
        found = None
        if shots and shots in curves.true and shots in curves.wrong:
            found = _compared(run, curves.wrong[shots], curves.true[shots])
        if found is None:
            yield shots, [None, None]
        else:
            bounds = f"({write_signed(found.low)} to {write_signed(found.high)})"
            yield shots, [f"{write_signed(found.difference)} {bounds}", write_chance(found.p)]


def _compared(run: RunFolder, first: Digest, second: Digest) -> Comparison | None:
    try:
        return compare(*(read_marks(run.folders[each.name] / "marks.jsonl") for each in (first, second)))
    except DataError:  # one of them is not scored yet, which its own cells say
        return None


def _pair(each: Digest | None) -> list[Cell]:
    if each is None:
        return [None, None]
    return [write_score(each) if each.score is not None else None, write_interval(each)]


def _dots(answers: str, curve: dict[int, Digest]) -> Dots:
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


# --- report_text
# A report as Markdown and as plain data.


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
