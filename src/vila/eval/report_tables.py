"""The tables of a report, the same for HTML and Markdown: cells as text, numbers and None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vila.eval.published import PublishedBenchmark, published_table, title_of
from vila.eval.report_digest import Digest, RunFolder, Speed
from vila.report.page import Cell
from vila.report.scale import write_number

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
