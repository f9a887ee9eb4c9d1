"""TextVQA: questions about text in images, ten human answers each, OCR tokens in the prompt (Singh et al., CVPR 2019).

    llava_textvqa_val_v051_ocr.jsonl    questions with OCR tokens: 5,000 about 3,166 images
    TextVQA_0.5.1_val.json              {"data": [{"image_id": ..., "question": ..., "answers": [10 texts], ...}]}

question_id is the id of an image; image and question text identify a question.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_json
from vila.eval.annotations import (
    AnnotatedBenchmark,
    check_fields,
    count_notes,
    format_ids,
    group_items,
    question_messages,
    read_questions,
)
from vila.eval.benchmark import Answer, BenchmarkResult, Item, QuestionScore, ScoringProtocol, percent
from vila.eval.metrics.vqa import most_frequent, normalize_evalai, soft_accuracy

_QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
_TRUTHS = "TextVQA_0.5.1_val.json"
_TEXTVQA = "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json"
_OLD_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)
_HUMANS = 10
_TIMES = "times asked"

Key = tuple[str, str]
"""Identity of a question: image id and lower-case question."""


class TextVqa(AnnotatedBenchmark):
    """TextVQA validation split: soft accuracy of answers about text in images."""

    name = "textvqa"
    max_new_tokens = 128

    def __init__(self, folder: Path, limit: int = 0) -> None:
        super().__init__(folder, limit)
        if self.find_optional(_TRUTHS) is None:
            self.find_file(_QUESTIONS)

    def load_items(self) -> list[Item]:
        """Return the questions by image, with the most frequent human answers if their file exists."""
        images = self.image_folder("train_images")
        truths = self._truths if self.find_optional(_TRUTHS) else {}
        times: Counter[Key] = Counter()
        items = []
        for question in read_questions(self.find_file(_QUESTIONS)):
            key = str(question.question_id), question_of(question.text, question.file, question.record)
            times[key] += 1
            truth = most_frequent(truths[key]["answers"]) if key in truths else ""
            messages = question_messages(images / question.image, question.text)
            items.append(Item(_name(key, times[key]), messages, truth, key[0], "", question.question_id, question.text))
        return group_items(items, self._limit)

    @cached_property
    def _truths(self) -> dict[Key, Any]:
        path = self.find_file(_TRUTHS, source=_TEXTVQA)
        rows = read_json(path)
        data = rows.get("data") if isinstance(rows, dict) else None
        if not isinstance(data, list) or not data:
            raise DataError(
                file=path, field="data", expected="a list of questions", hint=f"download it from {_TEXTVQA}"
            )
        out: dict[Key, Any] = {}
        for number, row in enumerate(data, start=1):
            _check(path, f"row {number}", row)
            key = str(row["image_id"]), row["question"].lower()
            # As in the original script, the last annotation of a question counts.
            out[key] = {**row, _TIMES: out[key][_TIMES] + 1 if key in out else 1}
        return out

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Return the soft accuracy in percent.

        upstream:  mean over the answers; repeated answers count again, questions without an answer do not count.
        lmms-eval: mean over the questions, which must have one answer each.
        Raises DataError naming an answer whose prompt contains no known question.
        """
        truths = self._truths
        expected: Mapping[Key, Any] = truths
        if self._limit:
            keys = [(item.group, question_of(item.prompt, item.id)) for item in self._items]
            expected = {key: truths[key] for key in keys if key in truths}
        scores: list[QuestionScore] = []
        seen: dict[Key, int] = {}
        for answer in answers:
            key = self._key(answer, expected)
            seen[key] = seen.get(key, 0) + 1
            scores.append(_score_question(key, answer.text, truths[key], seen[key], protocol))
        if not scores:
            raise DataError("no answers", field=self.name)
        missing = ["/".join(key) for key in expected if key not in seen]
        repeated = ["/".join(key) for key, count in seen.items() if count > truths[key].get(_TIMES, 1)]
        if protocol == "lmms-eval" and (missing or repeated):
            raise DataError(
                f"lmms-eval needs one answer per question; {len(missing)} questions have none ({format_ids(missing)}), "
                f"{len(repeated)} have several ({format_ids(repeated)})",
                field=self.name,
            )
        notes = count_notes(
            (missing, "questions without an answer, not counted, as in the original script"),
            (repeated, "questions with several answers, each one counts"),
        )
        metrics = {
            "samples": len(scores),
            "questions": len(expected),
            "missing": len(missing),
            "repeated": len(repeated),
        }
        return BenchmarkResult(percent(one.value for one in scores), "%", metrics, tuple(scores), tuple(notes))

    def _key(self, answer: Answer, expected: Mapping[Key, Any]) -> Key:
        location = answer.location or f"answer to question_id {answer.question_id}"
        key = str(answer.question_id), question_of(answer.prompt, location)
        if key not in expected:
            raise DataError(
                f"no question {key[1]!r} about image {key[0]} in {_TRUTHS}",
                file=location,
                field=self.name,
                hint="are the answers to another benchmark or split, or is the annotation file of another release?",
            )
        return key


def question_of(prompt: str, file: str | Path | None, record: str | None = None) -> str:
    """Return the lower-case question of a prompt in any of the formats of the original scripts.

    Raises DataError with `file` and `record` for any other prompt.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        match = _OLD_PROMPT.search(prompt)
        if match:
            return match.group(1).lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise DataError(
        "no question in the prompt",
        file=file,
        record=record,
        value=prompt,
        expected="'QUESTION\\nReference OCR token: TOKENS\\nSUFFIX', the first two lines swapped, 'QUESTION\\nSUFFIX', "
        "or 'OCR tokens: TOKENS Question: QUESTION Short answer:'",
    )


def _score_question(key: Key, text: str, truth: Any, count: int, protocol: ScoringProtocol) -> QuestionScore:
    humans = truth["answers"]
    if protocol == "upstream" and len(humans) != _HUMANS:
        raise DataError(
            f"{len(humans)} human answers; the score is defined for {_HUMANS}",
            file=_TRUTHS,
            record=f"question {'/'.join(key)}",
        )
    value = soft_accuracy(normalize_evalai(text), [normalize_evalai(human) for human in humans])
    rule = "" if count == 1 else "answered again"
    return QuestionScore(_name(key, count), value, key[0], "", text, most_frequent(humans), rule)


def _name(key: Key, count: int) -> str:
    return "/".join(key) + (f"#{count}" if count > 1 else "")


def _check(path: Path, record: str, row: Any) -> None:
    hint = "is it the file of another release, or of the test split?"
    check_fields(row, path, record, hint=hint, image_id=object, question=str, answers=list)
    if not row["answers"] or not all(isinstance(answer, str) for answer in row["answers"]):
        raise DataError(file=path, record=record, field="answers", value=row["answers"], expected="a list of texts")
