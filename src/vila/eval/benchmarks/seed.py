"""SEED-Bench: four options, twelve kinds of questions about pictures and clips (Li et al., CVPR 2024).

    llava-seed-bench.jsonl   what is asked: question_id (a number; text such as "v12" for clips), image, text
    SEED-Bench.json          {"question_type": {"Scene Understanding": 1, ...}, "questions": [{"question_id": "101669",
                              "answer": "C", "question_type_id": 1, "data_type": "image", "data_id": ...}, ...]}

A clip is shown as its middle frame. VILA's "SEED" is the accuracy over all 19,242 questions, "SEED-I" over pictures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_json
from vila.eval.annotations import (
    build_items,
    check_all_answered,
    drop_mistyped_ids,
    field_problem,
    find_file,
    match_answers,
    prompt_note,
    read_questions,
    size_note,
)
from vila.eval.benchmark import Answer, BenchmarkResult, Item, QuestionScore, ScoringProtocol, Submission
from vila.eval.metrics.multiple_choice import parse_exact_letter, parse_first_letter

_ASKED = "llava-seed-bench.jsonl"
_TRUTH = "SEED-Bench.json"
_SEED = "huggingface.co/datasets/AILab-CVC/SEED-Bench"
_SERVER = "huggingface.co/spaces/AILab-CVC/SEED-Bench_Leaderboard"
_FIELDS = ("question_id", "answer", "question_type_id", "data_type")
_PUBLISHED = 19_242


class Seed:
    """Questions about pictures and about middle frames of clips."""

    name = "seed"
    max_new_tokens = 128

    def __init__(self, folder: Path, limit: int = 0) -> None:
        self._folder, self._limit = folder, limit
        self._path = find_file(folder, "seed_bench", _TRUTH, obtain=_SEED)

    def items(self) -> Sequence[Item]:
        """The questions, picture by picture."""
        return self._items

    @cached_property
    def _items(self) -> list[Item]:
        path = find_file(self._folder, "seed_bench", _ASKED)
        truths = {key: str(row["answer"]) for key, row in self._truths.items()}
        items = build_items(read_questions(path), path.parent, truths=truths, limit=self._limit)
        return [
            replace(item, category=self._categories[self._truths[item.id]["question_type_id"]])
            if item.id in self._truths
            else item
            for item in items
        ]

    @cached_property
    def _annotation(self) -> dict[str, Any]:
        whole = read_json(self._path)
        if not isinstance(whole, dict) or not isinstance(whole.get("question_type"), dict):
            raise DataError(f"{self._path}: has no question_type; is it another release? It comes from {_SEED}")
        if odd := field_problem(whole["question_type"], **dict.fromkeys(whole["question_type"], (str, int))):
            raise DataError(f"{self._path}: question_type: {odd}; it comes from {_SEED}")
        if not isinstance(whole.get("questions"), list) or not whole["questions"]:
            raise DataError(f"{self._path}: has no questions; it comes from {_SEED}")
        return whole

    @cached_property
    def _categories(self) -> dict[Any, str]:
        """Names of the kinds by number, in the order of numbers."""
        pairs = self._annotation["question_type"].items()
        return {
            number: category for category, number in sorted(pairs, key=lambda pair: (isinstance(pair[1], str), pair[1]))
        }

    @cached_property
    def _truths(self) -> dict[str, dict[str, Any]]:
        """The annotation's questions by id, as text."""
        out: dict[str, dict[str, Any]] = {}
        for number, row in enumerate(self._annotation["questions"], start=1):
            location = f"{self._path} question {number}"
            lacking = [key for key in _FIELDS if not isinstance(row, dict) or key not in row]
            if lacking:
                name = row.get("question_id", "without an id") if isinstance(row, dict) else str(row)[:40]
                raise DataError(f"{location} ({name}): lacks {', '.join(lacking)}; it comes from {_SEED}")
            if odd := field_problem(row, question_id=(str, int), question_type_id=(str, int), data_type=str):
                raise DataError(f"{location}: {odd}; it comes from {_SEED}")
            if row["question_type_id"] not in self._categories:
                raise DataError(
                    f"{location} ({row['question_id']}): question_type_id {row['question_type_id']!r} has no name"
                )
            key = str(_key(row))
            if key in out:
                raise DataError(f"{location}: question_id {key} is given a second time")
            out[key] = row
        return out

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Accuracy in percent over all questions; over pictures, clips and each kind in the figures.

        upstream:  the whole answer is the letter, nothing forgiven. lmms-eval: its first character is, in any case.
        The last of several answers counts; a question without one is wrong.
        Raises DataError when no answer is to a question of the benchmark.
        """
        truths = self._truths
        if self._limit:
            truths = {item.id: truths[item.id] for item in self._items if item.id in truths}
        kept, notes = drop_mistyped_ids(self.name, answers, [_key(row) for row in truths.values()])
        joined = match_answers(self.name, kept, truths)
        notes += joined.notes("wrong, as upstream counts them")
        notes += [] if self._limit else size_note(self._path.name, len(truths), _PUBLISHED)
        notes += prompt_note(self.name, kept, {key: str(row.get("question", "")) for key, row in truths.items()})
        question_scores, media, categories = [], defaultdict(list), defaultdict(list)
        for key, row in truths.items():
            scored = self._mark(key, row, joined.texts.get(key), protocol)
            question_scores.append(scored)
            media[row["data_type"]].append(scored)
            categories[scored.category].append(scored)
        for medium in ("image", "video"):
            if not media[medium]:
                notes.append(f"no question is about {medium}s: the accuracy over those is not defined, given as 0")
        ordered = [category for category in self._categories.values() if category in categories]
        for category in ordered:
            if not any(scored.value for scored in categories[category]):
                notes.append(f"no answer of the kind {category} is right: 0 %, where the original stops")
        metrics: dict[str, Any] = {
            "total": _percent(question_scores),
            "image": _percent(media["image"]),
            "video": _percent(media["video"]),
            "questions": len(question_scores),
            "missing": len(joined.missing),
            "by_type": {category: _percent(categories[category]) for category in ordered},
        }
        return BenchmarkResult(metrics["total"], "%", metrics, tuple(question_scores), tuple(notes))

    def _mark(self, key: str, row: dict[str, Any], text: str | None, protocol: ScoringProtocol) -> QuestionScore:
        category, truth, group = (
            self._categories[row["question_type_id"]],
            str(row["answer"]),
            str(row.get("data_id", "")),
        )
        if text is None:
            return QuestionScore(key, 0.0, group, category, "", truth, "no answer")
        if protocol == "lmms-eval":
            letter, rule = parse_first_letter(text)
            return QuestionScore(key, float(letter == truth.strip().upper()), group, category, text, truth, rule)
        letter, rule = parse_exact_letter(text)
        return QuestionScore(key, float(letter == truth), group, category, text, truth, rule)

    def submission(self, answers: Sequence[Answer]) -> Submission:
        """Every question in the annotation's order with its answer as it is. DataError naming those without one."""
        kept, notes = drop_mistyped_ids(self.name, answers, [_key(row) for row in self._truths.values()])
        joined = match_answers(self.name, kept, self._truths)
        check_all_answered(self.name, joined, f"the server wants all of {self._path.name}, and the original stops here")
        rows = [
            {"question_id": row["question_id"], "prediction": joined.texts[key]} for key, row in self._truths.items()
        ]
        checks = (f"{len(rows):,} questions in the annotation's order, all answered", *notes, *joined.notes())
        return Submission("seed_bench_upload", "jsonl", rows, _SERVER, checks)


def _key(row: dict[str, Any]) -> str | int:
    """The id as the original's question file has it: a number where it is one."""
    try:
        return int(row["question_id"])
    except (TypeError, ValueError):
        return str(row["question_id"])


def _percent(question_scores: Sequence[QuestionScore]) -> float:
    return 100 * sum(scored.value for scored in question_scores) / len(question_scores) if question_scores else 0.0
