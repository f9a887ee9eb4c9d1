"""SEED-Bench: multiple-choice questions of twelve types about images and videos (Li et al., CVPR 2024).

    llava-seed-bench.jsonl   questions: question_id (a number; text such as "v12" for videos), image, text
    SEED-Bench.json          {"question_type": {"Scene Understanding": 1, ...}, "questions": [{"question_id": "101669",
                              "answer": "C", "question_type_id": 1, "data_type": "image", "data_id": ...}, ...]}

A video is represented by its middle frame. VILA's "SEED" is the accuracy over all 19,242 questions, "SEED-I" that over
images.
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
from vila.eval.annotations import AnnotatedBenchmark, build_items, check_fields, read_questions
from vila.eval.benchmark import (
    Answer,
    BenchmarkResult,
    Item,
    QuestionScore,
    ScoringProtocol,
    Submission,
    percent,
)
from vila.eval.metrics.multiple_choice import parse_exact_letter, parse_first_letter

_QUESTIONS = "llava-seed-bench.jsonl"
_TRUTH = "SEED-Bench.json"
_SEED = "huggingface.co/datasets/AILab-CVC/SEED-Bench"
_HINT = f"is it the file of another release? Download it from {_SEED}"
_SERVER = "huggingface.co/spaces/AILab-CVC/SEED-Bench_Leaderboard"
_PUBLISHED = 19_242


class Seed(AnnotatedBenchmark):
    """SEED-Bench: multiple-choice accuracy on images and video frames."""

    name = "seed"
    max_new_tokens = 128
    directories = ("seed_bench",)

    def __init__(self, folder: Path, limit: int = 0) -> None:
        super().__init__(folder, limit)
        self._path = self.find_file(_TRUTH, source=_SEED)

    def load_items(self) -> list[Item]:
        """Return the questions by image."""
        path = self.find_file(_QUESTIONS)
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
            raise DataError("missing", file=self._path, field="question_type", hint=_HINT)
        types = whole["question_type"]
        check_fields(types, self._path, "question_type", hint=_HINT, **dict.fromkeys(types, (str, int)))
        if not isinstance(whole.get("questions"), list) or not whole["questions"]:
            raise DataError("missing or empty", file=self._path, field="questions", hint=_HINT)
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
        """Annotations by question id as text."""
        out: dict[str, dict[str, Any]] = {}
        for number, row in enumerate(self._annotation["questions"], start=1):
            record = f"question {number}"
            kinds: dict[str, Any] = {"question_id": (str, int), "question_type_id": (str, int), "data_type": str}
            check_fields(row, self._path, record, hint=_HINT, answer=object, **kinds)
            if row["question_type_id"] not in self._categories:
                type_id = row["question_type_id"]
                raise DataError("unknown type", file=self._path, record=record, field="question_type_id", value=type_id)
            key = str(_key(row))
            if key in out:
                raise DataError("repeated", file=self._path, record=record, field="question_id", value=key)
            out[key] = row
        return out

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Return the accuracy in percent over all questions; the metrics have images, videos and each question type.

        upstream:  the answer is exactly the letter. lmms-eval: its first character is the letter, in any case.
        The last of several answers counts; a question without an answer is wrong.
        Raises DataError if no answer is to a question of the benchmark.
        """
        truths = self.within_limit(self._truths)
        kept, notes = self.drop_mistyped_ids(answers, [_key(row) for row in truths.values()])
        matched = self.match(kept, truths)
        notes += matched.notes("scored as wrong, as in the original script")
        notes += self.size_note(self._path.name, len(truths), _PUBLISHED)
        notes += self.prompt_note(kept, {key: str(row.get("question", "")) for key, row in truths.items()})
        scores, media, categories = [], defaultdict(list), defaultdict(list)
        for key, row in truths.items():
            score = self._score_question(key, row, matched.texts.get(key), protocol)
            scores.append(score)
            media[row["data_type"]].append(score)
            categories[score.category].append(score)
        for medium in ("image", "video"):
            if not media[medium]:
                notes.append(f"no questions about {medium}s: their accuracy is undefined and reported as 0")
        ordered = [category for category in self._categories.values() if category in categories]
        for category in ordered:
            if not any(score.value for score in categories[category]):
                notes.append(f"no correct answer to {category}: 0 %, where the original script fails")
        metrics: dict[str, Any] = {
            "total": percent(score.value for score in scores),
            "image": percent(score.value for score in media["image"]),
            "video": percent(score.value for score in media["video"]),
            "questions": len(scores),
            "missing": len(matched.missing),
            "by_type": {category: percent(score.value for score in categories[category]) for category in ordered},
        }
        return BenchmarkResult(metrics["total"], "%", metrics, tuple(scores), tuple(notes))

    def _score_question(
        self, key: str, row: dict[str, Any], text: str | None, protocol: ScoringProtocol
    ) -> QuestionScore:
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
        """Return the answers in the order of the annotations. Raises DataError naming questions without an answer."""
        kept, notes = self.drop_mistyped_ids(answers, [_key(row) for row in self._truths.values()])
        matched = self.match(kept, self._truths)
        self.check_all_answered(matched, f"the server requires all questions of {self._path.name}")
        rows = [
            {"question_id": row["question_id"], "prediction": matched.texts[key]} for key, row in self._truths.items()
        ]
        checks = (f"{len(rows):,} questions in the order of the annotations, all answered", *notes, *matched.notes())
        return Submission("seed_bench_upload", "jsonl", rows, _SERVER, checks)


def _key(row: dict[str, Any]) -> str | int:
    """Return the id as in the question file: an integer if possible."""
    try:
        return int(row["question_id"])
    except (TypeError, ValueError):
        return str(row["question_id"])
