"""MMBench: up to four options, each question repeated with rotated options (Liu et al., ECCV 2024).

    mmbench_dev_20230712.tsv    index, question, hint, A, B, C, D, answer, category, image (base64), source,
                                l2-category, comment, split; 4,377 rows

Row index + k * 1,000,000 has the options of question `index` rotated k times; a question is correct if all its
rotations are. The official score comes from a server, which asks ChatGPT about answers that name no option clearly; the
score here is that of a static matcher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.types import Image, Message
from vila.eval.annotation_files import EMPTY_CELLS, TRUNCATED, AnnotationTable, read_table
from vila.eval.annotations import AnnotatedBenchmark, MatchedAnswers, count_notes, format_ids, group_items, submit_hint
from vila.eval.benchmark import (
    Answer,
    BenchmarkResult,
    Item,
    QuestionScore,
    ScoringProtocol,
    Submission,
    percent,
    percent_by,
)
from vila.eval.benchmarks.scienceqa import LETTER_INSTRUCTION
from vila.eval.metrics.multiple_choice import parse_mmbench_rules, parse_mmbench_static
from vila.eval.submit import cell_text

_OPTIONS = "ABCD"
_ROTATION = 1_000_000
"""Index offset of a rotation."""
_DROPPED_COLUMNS = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_COLUMN = 6
_PUBLISHED_ROWS = 4377
_MMBENCH = "download.openmmlab.com/mmclassification/datasets/mmbench"
_SERVER = "MMBench, https://mmbench.opencompass.org.cn/mmbench-submission (it knows files by name: never reuse one)"
STATIC_MATCHER = "static matcher: a local approximation of the server"


class MmBench(AnnotatedBenchmark):
    """MMBench dev split, English: circular accuracy, approximated locally or from the server."""

    name = "mmbench"
    max_new_tokens = 1024
    file = "mmbench_dev_20230712.tsv"
    suffix = LETTER_INSTRUCTION
    server = _SERVER

    def __init__(self, folder: Path, limit: int = 0) -> None:
        super().__init__(folder, limit)
        self._path = self.find_file(self.file, source=f"{_MMBENCH}/{self.file}")

    def load_items(self) -> list[Item]:
        """Return an item per row, rotations of a question adjacent; images stay in the table."""
        self._table.require_columns("index", "question", "hint", *_OPTIONS, "image")
        return group_items([self._item(index, row) for index, row in self._rows.items()], self._limit)

    def _item(self, index: int, row: Mapping[str, Any]) -> Item:
        record = f"index {index}"
        if row["question"] in EMPTY_CELLS:
            raise DataError("missing", file=self._path, record=record, field="question")
        if not row["image"] or row["image"] in EMPTY_CELLS:
            raise DataError("missing", file=self._path, record=record, field="image", hint=TRUNCATED)
        options = prompt_options(row)
        letters = list(_OPTIONS[: len(options)])
        hint = "" if _is_none(row["hint"]) else f"{row['hint']}\n"
        body = hint + row["question"] + "".join(f"\n{x}. {text}" for x, text in zip(letters, options, strict=True))
        message = Message.of("user", Image(row["image"]), f"\n{body}\n{self.suffix}")
        extra = {"round_id": 0, "options": options, "option_char": letters}
        truth, category = row.get("answer", ""), row.get("category", "")
        return Item(str(index), (message,), truth, str(index % _ROTATION), category, index, body, extra=extra)

    @cached_property
    def _table(self) -> AnnotationTable:
        table = read_table(self._path, ("image",))
        table.require_columns("index")
        if not table.rows:
            raise DataError("has no rows", file=self._path, hint=TRUNCATED)
        return table

    @cached_property
    def _rows(self) -> dict[int, dict[str, Any]]:
        """Rows by index, in the order of the file."""
        out: dict[int, dict[str, Any]] = {}
        for number, row in enumerate(self._table.rows, start=1):
            text = row["index"].strip()
            if not text.isdecimal():
                raise DataError(
                    file=self._path, record=f"row {number}", field="index", value=text, expected="an integer"
                )
            if int(text) in out:
                raise DataError("repeated", file=self._path, record=f"row {number}", field="index", value=text)
            out[int(text)] = row
        return out

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Return the percentage of questions whose rotations are all correct, by the static matcher.

        Both protocols are the same: lmms-eval's matcher without ChatGPT. The last of several answers counts; a row
        without an answer is wrong. Raises DataError for a split without published answers, and if no answer is to one
        of the rows.
        """
        rows = self._scorable()
        matched, notes = self._matched(answers, rows)
        notes += matched.notes("wrong; their cells are empty in the submission file")
        notes += self.size_note(self._path.name, len(rows), _PUBLISHED_ROWS, "rows")
        rotations: dict[int, list[int]] = {index: [] for index in rows if index < _ROTATION}
        orphans = [str(index) for index in rows if index % _ROTATION not in rotations]
        for index in rows:
            rotations.get(index % _ROTATION, []).append(index)
        notes += count_notes((orphans, "rows are rotations of missing questions, ignored"))
        if not rotations:
            raise DataError(f"has only rotations, no index below {_ROTATION:,}", file=self._path)
        scores = [_score_question(base, indexes, rows, matched.texts) for base, indexes in rotations.items()]
        first_round = [_is_correct(base, rows, matched.texts) for base in rotations]
        strict = [
            all(_is_correct(index, rows, matched.texts, rules_alone=True) for index in indexes)
            for indexes in rotations.values()
        ]
        metrics: dict[str, Any] = {
            "matcher": STATIC_MATCHER,
            "circular": percent(score.value for score in scores),
            "circular_by_rules_alone": percent(strict),
            "first_round": percent(first_round),
            "questions": len(scores),
            "rows": len(rows),
            "missing": len(matched.missing),
            "by_category": percent_by((score.category, score.value) for score in scores),
        }
        if "l2-category" in self._table.columns:
            names = [rows[base]["l2-category"] for base in rotations]
            metrics["by_l2_category"] = percent_by(zip(names, (score.value for score in scores), strict=True))
        return BenchmarkResult(metrics["circular"], "%", metrics, tuple(scores), (STATIC_MATCHER, *notes))

    def _scorable(self) -> dict[int, dict[str, Any]]:
        """Return the rows of the run. Raises DataError if the table has no reference answers."""
        if "answer" not in self._table.columns:
            raise DataError("only the server can score this split", file=self._path, hint=submit_hint(_SERVER))
        self._table.require_columns(*_OPTIONS)
        rows = self._rows
        if self._limit:
            rows = {int(item.id): rows[int(item.id)] for item in self._items}
        if wrong := [f"{i} ({row['answer']!r})" for i, row in rows.items() if row["answer"] not in tuple(_OPTIONS)]:
            raise DataError(f"{len(wrong)} rows have no letter in column answer: {format_ids(wrong)}", file=self._path)
        return rows

    def _matched(self, answers: Sequence[Answer], rows: Mapping[int, Any]) -> tuple[MatchedAnswers, list[str]]:
        kept, notes = self.drop_mistyped_ids(answers, rows)
        questions = {str(index): str(row.get("question", "")) for index, row in rows.items()}
        return self.match(kept, questions), notes + self.prompt_note(kept, questions)

    def submission(self, answers: Sequence[Answer]) -> Submission:
        """Return all rows in their order: index, question, A, B, C, D, prediction, answer, split.

        A row without an answer has an empty cell, as in the original script; the checks count them.
        """
        self._table.require_columns("question", *_OPTIONS, *_DROPPED_COLUMNS)
        matched, notes = self._matched(answers, self._rows)
        columns: list[str] = [column for column in self._table.columns if column not in _DROPPED_COLUMNS]
        columns.insert(_PREDICTION_COLUMN, "prediction")
        changed = [key for key, text in matched.texts.items() if cell_text(text) != text]
        rows = [_sheet_row(columns, index, row, matched.texts.get(str(index))) for index, row in self._rows.items()]
        checks = [
            f"{len(rows):,} rows, columns {', '.join(columns)}",
            *self.size_note(self._path.name, len(rows), _PUBLISHED_ROWS, "rows"),
        ]
        checks += count_notes((changed, "answers have characters that a cell cannot hold, removed"))
        checks += notes + matched.notes("their cells are empty")
        return Submission(f"{self._path.stem}_upload", "xlsx", rows, _SERVER, tuple(checks))


def prompt_options(row: Mapping[str, Any]) -> list[str]:
    """Return the options up to the first empty one, as in the original prompt, even if more follow."""
    out: list[str] = []
    for letter in _OPTIONS:
        if _is_none(row[letter]):
            break
        out.append(row[letter])
    return out


def _is_none(cell: str) -> bool:
    return cell in EMPTY_CELLS or cell.lower() in ("nan", "none")


def _is_correct(index: int, rows: Mapping[int, Any], texts: Mapping[str, str], rules_alone: bool = False) -> bool:
    text = texts.get(str(index))
    if text is None:
        return False
    # All options of the table, also those after an empty one.
    options = {letter: rows[index][letter] for letter in _OPTIONS if rows[index][letter] not in EMPTY_CELLS}
    read = parse_mmbench_rules if rules_alone else parse_mmbench_static
    return read(text, options).letter == rows[index]["answer"]


def _score_question(
    base: int, indexes: Sequence[int], rows: Mapping[int, Any], texts: Mapping[str, str]
) -> QuestionScore:
    """Score a question; `answer` is that of the first wrong rotation, or of the question itself."""
    wrong = [index for index in indexes if not _is_correct(index, rows, texts)]
    shown = wrong[0] if wrong else base
    rule = f"{len(indexes) - len(wrong)} of {len(indexes)} rotations correct"
    text, category = texts.get(str(shown), ""), rows[base].get("category", "")
    return QuestionScore(
        str(base), float(not wrong), str(base), category, text, rows[shown]["answer"], rule, item=str(shown)
    )


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


class MmBenchCn(MmBench):
    """MMBench dev split, Chinese: circular accuracy, approximated locally or from the server."""

    name = "mmbench_cn"
    directories = ("mmbench", "mmbench_cn")
    file = "mmbench_dev_cn_20231003.tsv"
    suffix = "请直接回答选项字母。"
