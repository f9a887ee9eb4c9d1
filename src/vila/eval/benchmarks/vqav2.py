"""VQAv2: short questions about COCO pictures, ten human answers each (Goyal et al., CVPR 2017).

    llava_vqav2_mscoco_test-dev2015.jsonl       what is asked; 107,394 questions
    llava_vqav2_mscoco_test2015.jsonl           what the server wants an answer to; 447,793 questions
    v2_mscoco_val2014_annotations.json          answers of the validation split, which is scored here
    v2_OpenEnded_mscoco_val2014_questions.json  its questions, asked when there is no test-dev file

Only the server knows the answers of the test splits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_jsonl
from vila.eval.annotation_files import iter_array
from vila.eval.annotations import (
    SHORT_ANSWER,
    MatchedAnswers,
    Question,
    are_human_answers,
    build_items,
    check_all_answered,
    check_prompts,
    field_problem,
    find_file,
    find_optional,
    format_ids,
    image_folder,
    match_answers,
    read_questions,
)
from vila.eval.benchmark import Answer, BenchmarkResult, Item, QuestionScore, ScoringProtocol, Submission
from vila.eval.metrics.vqa import lmms_accuracy, most_frequent, normalize_evalai, official_accuracy

_TEST_DEV = "llava_vqav2_mscoco_test-dev2015.jsonl"
_TEST = "llava_vqav2_mscoco_test2015.jsonl"
_VAL = "v2_mscoco_val2014_annotations.json"
_VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
_SERVER = "EvalAI challenge 830, https://eval.ai/web/challenges/challenge-page/830"
_VISUALQA = "https://visualqa.org/download.html"


class Vqav2:
    """Asks test-dev, or the validation split where only that is there; scores the validation split."""

    name = "vqav2"
    max_new_tokens = 128
    skips_bad_lines = True  # as the original's converter does

    def __init__(self, folder: Path, limit: int = 0) -> None:
        self._folder, self._limit = folder, limit
        self._annotations = find_optional(folder, self.name, _VAL)
        self._questions = find_optional(folder, self.name, _TEST_DEV, _VAL_QUESTIONS)
        if not (self._annotations or self._questions or find_optional(folder, self.name, _TEST)):
            find_file(folder, self.name, _TEST_DEV)

    def items(self) -> Sequence[Item]:
        """The questions, picture by picture."""
        return self._items

    @cached_property
    def _items(self) -> list[Item]:
        path = self._questions or find_file(self._folder, self.name, _TEST_DEV)
        if path.name == _TEST_DEV:
            questions, pictures = read_questions(path), "test2015"
        else:
            questions, pictures = list(_val_questions(path)), "val2014"
        return build_items(questions, image_folder(self._folder, self.name, pictures), limit=self._limit)

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Soft accuracy in percent over the validation split, by type of question and of answer.

        upstream:  the official score of what the original would upload, normalised answers; without an answer is "".
        lmms-eval: both sides always normalised, every question answered.
        Raises DataError when the answers are to the test splits.
        """
        if self._annotations is None:
            raise DataError(self._server_decides(f"{_VAL} ({_VISUALQA}) is not there"))
        known = self._asked()
        if not any(str(answer.question_id) in known for answer in answers):
            raise DataError(self._server_decides(f"none of {len(answers)} answers is to the validation split"))
        joined = match_answers(self.name, answers, known)
        if protocol == "lmms-eval":
            check_all_answered(self.name, joined, "lmms-eval scores every question")
        if self._questions is not None and self._questions.name == _VAL_QUESTIONS:
            check_prompts(self.name, answers, {item.id: item.prompt for item in self._items})
        return self._scored(joined, protocol)

    def submission(self, answers: Sequence[Answer]) -> Submission:
        """Every question of test2015 in the order of its file, answers normalised, "" where there is none."""
        ids = list(_ids(find_file(self._folder, self.name, _TEST)))
        joined = match_answers(self.name, answers, dict.fromkeys(map(str, ids)))
        rows = [{"question_id": key, "answer": normalize_evalai(joined.texts.get(str(key), ""))} for key in ids]
        checks = [f"{len(rows)} questions of test2015: {len(joined.texts)} answered, {len(joined.missing)} left empty"]
        test_dev = find_optional(self._folder, self.name, _TEST_DEV)
        if test_dev:
            wanted = [str(key) for key in _ids(test_dev)]
            without = [key for key in wanted if key not in joined.texts]
            checks.append(
                f"{len(wanted)} questions of test-dev2015: {len(without)} without an answer"
                + (f" ({format_ids(without)}), which the server counts as wrong" if without else "")
            )
        return Submission(self.name, "json", rows, _SERVER, (*checks, *joined.notes()))

    def _server_decides(self, why: str) -> str:
        return (
            f"{self.name}: {why}; the server alone knows the answers of the test splits: write the file with "
            f"`vila submit` and upload it to {_SERVER}"
        )

    def _asked(self) -> dict[str, None]:
        if self._limit:
            return dict.fromkeys(item.id for item in self._items)
        assert self._annotations is not None
        return dict.fromkeys(str(_checked(row, self._annotations)["question_id"]) for row in self._rows())

    def _rows(self) -> Iterable[Any]:
        assert self._annotations is not None
        return iter_array(self._annotations, "annotations")

    def _scored(self, joined: MatchedAnswers, protocol: ScoringProtocol) -> BenchmarkResult:
        assert self._annotations is not None
        without = set(joined.missing)
        question_scores, raw = [], []
        categories: dict[str, dict[str, list[float]]] = {
            "question_type": defaultdict(list),
            "answer_type": defaultdict(list),
        }
        for row in self._rows():
            key = str(_checked(row, self._annotations)["question_id"])
            text = joined.texts.get(key, "")
            if key not in joined.texts and key not in without:
                continue
            if protocol == "lmms-eval":
                value, answer = lmms_accuracy(text, row["answers"]), text
            else:
                answer = normalize_evalai(text)
                value = official_accuracy(answer, row["answers"])
                raw.append(official_accuracy(text, row["answers"]))
            for category, points in categories.items():
                points[row[category]].append(value)
            truth = most_frequent([human["answer"] for human in row["answers"]])
            rule = "no answer" if key in without else ""
            question_scores.append(
                QuestionScore(key, value, str(row["image_id"]), row["answer_type"], answer, truth, rule)
            )
        if not question_scores:
            raise DataError(f"{self._annotations}: holds none of the questions that were asked")
        metrics: dict[str, Any] = {
            "questions": len(question_scores),
            "missing": len(joined.missing),
            "by_question_type": {
                category: _percent(points) for category, points in sorted(categories["question_type"].items())
            },
            "by_answer_type": {
                category: _percent(points) for category, points in sorted(categories["answer_type"].items())
            },
        }
        if protocol == "upstream":
            metrics["not_normalised"] = _percent(raw)
        notes = joined.notes("scored as an empty answer" if protocol == "upstream" else "")
        return BenchmarkResult(
            _percent([scored.value for scored in question_scores]), "%", metrics, tuple(question_scores), tuple(notes)
        )


def _percent(points: Sequence[float]) -> float:
    return 100 * sum(points) / len(points)


def _ids(path: Path) -> Iterable[str | int]:
    for number, row in read_jsonl(path):
        if not isinstance(row, dict) or not isinstance(row.get("question_id"), str | int):
            raise DataError(f"{path} line {number}: no question_id")
        yield row["question_id"]


def _val_questions(path: Path) -> Iterable[Question]:
    for number, row in enumerate(iter_array(path, "questions"), start=1):
        location = f"{path} question {number}"
        try:
            image = f"COCO_val2014_{row['image_id']:012d}.jpg"
            yield Question(row["question_id"], image, f"{row['question']}\n{SHORT_ANSWER}", location=location)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{location}: expected question_id, image_id and question ({error!r})") from error


def _checked(row: Any, path: Path) -> Any:
    fields = row if isinstance(row, dict) else {}
    name, humans = fields.get("question_id"), fields.get("answers")
    wanted = ("question_id", "image_id", "question_type", "answer_type", "answers")
    if lacking := [key for key in wanted if key not in fields]:
        raise DataError(f"{path}: question {name} has no {', '.join(lacking)}; is it the file of another release?")
    if odd := field_problem(fields, question_id=(str, int), image_id=(str, int), question_type=str, answer_type=str):
        raise DataError(f"{path}: question {name}: {odd}; is it the file of another release?")
    if not are_human_answers(humans):
        raise DataError(f"{path}: question {name} has no readable answers: {str(humans)[:80]!r}")
    return row
