"""MME: two yes-or-no questions about every picture, in fourteen categories (Fu et al., arXiv 2306.13394).

    llava_mme.jsonl                                     what is asked; question_id OCR/0001.jpg, or
                                                        artwork/images/0001.jpg where the category has folders
    MME_Benchmark_release_version/OCR/0001.txt          question, tab, Yes or No; two lines. In five categories
    .../artwork/questions_answers_YN/0001.txt           texts and pictures have folders of their own

A category gives acc + acc+: percent of questions, and of pictures with both questions, that are right. The published
figure is the sum over the ten categories of perception, 2000 at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.eval.annotations import find_file, format_ids, group_items, question_messages, read_questions, size_note
from vila.eval.benchmark import AggregateMetric, Answer, BenchmarkResult, Item, QuestionScore, ScoringProtocol
from vila.eval.metrics.yes_no import (
    Key,
    Row,
    key_of,
    misplaced,
    pair_up,
    picture_of,
    read_lmms,
    read_truths,
    read_upstream,
)

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_ASKED = "llava_mme.jsonl"
_RELEASE = "MME_Benchmark_release_version"
_MME = "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation (by application)"
_PUBLISHED = 2374

Pairs = Mapping[str, Mapping[str, Sequence[tuple[Row, Row]]]]
"""Answers to the two questions about an image, as often as they were given, by category and image."""


class Mme:
    """Both questions of all pictures."""

    name = "mme"
    max_new_tokens = 128

    def __init__(self, folder: Path, limit: int = 0) -> None:
        self._folder, self._limit = folder, limit
        self._release = find_file(folder, "MME", _RELEASE, obtain=_MME)

    def items(self) -> Sequence[Item]:
        """The questions, picture by picture; ids are the original's with the question's place, from 1, behind `#`."""
        return self._items

    @cached_property
    def _items(self) -> list[Item]:
        questions = read_questions(find_file(self._folder, "MME", _ASKED))
        items = []
        for question in questions:
            if not isinstance(question.question_id, str) or "/" not in question.question_id:
                raise DataError(f"{question.location}: question_id {question.question_id!r} is not CATEGORY/FILE")
            key = key_of(question.question_id, question.text, self._truths)
            name, group = self._mark_id(question.question_id, key), picture_of(key)
            messages = question_messages(self._release / question.image, question.text)
            truth = self._truths.get(key, "")
            items.append(Item(name, messages, truth, group, key[0], question.question_id, question.text))
        if twice := [name for name, count in Counter(item.id for item in items).items() if count > 1]:
            raise DataError(f"{_ASKED}: questions that are asked twice: {format_ids(twice)}")
        return group_items(items, self._limit)

    @cached_property
    def _truths(self) -> dict[Key, str]:
        """Yes or No by question. Raises DataError naming file and line."""
        out: dict[Key, str] = {}
        for category in sorted(path for path in self._release.iterdir() if path.is_dir()):
            own = category / "questions_answers_YN"
            for path in sorted((own if (category / "images").is_dir() or own.is_dir() else category).glob("*.txt")):
                out.update({(category.name, path.name, question): truth for question, truth in read_truths(path)})
        if not out:
            raise DataError(f"{self._release}: holds no questions with answers; it comes from {_MME}")
        return out

    @cached_property
    def _places(self) -> dict[Key, int]:
        """Where a question stands in its file, from 1."""
        counts: Counter[str] = Counter()
        places = {}
        for key in self._truths:
            counts[picture_of(key)] += 1
            places[key] = counts[picture_of(key)]
        return places

    def _mark_id(self, question_id: str, key: Key) -> str:
        return f"{question_id}#{self._places.get(key, key[2])}"

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Return the points of perception; of cognition and each category in the figures. Marks are by question.

        upstream:  yes or no within the first four characters, as they are; a pair given twice counts twice, an image
                   without answers does not count.
        lmms-eval: ends and full stops stripped first, a lone y or n counts; a pair given twice is refused, an image
                   without answers counts as two empty ones.
        The two answers about an image belong together wherever they stand. Categories without answers give no points.
        Raises DataError naming ids: questions that MME does not have, pictures whose two questions are not answered
        equally often. The original stops there too, or pairs answers about different pictures.
        """
        rows, notes = self._rows(answers, in_lines=protocol == "upstream")
        pairs = pair_up(self.name, rows, once=protocol == "lmms-eval")
        notes += self._gaps(pairs, "wrong" if protocol == "lmms-eval" else "not counted") + misplaced(rows)
        absent = [name for name in (*PERCEPTION, *COGNITION) if name not in pairs]
        if protocol == "lmms-eval":
            self._add_unanswered(pairs)
        read = read_lmms if protocol == "lmms-eval" else read_upstream
        metrics: dict[str, Any] = {"by_category": {}}
        question_scores: list[QuestionScore] = []
        counted = [name for name in PERCEPTION if name in pairs]
        for category, own in pairs.items():
            row, of_category = self._category(category, own, read)
            metrics["by_category"][category] = row
            question_scores += of_category
            if row["other"] == row["questions"]:
                notes.append(f"{category}: no answer says yes or no; 0 points, where the original stops")
        for part, categories in (("perception", PERCEPTION), ("cognition", COGNITION)):
            metrics[part] = sum(metrics["by_category"][name]["score"] for name in categories if name in pairs)
        if absent:
            notes.append(
                f"categories without an answer, which give no points (the original stops): {', '.join(absent)}"
            )
        ordered = {key: metrics[key] for key in ("perception", "cognition")}
        ordered.update(questions=len(question_scores), missing_categories=absent, by_category=metrics["by_category"])
        aggregate = AggregateMetric(_parts(question_scores, counted), _points, stratified=True)
        return BenchmarkResult(
            ordered["perception"], "points", ordered, tuple(question_scores), tuple(notes), aggregate
        )

    def _rows(self, answers: Sequence[Answer], *, in_lines: bool) -> tuple[list[Row], list[str]]:
        """Answers with their questions; and notes. in_lines: line breaks and tabs are made spaces."""
        rows, unknown, broken, unscored = [], [], [], []
        for answer in answers:
            name = answer.question_id
            key = key_of(name, answer.prompt, self._truths) if isinstance(name, str) and answer.prompt else None
            if key is None or key not in self._truths:
                unknown.append(f"{name} ({answer.prompt[:60]!r})")
                continue
            if key[0] not in (*PERCEPTION, *COGNITION):
                unscored.append(str(name))
                continue
            text = answer.text
            if in_lines and any(scored in text for scored in "\t\n\r"):
                text = " ".join(text.split())
                broken.append(str(name))
            rows.append(Row(key, str(name), text))
        if unknown:
            raise DataError(
                f"{self.name}: {len(unknown)} answers are to questions that {self._release} does not have, "
                f"or repeat no prompt: {format_ids(unknown)}"
            )
        if not rows:
            raise DataError(f"{self.name}: none of {len(answers)} answers is to a question of one of its categories")
        cases = [
            (broken, "answers with tabs or line breaks, which are made spaces (the original stops)"),
            (unscored, "answers in categories that do not count, left out"),
        ]
        return rows, [f"{len(ids)} {what}: {format_ids(ids)}" for ids, what in cases if ids]

    def _gaps(self, pairs: Pairs, what: str) -> list[str]:
        """Return notes on images without answers, which are `what`, and images with several."""
        notes = [] if self._limit else size_note(f"{self._release.name}", len(self._truths), _PUBLISHED)
        if gone := [group for group in self._unanswered(pairs) if group.split("/")[0] in pairs]:
            notes.append(f"{len(gone)} images without answers, {what}: {format_ids(gone)}")
        if twice := [group for own in pairs.values() for group, turns in own.items() if len(turns) > 1]:
            notes.append(f"{len(twice)} pictures are answered more than once and count as often: {format_ids(twice)}")
        return notes

    def _unanswered(self, pairs: Pairs) -> list[str]:
        """Return the images of scored categories without answers."""
        known = {picture_of(key) for key in self._truths if key[0] in (*PERCEPTION, *COGNITION)}
        if self._limit:
            known &= {item.group for item in self._items}
        return sorted(known - {group for own in pairs.values() for group in own})

    def _add_unanswered(self, pairs: dict[str, dict[str, list[tuple[Row, Row]]]]) -> None:
        """Add two empty answers for each image that has none, as the model's answer would be empty in lmms-eval."""
        keys: dict[str, list[Key]] = {group: [] for group in self._unanswered(pairs)}
        for key in self._truths:
            if picture_of(key) in keys:
                keys[picture_of(key)].append(key)
        for group, own in keys.items():
            if len(own) == 2:
                first, second = (Row(key, group, "") for key in own)
                pairs.setdefault(group.split("/")[0], {})[group] = [(first, second)]

    def _category(
        self, category: str, own: Mapping[str, Sequence[tuple[Row, Row]]], read: Any
    ) -> tuple[dict[str, Any], list[QuestionScore]]:
        """The figures of a category and its marks."""
        question_scores: list[QuestionScore] = []
        both = count = other = 0
        for group, turns in own.items():
            for turn, pair in enumerate(turns):
                rights = []
                for row in pair:
                    said, truth = read(row.text), self._truths[row.key]
                    rights.append(said == truth.lower())
                    other += said == "other"
                    name = self._mark_id(row.question_id, row.key) + (f" ({turn + 1})" if turn else "")
                    question_scores.append(
                        QuestionScore(name, float(rights[-1]), group, category, row.text, truth, f"read as {said}")
                    )
                both += all(rights)
                count += 1
        acc, acc_plus = 100 * sum(scored.value for scored in question_scores) / len(question_scores), 100 * both / count
        metrics = {"score": acc + acc_plus, "acc": acc, "acc_plus": acc_plus}
        return {**metrics, "questions": len(question_scores), "images": count, "other": other}, question_scores


def _parts(question_scores: Sequence[QuestionScore], categories: Sequence[str]) -> tuple[tuple[float, ...], ...]:
    """Of each mark, for each category in turn: questions, right ones, pictures, pictures with both right.

    Marks of a picture stand side by side, two by two; the second has what is the picture's.
    """
    places = {category: 4 * place for place, category in enumerate(categories)}
    out = []
    for number, scored in enumerate(question_scores):
        row = [0.0] * (4 * len(places))
        if scored.category in places:
            start, both = places[scored.category], number % 2
            row[start : start + 4] = [1, scored.value, both, both * scored.value * question_scores[number - 1].value]
        out.append(tuple(row))
    return tuple(out)


def _points(sums: Sequence[float]) -> float:
    """The sum of the categories' points, from the sums of `_parts`."""
    rows = [sums[start : start + 4] for start in range(0, len(sums), 4)]
    return sum(100 * right / questions + 100 * both / pictures for questions, right, pictures, both in rows)
