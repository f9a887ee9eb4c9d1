"""easy-VQA: one coloured shape in a 64 x 64 picture, 13 answers.

    ["what color is the shape?", "teal", 7]     and     test/images/7.png

Exact match of the whole answer. Reported by kind of question, beside what the majority answer and the best blind
guess (the most frequent answer to each question's wording, over the test set itself) reach.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_json
from vila.core.types import Image, Message
from vila.eval.benchmark import (
    Answer,
    BenchmarkResult,
    Item,
    QuestionScore,
    ScoringProtocol,
    answers_by_item,
    exact_match,
)


class EasyVqa:
    """The questions of one split of an easy-VQA folder."""

    name = "easy_vqa"
    max_new_tokens = 8

    def __init__(self, folder: Path, limit: int = 0, split: str = "test") -> None:
        """limit: take about this many questions, whole pictures at a time; 0 takes all."""
        path = folder / split / "questions.json"
        if not path.is_file():
            raise DataError(
                f"{path}: missing; expected an easy-VQA folder with {split}/questions.json and {split}/images/"
            )
        self._items = _items(path, read_json(path))
        if limit:
            self.keep(_first_groups(self._items, limit))

    def items(self) -> Sequence[Item]:
        """The questions, picture by picture."""
        return self._items

    def keep(self, groups: Collection[str]) -> None:
        """Keep only the questions about these pictures."""
        self._items = [item for item in self._items if item.group in groups]

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Accuracy in all and by kind, 0..1 in the figures, with the majority's and the best blind guess beside."""
        predictions = answers_by_item(self.name, answers, self._items)
        by_category: dict[str, list[Item]] = defaultdict(list)
        for item in self._items:
            by_category[item.category].append(item)
        whole = self._row(self._items, predictions)
        metrics = {
            **whole,
            "by_type": {category: self._row(items, predictions) for category, items in sorted(by_category.items())},
        }
        question_scores = [
            QuestionScore(item.id, value, item.group, item.category, predictions[item.id], item.truth)
            for item in self._items
            for value in [float(exact_match(predictions[item.id], item.truth))]
        ]
        return BenchmarkResult(100 * whole["accuracy"], "%", metrics, tuple(question_scores))

    def _row(self, items: Sequence[Item], predictions: Mapping[str, str]) -> dict[str, float]:
        right = sum(exact_match(predictions[item.id], item.truth) for item in items)
        return {
            "accuracy": right / len(items),
            "majority": _best_constant(item.truth for item in items) / len(items),
            "blind": _best_blind(items) / len(items),
            "count": len(items),
        }


def _items(path: Path, rows: Any) -> list[Item]:
    if not isinstance(rows, list) or not rows:
        raise DataError(file=path, value=rows, expected="a list of [question, answer, image_id]")
    items = []
    for number, row in enumerate(rows):
        if not (isinstance(row, list) and len(row) == 3 and all(isinstance(text, str) for text in row[:2])):
            raise DataError(f"{path} row {number + 1}: expected [question, answer, image_id], got {str(row)[:80]!r}")
        question, answer, image_id = row
        if not question.strip("? "):
            raise DataError("the question is empty", file=path, record=f"row {number + 1}", value=question)
        picture = path.parent / "images" / f"{image_id}.png"
        messages = (Message.of("user", Image(picture), question),)
        items.append(Item(f"{image_id}/{number}", messages, answer, str(image_id), kind_of(question)))
    # Questions of one picture together, pictures in order of first appearance.
    order = {group: place for place, group in enumerate(dict.fromkeys(item.group for item in items))}
    return sorted(items, key=lambda item: order[item.group])


def kind_of(question: str) -> str:
    """`what shape`, `what color`, or `yes/no` about shape or colour."""
    words = question.lower().rstrip("?").split()
    about = "color" if "color" in words or set(words) & _COLOURS else "shape"
    if words[0] == "what":
        return "what color" if "color" in words else "what shape"
    return f"yes/no {about}"


_COLOURS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}


def _first_groups(items: Sequence[Item], limit: int) -> set[str]:
    kept: set[str] = set()
    for count, item in enumerate(items):
        if count >= limit and item.group not in kept:
            break
        kept.add(item.group)
    return kept


def _best_constant(truths: Iterable[str]) -> int:
    return Counter(truths).most_common(1)[0][1]


def _best_blind(items: Sequence[Item]) -> int:
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        by_question[item.messages[-1].text][item.truth] += 1
    return sum(counter.most_common(1)[0][1] for counter in by_question.values())
