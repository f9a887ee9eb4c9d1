"""The part of a report on learning in context: scores by the number of examples, and true against wrong answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vila.core.errors import DataError
from vila.eval.published import title_of
from vila.eval.report_digest import Digest, RunFolder, read_marks
from vila.eval.report_tables import Table, write_chance, write_interval, write_score, write_signed
from vila.eval.statistics import Comparison, compare
from vila.report.dots import Dots, dot_plot
from vila.report.page import Cell, Page

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
