"""MMBench: up to four options, every question asked once for each rotation of them (Liu et al., ECCV 2024).

    mmbench_dev_20230712.tsv    index, question, hint, A, B, C, D, answer, category, image (base64), source,
                                l2-category, comment, split; 4,377 rows

Row index + k * 1,000,000 holds the options of question `index` rotated k times. A question is right when all of its
rotations are. The server decides, with ChatGPT for answers that name no option plainly; the score given here is that
of a static matcher that stands in for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.types import Image, Message
from vila.eval.annotation_files import EMPTY_CELLS, AnnotationTable, read_table
from vila.eval.annotations import (
    MatchedAnswers,
    drop_mistyped_ids,
    find_file,
    find_optional,
    format_ids,
    group_items,
    match_answers,
    prompt_note,
    size_note,
)
from vila.eval.benchmark import Answer, BenchmarkResult, Item, QuestionScore, ScoringProtocol, Submission
from vila.eval.benchmarks.scienceqa import LETTER_INSTRUCTION
from vila.eval.metrics.multiple_choice import parse_mmbench_rules, parse_mmbench_static
from vila.eval.submit import cell_text

_OPTIONS = "ABCD"
_TURN = 1_000_000
"""What a rotation adds to a question's index."""
_LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_AT = 6
_PUBLISHED_ROWS = 4377
_MMBENCH = "download.openmmlab.com/mmclassification/datasets/mmbench"
_SERVER = "MMBench, https://mmbench.opencompass.org.cn/mmbench-submission (it knows files by name: never reuse one)"
STATIC_MATCHER = "static matcher: a local stand-in, the server decides"


class MmBench:
    """The English development split."""

    name = "mmbench"
    max_new_tokens = 1024
    file = "mmbench_dev_20230712.tsv"
    suffix = LETTER_INSTRUCTION

    def __init__(self, folder: Path, limit: int = 0) -> None:
        self._limit = limit
        self._path = self._find(folder)

    def _find(self, folder: Path) -> Path:
        return find_file(folder, self.name, self.file, obtain=f"{_MMBENCH}/{self.file}")

    def items(self) -> Sequence[Item]:
        """A question for each row, rotations of one question together; pictures stay in the table."""
        return self._items

    @cached_property
    def _items(self) -> list[Item]:
        self._table.need("index", "question", "hint", *_OPTIONS, "image")
        return group_items([self._item(index, row) for index, row in self._rows.items()], self._limit)

    def _item(self, index: int, row: Mapping[str, Any]) -> Item:
        location = f"{self._path} index {index}"
        if row["question"] in EMPTY_CELLS:
            raise DataError(f"{location}: has no question")
        if not row["image"] or row["image"] in EMPTY_CELLS:
            raise DataError(f"{location}: has no picture; download the file again")
        options = asked_options(row)
        letters = list(_OPTIONS[: len(options)])
        hint = "" if _is_none(row["hint"]) else f"{row['hint']}\n"
        body = hint + row["question"] + "".join(f"\n{x}. {text}" for x, text in zip(letters, options, strict=True))
        message = Message.of("user", Image(row["image"]), f"\n{body}\n{self.suffix}")
        facts = {"round_id": 0, "options": options, "option_char": letters}
        truth, category = row.get("answer", ""), row.get("category", "")
        return Item(str(index), (message,), truth, str(index % _TURN), category, index, body, facts=facts)

    @cached_property
    def _table(self) -> AnnotationTable:
        table = read_table(self._path, ("image",))
        table.need("index")
        if not table.rows:
            raise DataError(f"{self._path}: holds no rows; download it again")
        return table

    @cached_property
    def _rows(self) -> dict[int, dict[str, Any]]:
        """Rows by index, in the order of the file."""
        out: dict[int, dict[str, Any]] = {}
        for number, row in enumerate(self._table.rows, start=1):
            text = row["index"].strip()
            if not text.isdecimal():
                raise DataError(f"{self._path} row {number}: index is {text!r}; expected a number")
            if int(text) in out:
                raise DataError(f"{self._path} row {number}: index {text} is given a second time")
            out[int(text)] = row
        return out

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Percent of questions all of whose rotations are right, by the static matcher; marks are by question.

        Both rules are the same: lmms-eval's key-free matcher, which is what can be run without the server.
        The last of several answers counts; a row without one is wrong.
        Raises DataError for a split whose answers are not published, and when no answer is to one of the rows.
        """
        rows = self._scorable()
        joined, notes = self._joined(answers, rows)
        notes += joined.notes("wrong; their cells stay empty in the server's file")
        notes += [] if self._limit else size_note(self._path.name, len(rows), _PUBLISHED_ROWS, "rows")
        turns: dict[int, list[int]] = {index: [] for index in rows if index < _TURN}
        astray = [str(index) for index in rows if index % _TURN not in turns]
        for index in rows:
            turns.get(index % _TURN, []).append(index)
        if astray:
            notes.append(
                f"{len(astray)} rows are rotations of questions that are not there, left out: {format_ids(astray)}"
            )
        if not turns:
            raise DataError(f"{self._path}: holds rotations only, no index below {_TURN:,}")
        question_scores = [_mark(base, indexes, rows, joined.texts) for base, indexes in turns.items()]
        first = [_right(base, rows, joined.texts) for base in turns]
        strict = [all(_right(i, rows, joined.texts, rules_alone=True) for i in indexes) for indexes in turns.values()]
        metrics: dict[str, Any] = {
            "matcher": STATIC_MATCHER,
            "circular": _percent([scored.value for scored in question_scores]),
            "circular_by_rules_alone": _percent(strict),
            "first_round": _percent(first),
            "questions": len(question_scores),
            "rows": len(rows),
            "missing": len(joined.missing),
            "by_category": _by([scored.category for scored in question_scores], question_scores),
        }
        if "l2-category" in self._table.columns:
            metrics["by_l2_category"] = _by([rows[base]["l2-category"] for base in turns], question_scores)
        return BenchmarkResult(metrics["circular"], "%", metrics, tuple(question_scores), (STATIC_MATCHER, *notes))

    def _scorable(self) -> dict[int, dict[str, Any]]:
        """The rows that are asked. Raises DataError when they do not say what is right."""
        if "answer" not in self._table.columns:
            raise DataError(
                f"{self.name}: {self._path} has no answers, the server alone knows them: write the file with "
                f"`vila submit` and upload it to {_SERVER}"
            )
        self._table.need(*_OPTIONS)
        rows = self._rows
        if self._limit:
            rows = {int(item.id): rows[int(item.id)] for item in self._items}
        if wrong := [f"{i} ({row['answer']!r})" for i, row in rows.items() if row["answer"] not in tuple(_OPTIONS)]:
            raise DataError(f"{self._path}: {len(wrong)} rows have no letter for an answer: {format_ids(wrong)}")
        return rows

    def _joined(self, answers: Sequence[Answer], rows: Mapping[int, Any]) -> tuple[MatchedAnswers, list[str]]:
        kept, notes = drop_mistyped_ids(self.name, answers, rows)
        questions = {str(index): str(row.get("question", "")) for index, row in rows.items()}
        return match_answers(self.name, kept, questions), notes + prompt_note(self.name, kept, questions)

    def submission(self, answers: Sequence[Answer]) -> Submission:
        """All rows in their order: index, question, A, B, C, D, prediction, answer, split; answers as they are.

        A row without an answer has an empty cell, as in the original's file; the checks count them.
        """
        self._table.need("question", *_OPTIONS, *_LEFT_OUT)
        joined, notes = self._joined(answers, self._rows)
        columns: list[str] = [column for column in self._table.columns if column not in _LEFT_OUT]
        columns.insert(_PREDICTION_AT, "prediction")
        changed = [key for key, text in joined.texts.items() if cell_text(text) != text]
        rows = [_sheet_row(columns, index, row, joined.texts.get(str(index))) for index, row in self._rows.items()]
        checks = [
            f"{len(rows):,} rows, columns {', '.join(columns)}",
            *size_note(self._path.name, len(rows), _PUBLISHED_ROWS, "rows"),
        ]
        if changed:
            checks.append(f"{len(changed)} answers hold what no cell can, which is left out: {format_ids(changed)}")
        checks += notes + joined.notes("their cells are empty")
        return Submission(f"{self._path.stem}_upload", "xlsx", rows, _SERVER, tuple(checks))


def asked_options(row: Mapping[str, Any]) -> list[str]:
    """The options up to the first empty one, which is where the original's question ends, even if more follow."""
    out: list[str] = []
    for letter in _OPTIONS:
        if _is_none(row[letter]):
            break
        out.append(row[letter])
    return out


def _is_none(cell: str) -> bool:
    return cell in EMPTY_CELLS or cell.lower() in ("nan", "none")


def _right(index: int, rows: Mapping[int, Any], texts: Mapping[str, str], rules_alone: bool = False) -> bool:
    text = texts.get(str(index))
    if text is None:
        return False
    # All options that the table holds, also those after an empty one.
    options = {letter: rows[index][letter] for letter in _OPTIONS if rows[index][letter] not in EMPTY_CELLS}
    read = parse_mmbench_rules if rules_alone else parse_mmbench_static
    return read(text, options).letter == rows[index]["answer"]


def _mark(base: int, indexes: Sequence[int], rows: Mapping[int, Any], texts: Mapping[str, str]) -> QuestionScore:
    """The mark of a question, with the answer to its first wrong rotation, or to itself."""
    wrong = [index for index in indexes if not _right(index, rows, texts)]
    shown = wrong[0] if wrong else base
    rule = f"{len(indexes) - len(wrong)} of {len(indexes)} rotations right"
    text, category = texts.get(str(shown), ""), rows[base].get("category", "")
    return QuestionScore(
        str(base), float(not wrong), str(base), category, text, rows[shown]["answer"], rule, item=str(shown)
    )


def _by(names: Sequence[str], question_scores: Sequence[QuestionScore]) -> dict[str, float]:
    values = defaultdict(list)
    for name, scored in zip(names, question_scores, strict=True):
        values[name].append(scored.value)
    return {name: _percent(values[name]) for name in sorted(values)}


def _sheet_row(columns: Sequence[str], index: int, row: Mapping[str, Any], text: str | None) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for column in columns:
        if column == "index":
            cells[column] = index
        elif column == "prediction":
            cells[column] = None if text is None else cell_text(text)
        else:
            cells[column] = None if row[column] in EMPTY_CELLS else cell_text(row[column])
    return cells


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values) if values else 0.0


# --- mmbench_cn
# MMBench-CN: MMBench's questions in Chinese, asked for the letter in Chinese.


class MmBenchCn(MmBench):
    """The Chinese development split."""

    name = "mmbench_cn"
    file = "mmbench_dev_cn_20231003.tsv"
    suffix = "请直接回答选项字母。"

    def _find(self, folder: Path) -> Path:
        return find_optional(folder, "mmbench", self.file) or super()._find(folder)
