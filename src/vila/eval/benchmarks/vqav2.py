"""VQAv2: short questions about COCO images, ten human answers each (Goyal et al., CVPR 2017).

    llava_vqav2_mscoco_test-dev2015.jsonl       107,394 questions of test-dev
    llava_vqav2_mscoco_test2015.jsonl           447,793 questions, all of which the server requires
    v2_mscoco_val2014_annotations.json          annotations of the validation split, which is scored here
    v2_OpenEnded_mscoco_val2014_questions.json  its questions, used if there is no test-dev file

Only the server can score the test splits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_jsonl
from vila.eval.annotation_files import OTHER_RELEASE, iter_array
from vila.eval.annotations import (
    SHORT_ANSWER,
    AnnotatedBenchmark,
    MatchedAnswers,
    Question,
    build_items,
    check_fields,
    check_human_answers,
    format_ids,
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
from vila.eval.metrics.vqa import lmms_accuracy, most_frequent, normalize_evalai, official_accuracy

_TEST_DEV = "llava_vqav2_mscoco_test-dev2015.jsonl"
_TEST = "llava_vqav2_mscoco_test2015.jsonl"
_VAL = "v2_mscoco_val2014_annotations.json"
_VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
_SERVER = "EvalAI challenge 830, https://eval.ai/web/challenges/challenge-page/830"
_VISUALQA = "https://visualqa.org/download.html"


class Vqav2(AnnotatedBenchmark):
    """VQAv2: soft accuracy on the validation split; submission of the test splits."""

    name = "vqav2"
    max_new_tokens = 128
    skips_bad_lines = True
    server = _SERVER

    def __init__(self, folder: Path, limit: int = 0) -> None:
        super().__init__(folder, limit)
        self._annotations = self.find_optional(_VAL)
        self._questions = self.find_optional(_TEST_DEV, _VAL_QUESTIONS)
        if not (self._annotations or self._questions or self.find_optional(_TEST)):
            self.find_file(_TEST_DEV)

    def load_items(self) -> list[Item]:
        """Return the questions of test-dev, or of the validation split if only that exists, by image."""
        path = self._questions or self.find_file(_TEST_DEV)
        if path.name == _TEST_DEV:
            questions, images = read_questions(path), "test2015"
        else:
            questions, images = list(_val_questions(path)), "val2014"
        return build_items(questions, self.image_folder(images), limit=self._limit)

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Return the soft accuracy in percent over the validation split; the metrics have question and answer types.

        upstream:  official score of the normalized answers that the original script submits; a missing answer is "".
        lmms-eval: answers and human answers always normalized; every question must have an answer.
        Raises DataError if the answers are to the test splits.
        """
        if self._annotations is None:
            raise self.server_only("the test splits", f"{_VAL} is missing ({_VISUALQA})")
        known = self._known_ids()
        if not any(str(answer.question_id) in known for answer in answers):
            raise self.server_only("the test splits", f"none of {len(answers)} answers belongs to the validation split")
        matched = self.match(answers, known)
        if protocol == "lmms-eval":
            self.check_all_answered(matched, "lmms-eval scores every question")
        if self._questions is not None and self._questions.name == _VAL_QUESTIONS:
            self.check_prompts(answers, {item.id: item.prompt for item in self._items})
        return self._result(matched, protocol)

    def submission(self, answers: Sequence[Answer]) -> Submission:
        """Return the normalized answers to all questions of test2015 in the order of its file; "" if there is none."""
        ids = list(_ids(self.find_file(_TEST)))
        matched = self.match(answers, dict.fromkeys(map(str, ids)))
        rows = [{"question_id": key, "answer": normalize_evalai(matched.texts.get(str(key), ""))} for key in ids]
        checks = [
            f"{len(rows)} questions of test2015: {len(matched.texts)} answered, {len(matched.missing)} left empty"
        ]
        if test_dev := self.find_optional(_TEST_DEV):
            wanted = [str(key) for key in _ids(test_dev)]
            unanswered = [key for key in wanted if key not in matched.texts]
            checks.append(
                f"{len(wanted)} questions of test-dev2015: {len(unanswered)} without an answer"
                + (f" ({format_ids(unanswered)}), scored as wrong by the server" if unanswered else "")
            )
        return Submission(self.name, "json", rows, _SERVER, (*checks, *matched.notes()))

    def _known_ids(self) -> dict[str, None]:
        if self._limit:
            return dict.fromkeys(item.id for item in self._items)
        assert self._annotations is not None
        return dict.fromkeys(str(_checked(row, self._annotations)["question_id"]) for row in self._rows())

    def _rows(self) -> Iterable[Any]:
        assert self._annotations is not None
        return iter_array(self._annotations, "annotations")

    def _result(self, matched: MatchedAnswers, protocol: ScoringProtocol) -> BenchmarkResult:
        assert self._annotations is not None
        missing = set(matched.missing)
        scores, unnormalized = [], []
        question_types = []
        for row in self._rows():
            key = str(_checked(row, self._annotations)["question_id"])
            text = matched.texts.get(key, "")
            if key not in matched.texts and key not in missing:
                continue
            if protocol == "lmms-eval":
                value, answer = lmms_accuracy(text, row["answers"]), text
            else:
                answer = normalize_evalai(text)
                value = official_accuracy(answer, row["answers"])
                unnormalized.append(official_accuracy(text, row["answers"]))
            question_types.append((row["question_type"], value))
            truth = most_frequent([human["answer"] for human in row["answers"]])
            rule = "no answer" if key in missing else ""
            scores.append(QuestionScore(key, value, str(row["image_id"]), row["answer_type"], answer, truth, rule))
        if not scores:
            raise DataError("contains none of the evaluated questions", file=self._annotations)
        metrics: dict[str, Any] = {
            "questions": len(scores),
            "missing": len(matched.missing),
            "by_question_type": percent_by(question_types),
            "by_answer_type": percent_by((score.category, score.value) for score in scores),
        }
        if protocol == "upstream":
            metrics["not_normalised"] = percent(unnormalized)
        notes = tuple(matched.notes("scored as an empty answer" if protocol == "upstream" else ""))
        return BenchmarkResult(percent(score.value for score in scores), "%", metrics, tuple(scores), notes)


def _ids(path: Path) -> Iterable[str | int]:
    for number, row in read_jsonl(path):
        if not isinstance(row, dict) or not isinstance(row.get("question_id"), str | int):
            raise DataError("missing", file=path, record=f"line {number}", field="question_id")
        yield row["question_id"]


def _val_questions(path: Path) -> Iterable[Question]:
    for number, row in enumerate(iter_array(path, "questions"), start=1):
        record = f"question {number}"
        try:
            image = f"COCO_val2014_{row['image_id']:012d}.jpg"
            yield Question(row["question_id"], image, f"{row['question']}\n{SHORT_ANSWER}", "", path, record)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"invalid ({error!r})", file=path, record=record, expected="question_id, image_id and question"
            ) from error


def _checked(row: Any, path: Path) -> Any:
    """Return an annotation after checking its fields."""
    record = f"question {row.get('question_id') if isinstance(row, dict) else None}"
    ids: dict[str, Any] = {"question_id": (str, int), "image_id": (str, int)}
    check_fields(row, path, record, hint=OTHER_RELEASE, question_type=str, answer_type=str, answers=object, **ids)
    check_human_answers(row, path, record)
    return row
