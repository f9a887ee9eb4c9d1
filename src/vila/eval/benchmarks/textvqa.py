"""TextVQA: questions on text in pictures, ten human answers each (Singh et al., CVPR 2019), with OCR tokens as a hint.

    llava_textvqa_val_v051_ocr.jsonl    what is asked, with OCR tokens; 5,000 rows about 3,166 pictures
    TextVQA_0.5.1_val.json              {"data": [{"image_id": ..., "question": ..., "answers": [10 texts], ...}]}

A question_id is a picture's, so a question is known by its picture and its words.
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
    find_file,
    find_optional,
    format_ids,
    group_items,
    image_folder,
    question_messages,
    read_questions,
)
from vila.eval.benchmark import Answer, BenchmarkResult, Item, QuestionScore, ScoringProtocol
from vila.eval.metrics.vqa import most_frequent, normalize_evalai, soft_accuracy

_ASKED = "llava_textvqa_val_v051_ocr.jsonl"
_TRUTHS = "TextVQA_0.5.1_val.json"
_TEXTVQA = "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json"
_OLD_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)
_HUMANS = 10
_TIMES = "times asked"

Key = tuple[str, str]
"""Of a question: its picture, and its words in small letters."""


class TextVqa:
    """The validation questions."""

    name = "textvqa"
    max_new_tokens = 128

    def __init__(self, folder: Path, limit: int = 0) -> None:
        self._folder, self._limit = folder, limit
        if find_optional(folder, self.name, _TRUTHS) is None:
            find_file(folder, self.name, _ASKED)

    def items(self) -> Sequence[Item]:
        """The questions, picture by picture; their most frequent answers where those are there."""
        return self._items

    @cached_property
    def _items(self) -> list[Item]:
        pictures = image_folder(self._folder, self.name, "train_images")
        truths = self._truths if find_optional(self._folder, self.name, _TRUTHS) else {}
        times: Counter[Key] = Counter()
        items = []
        for question in read_questions(find_file(self._folder, self.name, _ASKED)):
            key = str(question.question_id), question_of(question.text, question.location)
            times[key] += 1
            truth = most_frequent(truths[key]["answers"]) if key in truths else ""
            messages = question_messages(pictures / question.image, question.text)
            items.append(Item(_name(key, times[key]), messages, truth, key[0], "", question.question_id, question.text))
        return group_items(items, self._limit)

    @cached_property
    def _truths(self) -> dict[Key, Any]:
        path = find_file(self._folder, self.name, _TRUTHS, obtain=_TEXTVQA)
        rows = read_json(path)
        data = rows.get("data") if isinstance(rows, dict) else None
        if not isinstance(data, list) or not data:
            raise DataError(f"{path}: expected an object with a list under 'data'; it comes from {_TEXTVQA}")
        out: dict[Key, Any] = {}
        for number, row in enumerate(data, start=1):
            _check(f"{path} row {number}", row)
            key = str(row["image_id"]), row["question"].lower()
            # As in the original, the last of several annotations of one question counts.
            out[key] = {**row, _TIMES: out[key][_TIMES] + 1 if key in out else 1}
        return out

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Soft accuracy in percent.

        upstream:  the mean over the rows given: a repeated row counts again, a question without a row does not count.
        lmms-eval: the mean over the questions; each has one answer.
        Raises DataError naming a row whose question cannot be read from its prompt, or is not in the annotations.
        """
        truths = self._truths
        asked: Mapping[Key, Any] = truths
        if self._limit:
            keys = [(item.group, question_of(item.prompt, item.id)) for item in self._items]
            asked = {key: truths[key] for key in keys if key in truths}
        question_scores: list[QuestionScore] = []
        seen: dict[Key, int] = {}
        for answer in answers:
            key = self._key(answer, asked)
            seen[key] = seen.get(key, 0) + 1
            question_scores.append(_mark(key, answer.text, truths[key], seen[key], protocol))
        if not question_scores:
            raise DataError(f"{self.name}: no answers were given")
        missing = ["/".join(key) for key in asked if key not in seen]
        repeated = ["/".join(key) for key, count in seen.items() if count > truths[key].get(_TIMES, 1)]
        if protocol == "lmms-eval" and (missing or repeated):
            raise DataError(
                f"{self.name}: lmms-eval scores one answer to every question; {len(missing)} have none "
                f"({format_ids(missing)}), {len(repeated)} have several ({format_ids(repeated)})"
            )
        notes = []
        if missing:
            notes.append(
                f"{len(missing)} questions without an answer, not counted, as in the original: {format_ids(missing)}"
            )
        if repeated:
            notes.append(
                f"{len(repeated)} questions answered more than once, each answer counts: {format_ids(repeated)}"
            )
        metrics = {
            "samples": len(question_scores),
            "questions": len(asked),
            "missing": len(missing),
            "repeated": len(repeated),
        }
        return BenchmarkResult(
            100 * sum(scored.value for scored in question_scores) / len(question_scores),
            "%",
            metrics,
            tuple(question_scores),
            tuple(notes),
        )

    def _key(self, answer: Answer, asked: Mapping[Key, Any]) -> Key:
        location = answer.location or f"the answer to question_id {answer.question_id}"
        key = str(answer.question_id), question_of(answer.prompt, f"{self.name}: {location}")
        if key not in asked:
            raise DataError(
                f"{self.name}: {location}: no question {key[1]!r} about image {key[0]} in {_TRUTHS}; are the answers "
                "to another benchmark or split, or is the annotation file of another release?"
            )
        return key


def question_of(prompt: str, location: str) -> str:
    """The question in small letters, read from any of the prompts that the original has written.

    Raises DataError, naming `where`, for any other prompt; the original stops there.
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
        f"{location}: no question can be read from the prompt {prompt[:120]!r}; expected 'QUESTION\\nReference OCR "
        "token: TOKENS\\nSUFFIX', the first two lines exchanged, 'QUESTION\\nSUFFIX', or 'OCR tokens: TOKENS "
        "Question: QUESTION Short answer:'"
    )


def _mark(key: Key, text: str, truth: Any, count: int, protocol: ScoringProtocol) -> QuestionScore:
    humans = truth["answers"]
    if protocol == "upstream" and len(humans) != _HUMANS:
        raise DataError(
            f"textvqa: {_TRUTHS}: {len(humans)} answers to {'/'.join(key)}; the score is defined for {_HUMANS}"
        )
    value = soft_accuracy(normalize_evalai(text), [normalize_evalai(human) for human in humans])
    rule = "" if count == 1 else "answered again"
    return QuestionScore(_name(key, count), value, key[0], "", text, most_frequent(humans), rule)


def _name(key: Key, count: int) -> str:
    return "/".join(key) + (f"#{count}" if count > 1 else "")


def _check(location: str, row: Any) -> None:
    lacking = [field for field in ("image_id", "question", "answers") if not isinstance(row, dict) or field not in row]
    if lacking:
        raise DataError(
            f"{location}: lacks {', '.join(lacking)}; is it the file of another release, or of the test split?"
        )
    if (
        not isinstance(row["question"], str)
        or not isinstance(row["answers"], list)
        or not row["answers"]
        or not all(isinstance(a, str) for a in row["answers"])
    ):
        raise DataError(
            f"{location}: question {row['question']!r} has no readable answers: {str(row['answers'])[:80]!r}"
        )
