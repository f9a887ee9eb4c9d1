"""VizWiz: questions of blind people about their photos, ten human answers each (Gurari et al., CVPR 2018).

    llava_test.jsonl    8,000 questions of the test split, ids 0..7999, images VizWiz_test_00000000.jpg ...
    val.json            [{"image": "VizWiz_val_00000000.jpg", "question": ..., "answers": [{"answer": ...}], ...}]

Only the server can score the test split; the validation split is scored here. Its answers have the image name or its
number as id. "unanswerable" is an answer like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_json
from vila.eval.annotations import (
    OPTIONAL,
    SHORT_ANSWER,
    AnnotatedBenchmark,
    Question,
    build_items,
    check_fields,
    check_human_answers,
    prompt_matches,
    read_questions,
)
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
from vila.eval.metrics.vqa import most_frequent, normalize_evalai, normalize_official, one_line, soft_accuracy

_QUESTIONS = "llava_test.jsonl"
_VAL = ("val.json", "Annotations/val.json", "annotations/val.json")
_SERVER = "EvalAI challenge 2185, https://eval.ai/web/challenges/challenge-page/2185"
_VIZWIZ = "https://vizwiz.org/tasks-and-datasets/vqa/"
_HINT = f"is it the test split, whose answers are not published? Download the validation split from {_VIZWIZ}"
_UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class VizWiz(AnnotatedBenchmark):
    """VizWiz: soft accuracy on the validation split; submission of the test split."""

    name = "vizwiz"
    max_new_tokens = 128
    skips_bad_lines = True
    server = _SERVER

    def __init__(self, folder: Path, limit: int = 0) -> None:
        super().__init__(folder, limit)
        self._test_path, self._val_path = self.find_optional(_QUESTIONS), self.find_optional(*_VAL)
        if self._test_path is None and self._val_path is None:
            self.find_file(_QUESTIONS)

    def load_items(self) -> list[Item]:
        """Return the test questions, or the validation questions if only those exist; one per image."""
        if self._test_path:
            return build_items(self._questions, self.image_folder("test"), limit=self._limit)
        questions = [
            Question(image, image, f"{row['question']}\n{_UNANSWERABLE}\n{SHORT_ANSWER}", row.get("answer_type", ""))
            for image, row in self._truths.items()
        ]
        truths = {
            image: most_frequent([human["answer"] for human in row["answers"]]) for image, row in self._truths.items()
        }
        return build_items(questions, self.image_folder("val"), truths=truths, limit=self._limit)

    @cached_property
    def _questions(self) -> list[Question]:
        return read_questions(self.find_file(_QUESTIONS))

    @cached_property
    def _truths(self) -> dict[str, Any]:
        """Annotations of the validation split by image."""
        assert self._val_path is not None
        rows = read_json(self._val_path)
        if not isinstance(rows, list) or not rows:
            raise DataError(file=self._val_path, value=rows, expected="a list of questions", hint=_HINT)
        for number, row in enumerate(rows, start=1):
            _check(self._val_path, f"row {number}", row)
        return {row["image"]: row for row in rows}

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Return the soft accuracy in percent over the validation split; the metrics have each answer type.

        upstream:  score of the normalized answer that the original script submits, human answers not normalized.
        lmms-eval: answers and human answers normalized by EvalAI's processor.
        Raises DataError if the answers are to the test split, or a question has none.
        """
        if self._val_path is None:
            raise self.server_only("the test split", f"{_VAL[0]} is missing ({_VIZWIZ})")
        truths = self.within_limit(self._truths)
        renamed = self._with_image_ids(answers)
        if not any(answer.question_id in truths for answer in renamed):
            raise self.server_only("the test split", f"none of {len(answers)} answers belongs to the validation split")
        matched = self.match(renamed, truths)
        self.check_prompts(renamed, {image: row["question"] for image, row in truths.items()})
        self.check_all_answered(matched, "the original script needs all of them")
        scores = []
        for image, row in truths.items():
            humans = [human["answer"] for human in row["answers"]]
            answer = normalize_evalai(matched.texts[image])
            if protocol == "lmms-eval":
                value = soft_accuracy(answer, [normalize_evalai(human) for human in humans])
            else:
                value = soft_accuracy(normalize_official(one_line(answer)), humans)
            category = row.get("answer_type", "")
            scores.append(QuestionScore(image, value, image, category, answer, most_frequent(humans)))
        by_type = percent_by((score.category, score.value) for score in scores)
        metrics = {"questions": len(scores), "by_answer_type": by_type}
        score = percent(score.value for score in scores)
        return BenchmarkResult(score, "%", metrics, tuple(scores), tuple(matched.notes()))

    def submission(self, answers: Sequence[Answer]) -> Submission:
        """Return the normalized answer of every test image. Raises DataError naming questions without an answer."""
        matched = self.match(answers, {str(question.question_id): None for question in self._questions})
        self.check_all_answered(matched, "the server requires all of them")
        rows = [
            {"image": question.image, "answer": normalize_evalai(matched.texts[str(question.question_id)])}
            for question in self._questions
        ]
        checks = (f"{len(rows)} images of the test split, all answered", *matched.notes())
        return Submission(self.name, "json", rows, _SERVER, checks)

    def _with_image_ids(self, answers: Sequence[Answer]) -> list[Answer]:
        """Replace question ids by image names where they are known.

        If the test questions exist, a number is an id of the test split, unless all prompts are those of the validation
        split.
        """
        images = {str(question.question_id): question.image for question in self._questions} if self._test_path else {}
        known, numbered = set(self._truths), {_number(image): image for image in self._truths}
        numbered_answers = [
            (answer, numbered[key]) for answer in answers if (key := str(answer.question_id)) in numbered
        ]
        is_validation = not self._test_path or (
            bool(numbered_answers)
            and all(prompt_matches(answer, self._truths[image]["question"]) for answer, image in numbered_answers)
        )
        out = []
        for answer in answers:
            key = str(answer.question_id)
            image = next((name for name in (key, f"{key}.jpg", Path(key).name) if name in known), images.get(key))
            if image not in known and is_validation:
                image = numbered.get(key, image)
            out.append(Answer(image or key, answer.text, answer.prompt, answer.location, answer.id))
        return out


def _number(image: str) -> str:
    """Return the number in an image name: `VizWiz_val_00000012.jpg` gives 12."""
    digits = Path(image).stem.rsplit("_", 1)[-1]
    return str(int(digits)) if digits.isdecimal() else image


def _check(path: Path, record: str, row: Any) -> None:
    check_fields(row, path, record, hint=_HINT, image=str, question=str, answers=object, answer_type=(str, OPTIONAL))
    check_human_answers(row, path, record)
