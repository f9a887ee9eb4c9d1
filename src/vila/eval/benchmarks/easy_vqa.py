"""easy-VQA: questions about one coloured shape in a 64 x 64 image, 13 possible answers.

    test/questions.json    [["what color is the shape?", "teal", 7], ...]: question, answer, image id
    test/images/7.png

Reported with two baselines: the most frequent answer, and the most frequent answer to each question text.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from vila.core.errors import DataError
from vila.core.reading import read_json
from vila.core.types import Image, Message
from vila.eval.annotations import format_ids, group_items
from vila.eval.benchmark import (
    Answer,
    Benchmark,
    BenchmarkResult,
    Item,
    QuestionScore,
    ScoringProtocol,
    exact_match,
)


class EasyVqa(Benchmark):
    """easy-VQA: exact-match accuracy of answers about coloured shapes."""

    name = "easy_vqa"
    max_new_tokens = 8

    def __init__(self, folder: Path, limit: int = 0, split: str = "test") -> None:
        """split: `test` or `train`. limit: approximate number of questions (images keep all of theirs); 0: all."""
        path = folder / split / "questions.json"
        if not path.is_file():
            raise DataError("no such file", file=path, hint=f"expected questions.json and images/ in {split}/")
        self._path, self._limit = path, limit

    def load_items(self) -> list[Item]:
        """Return the questions by image."""
        return group_items(_read_items(self._path), self._limit)

    def keep(self, groups: Collection[str]) -> None:
        """Keep only the questions of these groups (images)."""
        self._items = [item for item in self._items if item.group in groups]

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Return the accuracy in percent; the metrics have it by category as fractions, with the baselines."""
        predictions = _answers_by_item(self.name, answers, self._items)
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
        correct = sum(exact_match(predictions[item.id], item.truth) for item in items)
        return {
            "accuracy": correct / len(items),
            "majority": _majority_count(item.truth for item in items) / len(items),
            "blind": _blind_count(items) / len(items),
            "count": len(items),
        }


def _answers_by_item(name: str, answers: Sequence[Answer], items: Sequence[Item]) -> dict[str, str]:
    """Return the answers by item id. Raises DataError with ids unless every item has exactly one."""
    known = {str(item.question_id): item.id for item in items}
    texts: dict[str, str] = {}
    for answer in answers:
        key = answer.id or known.get(str(answer.question_id), str(answer.question_id))
        if key in texts:
            raise DataError(f"second answer to question {key}", file=answer.location or None, field=name)
        texts[key] = answer.text
    expected = {item.id for item in items}
    missing, unknown = sorted(expected - texts.keys()), sorted(texts.keys() - expected)
    problems = [
        f"{len(ids)} {what} ({format_ids(ids)})"
        for ids, what in ((missing, "questions without an answer"), (unknown, "answers to unknown questions"))
        if ids
    ]
    if problems:
        raise DataError("; ".join(problems), field=name)
    return texts


def _read_items(path: Path) -> list[Item]:
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise DataError(file=path, value=rows, expected="a list of [question, answer, image_id]")
    items = []
    for number, row in enumerate(rows):
        if not (isinstance(row, list) and len(row) == 3 and all(isinstance(text, str) for text in row[:2])):
            raise DataError(file=path, record=f"row {number + 1}", value=row, expected="[question, answer, image_id]")
        question, answer, image_id = row
        if not question.strip("? "):
            raise DataError("the question is empty", file=path, record=f"row {number + 1}", value=question)
        image = path.parent / "images" / f"{image_id}.png"
        messages = (Message.of("user", Image(image), question),)
        items.append(Item(f"{image_id}/{number}", messages, answer, str(image_id), category_of(question)))
    return items


def category_of(question: str) -> str:
    """Return `what shape`, `what color`, `yes/no shape` or `yes/no color`."""
    words = question.lower().rstrip("?").split()
    about = "color" if "color" in words or set(words) & _COLOURS else "shape"
    if words[0] == "what":
        return "what color" if "color" in words else "what shape"
    return f"yes/no {about}"


_COLOURS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}


def _majority_count(truths: Iterable[str]) -> int:
    return Counter(truths).most_common(1)[0][1]


def _blind_count(items: Sequence[Item]) -> int:
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        by_question[item.messages[-1].text][item.truth] += 1
    return sum(counter.most_common(1)[0][1] for counter in by_question.values())
