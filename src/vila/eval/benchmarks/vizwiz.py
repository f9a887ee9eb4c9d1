"""VizWiz: questions that blind people asked about pictures they took (Gurari et al., CVPR 2018), ten human answers.

    llava_test.jsonl    what is asked; 8,000 questions, ids 0..7999, pictures VizWiz_test_00000000.jpg ...
    val.json            [{"image": "VizWiz_val_00000000.jpg", "question": ..., "answers": [{"answer": ...}], ...}]

Only the server knows the answers of the test split; the validation split is scored here. Answers to it name their
picture, or are numbered as its pictures are. "unanswerable" is an answer like any other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_json
from vila.eval.annotations import (
    SHORT_ANSWER,
    Question,
    are_human_answers,
    build_items,
    check_all_answered,
    check_prompts,
    field_problem,
    find_file,
    find_optional,
    image_folder,
    match_answers,
    prompt_matches,
    read_questions,
)
from vila.eval.benchmark import Answer, BenchmarkResult, Item, QuestionScore, ScoringProtocol, Submission
from vila.eval.metrics.vqa import most_frequent, normalize_evalai, normalize_official, one_line, soft_accuracy

_ASKED = "llava_test.jsonl"
_VAL = ("val.json", "Annotations/val.json", "annotations/val.json")
_SERVER = "EvalAI challenge 2185, https://eval.ai/web/challenges/challenge-page/2185"
_VIZWIZ = "https://vizwiz.org/tasks-and-datasets/vqa/"
_UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class VizWiz:
    """Asks the test split, or the validation split where only that is there; scores the validation split."""

    name = "vizwiz"
    max_new_tokens = 128
    skips_bad_lines = True  # as the original's converter does

    def __init__(self, folder: Path, limit: int = 0) -> None:
        self._folder, self._limit = folder, limit
        self._asked = find_optional(folder, self.name, _ASKED)
        self._val = find_optional(folder, self.name, *_VAL)
        if self._asked is None and self._val is None:
            find_file(folder, self.name, _ASKED)

    def items(self) -> Sequence[Item]:
        """The questions, a picture each."""
        return self._items

    @cached_property
    def _items(self) -> list[Item]:
        if self._asked:
            pictures = image_folder(self._folder, self.name, "test")
            return build_items(self._questions, pictures, limit=self._limit)
        questions = [
            Question(image, image, f"{row['question']}\n{_UNANSWERABLE}\n{SHORT_ANSWER}", row.get("answer_type", ""))
            for image, row in self._truths.items()
        ]
        truths = {
            image: most_frequent([human["answer"] for human in row["answers"]]) for image, row in self._truths.items()
        }
        return build_items(questions, image_folder(self._folder, self.name, "val"), truths=truths, limit=self._limit)

    @cached_property
    def _questions(self) -> list[Question]:
        return read_questions(find_file(self._folder, self.name, _ASKED))

    @cached_property
    def _truths(self) -> dict[str, Any]:
        """Rows of the validation split by picture."""
        assert self._val is not None
        rows = read_json(self._val)
        if not isinstance(rows, list) or not rows:
            raise DataError(f"{self._val}: expected a list of questions; it comes from {_VIZWIZ}")
        for number, row in enumerate(rows, start=1):
            _check(f"{self._val} row {number}", row)
        return {row["image"]: row for row in rows}

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Soft accuracy in percent over the validation split, by type of answer.

        upstream:  what the original would upload, as the public VizWiz code scores it: human answers as they are.
        lmms-eval: both sides through EvalAI's processor.
        Raises DataError when the answers are to the test split, or a question has none: the original stops there.
        """
        if self._val is None:
            raise DataError(self._server_decides(f"{_VAL[0]} ({_VIZWIZ}) is not there"))
        truths = self._truths
        if self._limit:
            truths = {item.group: truths[item.group] for item in self._items if item.group in truths}
        renamed = self._by_picture(answers)
        if not any(answer.question_id in truths for answer in renamed):
            raise DataError(self._server_decides(f"none of {len(answers)} answers is to the validation split"))
        joined = match_answers(self.name, renamed, truths)
        check_prompts(self.name, renamed, {image: row["question"] for image, row in truths.items()})
        check_all_answered(self.name, joined, "all are wanted, as by the original's converter")
        categories: dict[str, list[float]] = defaultdict(list)
        question_scores = []
        for image, row in truths.items():
            humans = [human["answer"] for human in row["answers"]]
            answer = normalize_evalai(joined.texts[image])
            if protocol == "lmms-eval":
                value = soft_accuracy(answer, [normalize_evalai(human) for human in humans])
            else:
                value = soft_accuracy(normalize_official(one_line(answer)), humans)
            category = row.get("answer_type", "")
            categories[category].append(value)
            question_scores.append(QuestionScore(image, value, image, category, answer, most_frequent(humans)))
        metrics = {
            "questions": len(question_scores),
            "by_answer_type": {
                category: 100 * sum(values) / len(values) for category, values in sorted(categories.items())
            },
        }
        score = 100 * sum(scored.value for scored in question_scores) / len(question_scores)
        return BenchmarkResult(score, "%", metrics, tuple(question_scores), tuple(joined.notes()))

    def submission(self, answers: Sequence[Answer]) -> Submission:
        """Every picture of the test split with its normalised answer. DataError naming questions without one."""
        joined = match_answers(self.name, answers, {str(question.question_id): None for question in self._questions})
        check_all_answered(self.name, joined, "the server wants all of them")
        rows = [
            {"image": question.image, "answer": normalize_evalai(joined.texts[str(question.question_id)])}
            for question in self._questions
        ]
        checks = (f"{len(rows)} pictures of the test split, all answered", *joined.notes())
        return Submission(self.name, "json", rows, _SERVER, checks)

    def _server_decides(self, why: str) -> str:
        return (
            f"{self.name}: {why}; the server alone knows the answers of the test split: write the file with "
            f"`vila submit` and upload it to {_SERVER}"
        )

    def _by_picture(self, answers: Sequence[Answer]) -> list[Answer]:
        """Answers with a picture's name for an id, where it is known.

        A number is the test split's where that is there too, unless all rows repeat the validation split's questions.
        """
        pictures = {str(question.question_id): question.image for question in self._questions} if self._asked else {}
        known, numbered = set(self._truths), {_number(image): image for image in self._truths}
        told = [(answer, numbered[key]) for answer in answers if (key := str(answer.question_id)) in numbered]
        validation = not self._asked or (
            bool(told) and all(prompt_matches(answer, self._truths[image]["question"]) for answer, image in told)
        )
        out = []
        for answer in answers:
            key = str(answer.question_id)
            image = next((name for name in (key, f"{key}.jpg", Path(key).name) if name in known), pictures.get(key))
            if image not in known and validation:
                image = numbered.get(key, image)
            out.append(Answer(image or key, answer.text, answer.prompt, answer.location, answer.id))
        return out


def _number(image: str) -> str:
    """`VizWiz_val_00000012.jpg`: 12, as questions of the original's files are numbered."""
    digits = Path(image).stem.rsplit("_", 1)[-1]
    return str(int(digits)) if digits.isdecimal() else image


def _check(location: str, row: Any) -> None:
    lacking = [key for key in ("image", "question", "answers") if not isinstance(row, dict) or key not in row]
    if lacking:
        raise DataError(
            f"{location}: lacks {', '.join(lacking)}; is it the test split, whose answers are not published?"
        )
    if odd := field_problem(row, image=str, question=str, answer_type=str):
        raise DataError(f"{location}: {odd}; it comes from {_VIZWIZ}")
    if not are_human_answers(row["answers"]):
        raise DataError(f"{location}: {row['image']} has no readable answers: {str(row['answers'])[:80]!r}")
