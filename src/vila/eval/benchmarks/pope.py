"""POPE: is there a SOMETHING in the picture? Three ways of choosing what is not there (Li et al., EMNLP 2023).

    llava_pope_test.jsonl                                   what is asked; 8,910 questions with their category
    coco/coco_pope_{random,popular,adversarial}.json        a line per question: image, text, label

The published figure is the mean of the three F1. The original pairs answers and labels by their places in the files,
which is wrong without a word when an answer is missing or out of order; here they are joined by picture and question.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_jsonl
from vila.eval.annotations import (
    Question,
    build_items,
    check_prompts,
    find_file,
    find_optional,
    format_ids,
    image_folder,
    match_answers,
    read_questions,
)
from vila.eval.benchmark import AggregateMetric, Answer, BenchmarkResult, Item, QuestionScore, ScoringProtocol

_ASKED = "llava_pope_test.jsonl"
_COCO = "coco"
_POPE = "github.com/AoiDragon/POPE, output/coco at commit e3e3926; later ones have 3,000 random questions, not 2,910"

Pair = tuple[bool, bool, str]
"""Predicted yes, truly yes, and what lmms-eval reads: the answer in small letters."""


class Pope:
    """The questions of all categories, picture by picture."""

    name = "pope"
    max_new_tokens = 128

    def __init__(self, folder: Path, limit: int = 0) -> None:
        self._folder, self._limit = folder, limit
        self._path = find_file(folder, self.name, _ASKED)

    def items(self) -> Sequence[Item]:
        """The questions; their labels where those are there."""
        return self._items

    @cached_property
    def _items(self) -> list[Item]:
        pictures = image_folder(self._folder, self.name, "val2014")
        truths = self._labels if find_optional(self._folder, self.name, _COCO) else {}
        return build_items(self._questions, pictures, truths=truths, limit=self._limit)

    @cached_property
    def _questions(self) -> list[Question]:
        return read_questions(self._path)

    @cached_property
    def _labels(self) -> dict[str, str]:
        """Yes or no by question. Raises DataError when the label files are of another release."""
        by_category: dict[str, list[Question]] = defaultdict(list)
        for question in self._questions:
            by_category[question.category].append(question)
        labels = {}
        for category, questions in by_category.items():
            path = find_file(self._folder, self.name, f"{_COCO}/coco_pope_{category}.json", obtain=_POPE)
            labels.update(_join_labels(path, questions))
        return labels

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Return the mean of the categories' F1 in percent, or lmms-eval's F1 over all questions together.

        upstream:  "no" is an answer with the word No, no or not before its first full stop; all else is "yes".
        lmms-eval: the whole answer is yes or no in any case; all else is wrong, and no part of precision and recall.
        Questions without an answer do not count in the original; under lmms-eval's rules they are empty answers.
        Raises DataError for answers to unknown questions.
        """
        categories = {question.category: None for question in self._questions}
        questions = {str(question.question_id): question for question in self._questions}
        if self._limit:
            questions = {item.id: questions[item.id] for item in self._items}
        labels = self._labels
        joined = match_answers(self.name, answers, questions)
        if joined.unknown:
            raise DataError(
                f"{self.name}: {len(joined.unknown)} answers are to questions that {self._path.name} does not have: "
                f"{format_ids(joined.unknown)}"
            )
        check_prompts(self.name, answers, {key: question.text for key, question in questions.items()})
        question_scores = []
        judged: list[tuple[str, Pair]] = []
        pairs: dict[str, list[Pair]] = {category: [] for category in categories}
        for key, question in questions.items():
            if key not in joined.texts and protocol == "upstream":
                continue
            text = joined.texts.get(key, "")
            pair = says_yes(text), labels[key] != "no", text.lower().strip()
            pairs[question.category].append(pair)
            right = _lmms_right(pair) if protocol == "lmms-eval" else pair[0] == pair[1]
            rule = "no answer" if key not in joined.texts else "read as yes" if pair[0] else "read as no"
            judged.append((question.category, pair))
            question_scores.append(
                QuestionScore(key, float(right), question.image, question.category, text, labels[key], rule)
            )
        notes = joined.notes("not counted" if protocol == "upstream" else "wrong") + self._misplaced(answers, questions)
        metrics: dict[str, Any] = {"questions": len(question_scores), "missing": len(joined.missing)}
        if protocol == "lmms-eval":
            metrics.update(_lmms_figures([pair for rows in pairs.values() for pair in rows]))
            aggregate = AggregateMetric(tuple(_lmms_counts(pair) for _, pair in judged), _mean_f1)
            return BenchmarkResult(100 * metrics["f1"], "%", metrics, tuple(question_scores), tuple(notes), aggregate)
        for category in [name for name, rows in pairs.items() if not rows]:
            notes.append(f"no answers in the category {category}: it is not part of the mean")
        answered = {category: rows for category, rows in pairs.items() if rows}
        metrics["by_category"] = {category: _figures(rows) for category, rows in answered.items()}
        metrics["pooled"] = _figures([pair for rows in pairs.values() for pair in rows])
        for category, row in metrics["by_category"].items():
            if not row["tp"]:
                notes.append(f"{category}: no true yes was found, so that F1 is not defined; it counts as 0")
        score = 100 * sum(row["f1"] for row in metrics["by_category"].values()) / len(answered)
        return BenchmarkResult(score, "%", metrics, tuple(question_scores), tuple(notes), _headline(judged))

    def _misplaced(self, answers: Sequence[Answer], questions: Mapping[str, Question]) -> list[str]:
        """Whether the original would have given answers the labels of other questions."""
        wrong = []
        for category in {question.category: None for question in questions.values()}:
            asked = [key for key, question in questions.items() if question.category == category]
            given = [str(answer.question_id) for answer in answers]
            given = [key for key in given if questions[key].category == category]
            if asked[: len(given)] != given:
                wrong.append(category)
        if not wrong:
            return []
        return [
            f"the answers of {', '.join(wrong)} are incomplete or in another order than the questions: the original, "
            "which pairs them with labels by place, would have given another figure"
        ]


def says_yes(text: str) -> bool:
    """Whether the original reads an answer as yes: whatever has no word No, no or not before its first full stop."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _join_labels(path: Path, questions: Sequence[Question]) -> dict[str, str]:
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    count = 0
    for number, row in read_jsonl(path):
        fields = ("image", "text", "label")
        lacking = [key for key in fields if not isinstance(row, dict) or not isinstance(row.get(key), str)]
        if lacking:
            raise DataError(f"{path} line {number}: lacks {', '.join(lacking)}; it comes from {_POPE}")
        rows[row["image"], row["text"].strip()].append(row["label"])
        count += 1
    if count != len(questions):
        raise DataError(
            f"{path}: {count} labels for the {len(questions)} {questions[0].category} questions of {_ASKED}: "
            f"this is another release; take {_POPE}"
        )
    labels = {}
    for question in questions:
        known = rows.get((question.image, question.text.split("\n")[0].strip()))
        if not known:
            raise DataError(
                f"{path}: no label for question {question.question_id}, {question.text[:80]!r} about {question.image}; "
                f"is it another release? It comes from {_POPE}"
            )
        # Questions that stand in the file several times are labelled in order.
        labels[str(question.question_id)] = known.pop(0)
    return labels


def _headline(judged: Sequence[tuple[str, Pair]]) -> AggregateMetric:
    """The mean of the F1 of the categories that were answered, from counts of true and false yes and false no."""
    places = {category: 3 * place for place, category in enumerate(dict.fromkeys(name for name, _ in judged))}
    parts = []
    for category, (said, true, _) in judged:
        row = [0.0] * (3 * len(places))
        if said or true:
            row[places[category] + (0 if said and true else 1 if said else 2)] = 1.0
        parts.append(tuple(row))
    return AggregateMetric(tuple(parts), _mean_f1)


def _mean_f1(sums: Sequence[float]) -> float:
    """In percent, from tp, fp and fn of one category after the other."""
    counts = [sums[start : start + 3] for start in range(0, len(sums), 3)]
    return 100 * sum(_f1(*own)["f1"] for own in counts) / len(counts)


def _figures(pairs: Iterable[Pair]) -> dict[str, float]:
    counts = Counter((said, true) for said, true, _ in pairs)
    tp, fp, tn, fn = (counts[key] for key in ((True, True), (True, False), (False, False), (False, True)))
    total = tp + fp + tn + fn
    return {
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
        "accuracy": _ratio(tp + tn, total),
        **_f1(tp, fp, fn),
        "yes_ratio": _ratio(tp + fp, total),
    }


def _lmms_right(pair: Pair) -> bool:
    return pair[2] == ("yes" if pair[1] else "no")


def _lmms_counts(pair: Pair) -> tuple[int, int, int]:
    """Whether an answer is a true yes, a false yes, a false no."""
    _, true, text = pair
    return int(text == "yes" and true), int(text == "yes" and not true), int(text == "no" and true)


def _lmms_figures(pairs: Sequence[Pair]) -> dict[str, float]:
    tp, fp, fn = (sum(column) for column in zip(*map(_lmms_counts, pairs), strict=True)) if pairs else (0, 0, 0)
    return {
        "accuracy": _ratio(sum(map(_lmms_right, pairs)), len(pairs)),
        **_f1(tp, fp, fn),
        # As there: of the labels, not of the answers.
        "yes_ratio": _ratio(sum(true for _, true, _ in pairs), len(pairs)),
    }


def _f1(tp: float, fp: float, fn: float) -> dict[str, float]:
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    return {"precision": precision, "recall": recall, "f1": _ratio(2 * precision * recall, precision + recall)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
