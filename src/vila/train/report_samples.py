"""Parts of a run's report that show single things: evaluations, answers to prompts, and what was skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vila.core.errors import MediaError
from vila.core.files import resolve_path, without_home
from vila.report.lines import Series, line_plot
from vila.report.page import Card, Cell, Page
from vila.report.picture import embed
from vila.report.scale import write_number, write_seconds
from vila.train.record import Row, Sampled, read_first

_CARDS_SHOWN = 24
_LONGEST = 600
"""Characters of an answer or a reason that are shown."""


def add_scores(page: Page, evaluations: Mapping[str, Sampled]) -> None:
    """The scores of evaluations over time."""
    drawn = {name: rows.shown for name, rows in evaluations.items()}
    if not drawn:
        return
    page.section("Evaluation", "A fixed choice of questions, asked again and again while the model learns.")
    series = [Series(name, [(row["step"], _score(row)) for row in rows]) for name, rows in drawn.items()]
    if any(len(rows) > 1 for rows in drawn.values()):
        page.plot(line_plot(series, title="Score", x_label="step"))
    table: list[list[Cell]] = [
        [name, row["step"], write_score(row), row.get("items"), _seconds(row.get("seconds"))]
        for name, rows in drawn.items()
        for row in rows
    ]
    page.table(["benchmark", "step", "score", "questions", "time"], table)
    problems = [
        (f"step {row['step']:,}", row["problem"]) for rows in drawn.values() for row in rows if "problem" in row
    ]
    if problems:
        page.table((), problems[-10:], "Evaluations without a score")


def add_answers(page: Page, answers: Mapping[tuple[str, str], Sampled], folder: Path) -> None:
    """The answers to each prompt, step by step. An image that cannot be read is named in its place.

    folder: of the run, which the paths of images are relative to.
    """
    if not answers:
        return
    page.section("Answers", "The same questions, answered greedily at several steps.")
    shown = list(answers.items())[:_CARDS_SHOWN]
    page.gallery(
        [_card(prompt, image, rows.shown[-1], folder) for (prompt, image), rows in shown], "The newest answers."
    )
    for (prompt, image), rows in shown:
        if rows.count > 1:
            about = f" ({Path(image).name})" if image else ""
            table = [[f"{row['step']:,}", _answer(row)] for row in rows.shown]
            page.details(_short(prompt, 120) + about).table(["step", "answer"], table)
    if len(answers) > len(shown):
        page.text(f"{len(answers) - len(shown)} more questions are in answers.jsonl.")


def _card(prompt: str, image: str, row: Row, folder: Path) -> Card:
    path = str(resolve_path(image, folder)) if image else ""
    lines = [("", _short(prompt)), (f"step {row['step']:,}", _answer(row))]
    try:
        if path:
            embed(path)
    except MediaError as error:
        return Card(None, [*lines, ("image", without_home(str(error)))])
    return Card(path or None, lines)


def _answer(row: Row) -> str:
    return _short(row["answer"]) if not row.get("error") else f"no answer: {_short(without_home(row['error']))}"


def add_trouble(page: Page, folder: Path) -> None:
    """Steps that were left out, and samples that could not be read."""
    faults, fault_count = read_first(folder / "faults.jsonl", "position")
    bad, bad_count = read_first(folder / "bad_steps.jsonl")
    if not (fault_count or bad_count):
        return
    page.section("Trouble", "What was skipped, and why.")
    if bad_count:
        steps_of: list[list[Cell]] = [
            [f"{row['step']:,}", str(row.get("loss")), str(row.get("grad_norm")), _ids(row.get("ids", []))]
            for row in bad
        ]
        caption = _of(
            len(bad), bad_count, "left out, for a loss or gradient that was not finite; weights stayed as they were"
        )
        page.table(["step", "loss", "gradient", "samples"], steps_of, caption)
    if fault_count:
        reasons: list[list[Cell]] = [
            [f"{row['position']:,}", _short(without_home(str(row["reason"])))] for row in faults
        ]
        page.table(["position", "reason"], reasons, _of(len(faults), fault_count, "that could not be read"))


def _score(row: Row) -> float:
    return float("nan") if row.get("score") is None else float(row["score"])


def write_score(row: Row) -> str | None:
    """The score of an evaluation with its unit."""
    if row.get("score") is None:
        return None
    unit = str(row.get("unit", ""))
    return f"{row['score']:.1f}\N{NO-BREAK SPACE}%" if unit == "%" else f"{write_number(row['score'])} {unit}".strip()


def _seconds(value: float | None) -> str | None:
    return None if value is None else write_seconds(value)


def _short(text: str, limit: int = _LONGEST) -> str:
    return text if len(text) <= limit else f"{text[:limit].rstrip()}\N{HORIZONTAL ELLIPSIS}"


def _ids(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def _of(shown: int, count: int, what: str) -> str:
    return f"All {count:,} {what}." if shown == count else f"The first {shown} of {count:,} {what}."
