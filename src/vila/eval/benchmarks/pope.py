"""POPE: yes-or-no questions on object presence, with three ways of choosing absent objects (Li et al., EMNLP 2023).

    llava_pope_test.jsonl                                   8,910 questions with their category
    coco/coco_pope_{random,popular,adversarial}.json        a line per question: image, text, label

The published metric is the mean F1 of the three categories. The original script pairs answers and labels by position,
which is silently wrong if an answer is missing or out of order; here they are matched by image and question.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_jsonl
from vila.eval.annotations import AnnotatedBenchmark, Question, build_items, check_fields, format_ids, read_questions
from vila.eval.benchmark import AggregateMetric, Answer, BenchmarkResult, Item, QuestionScore, ScoringProtocol

_QUESTIONS = "llava_pope_test.jsonl"
_COCO = "coco"
_POPE = "github.com/AoiDragon/POPE, output/coco at commit e3e3926; later ones have 3,000 random questions, not 2,910"
_HINT = f"is it another release? Download it from {_POPE}"

Prediction = tuple[bool, bool, str]
"""Predicted yes, label yes, and the lower-case answer, which lmms-eval scores."""


class Pope(AnnotatedBenchmark):
    """POPE: mean F1 of yes-or-no answers on object presence (random, popular, adversarial)."""

    name = "pope"
    max_new_tokens = 128

    def __init__(self, folder: Path, limit: int = 0) -> None:
        super().__init__(folder, limit)
        self._path = self.find_file(_QUESTIONS)

    def load_items(self) -> list[Item]:
        """Return the questions by image, with their labels if those files exist."""
        truths = self._labels if self.find_optional(_COCO) else {}
        return build_items(self._questions, self.image_folder("val2014"), truths=truths, limit=self._limit)

    @cached_property
    def _questions(self) -> list[Question]:
        return read_questions(self._path)

    @cached_property
    def _labels(self) -> dict[str, str]:
        """Labels (yes or no) by question id. Raises DataError if the label files are of another release."""
        by_category: dict[str, list[Question]] = defaultdict(list)
        for question in self._questions:
            by_category[question.category].append(question)
        labels = {}
        for category, questions in by_category.items():
            path = self.find_file(f"{_COCO}/coco_pope_{category}.json", source=_POPE)
            labels.update(_match_labels(path, questions))
        return labels

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Return the mean F1 of the categories in percent, or lmms-eval's F1 over all questions together.

        upstream:  an answer is "no" if it has the word No, no or not before its first full stop, and "yes" otherwise.
                   Questions without an answer do not count.
        lmms-eval: the whole answer must be yes or no, in any case; other answers are wrong and count in neither
                   precision nor recall. Questions without an answer are wrong.
        Raises DataError for answers to unknown questions.
        """
        categories = {question.category: None for question in self._questions}
        questions = self.within_limit({str(question.question_id): question for question in self._questions})
        labels = self._labels
        matched = self.match(answers, questions)
        if matched.unknown:
            raise DataError(
                f"{len(matched.unknown)} answers have a question_id that {self._path.name} does not have: "
                f"{format_ids(matched.unknown)}",
                field=self.name,
            )
        self.check_prompts(answers, {key: question.text for key, question in questions.items()})
        scores = []
        predictions: list[tuple[str, Prediction]] = []
        by_category: dict[str, list[Prediction]] = {category: [] for category in categories}
        for key, question in questions.items():
            if key not in matched.texts and protocol == "upstream":
                continue
            text = matched.texts.get(key, "")
            prediction = is_yes(text), labels[key] != "no", text.lower().strip()
            by_category[question.category].append(prediction)
            is_correct = _is_correct_lmms(prediction) if protocol == "lmms-eval" else prediction[0] == prediction[1]
            rule = "no answer" if key not in matched.texts else "parsed as yes" if prediction[0] else "parsed as no"
            predictions.append((question.category, prediction))
            scores.append(
                QuestionScore(key, float(is_correct), question.image, question.category, text, labels[key], rule)
            )
        notes = matched.notes("not counted" if protocol == "upstream" else "wrong") + self._order_note(
            answers, questions
        )
        metrics: dict[str, Any] = {"questions": len(scores), "missing": len(matched.missing)}
        if protocol == "lmms-eval":
            metrics.update(_lmms_metrics([one for own in by_category.values() for one in own]))
            aggregate = AggregateMetric(tuple(_lmms_counts(one) for _, one in predictions), _mean_f1)
            return BenchmarkResult(100 * metrics["f1"], "%", metrics, tuple(scores), tuple(notes), aggregate)
        for category in [name for name, own in by_category.items() if not own]:
            notes.append(f"no answers in category {category}: it is not part of the mean")
        answered = {category: own for category, own in by_category.items() if own}
        metrics["by_category"] = {category: _metrics(own) for category, own in answered.items()}
        metrics["pooled"] = _metrics([one for own in by_category.values() for one in own])
        for category, row in metrics["by_category"].items():
            if not row["tp"]:
                notes.append(f"{category}: no true positives, F1 is undefined and counts as 0")
        score = 100 * sum(row["f1"] for row in metrics["by_category"].values()) / len(answered)
        return BenchmarkResult(score, "%", metrics, tuple(scores), tuple(notes), _aggregate(predictions))

    def _order_note(self, answers: Sequence[Answer], questions: Mapping[str, Question]) -> list[str]:
        """Return a note if the original script would pair answers with the labels of other questions."""
        wrong = []
        for category in {question.category: None for question in questions.values()}:
            expected = [key for key, question in questions.items() if question.category == category]
            given = [str(answer.question_id) for answer in answers]
            given = [key for key in given if questions[key].category == category]
            if expected[: len(given)] != given:
                wrong.append(category)
        if not wrong:
            return []
        return [
            f"the answers of {', '.join(wrong)} are incomplete or not in the order of the questions: the original "
            "script pairs answers and labels by position and would report another score"
        ]


def is_yes(text: str) -> bool:
    """Return whether the original script parses an answer as yes: no word No, no or not before the first full stop."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _match_labels(path: Path, questions: Sequence[Question]) -> dict[str, str]:
    """Return the labels of a category by question id, matched by image and question text."""
    labels: dict[tuple[str, str], list[str]] = defaultdict(list)
    count = 0
    for number, row in read_jsonl(path):
        check_fields(row, path, f"line {number}", hint=_HINT, image=str, text=str, label=str)
        labels[row["image"], row["text"].strip()].append(row["label"])
        count += 1
    if count != len(questions):
        raise DataError(
            f"{count} labels for the {len(questions)} {questions[0].category} questions of {_QUESTIONS}",
            file=path,
            hint=_HINT,
        )
    found = {}
    for question in questions:
        known = labels.get((question.image, question.text.split("\n")[0].strip()))
        if not known:
            raise DataError(
                f"no label for {question.text[:80]!r} about {question.image}",
                file=path,
                record=f"question {question.question_id}",
                hint=_HINT,
            )
        # Repeated questions take their labels in order.
        found[str(question.question_id)] = known.pop(0)
    return found


def _aggregate(predictions: Sequence[tuple[str, Prediction]]) -> AggregateMetric:
    """Return the mean F1 of the answered categories from counts of true positives, false positives and negatives."""
    offsets = {category: 3 * index for index, category in enumerate(dict.fromkeys(name for name, _ in predictions))}
    terms = []
    for category, (predicted, label, _) in predictions:
        row = [0.0] * (3 * len(offsets))
        if predicted or label:
            row[offsets[category] + (0 if predicted and label else 1 if predicted else 2)] = 1.0
        terms.append(tuple(row))
    return AggregateMetric(tuple(terms), _mean_f1)


def _mean_f1(sums: Sequence[float]) -> float:
    """Return the mean F1 in percent; sums: tp, fp, fn of each category in turn."""
    counts = [sums[start : start + 3] for start in range(0, len(sums), 3)]
    return 100 * sum(_f1(*own)["f1"] for own in counts) / len(counts)


def _metrics(predictions: Iterable[Prediction]) -> dict[str, float]:
    counts = Counter((predicted, label) for predicted, label, _ in predictions)
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


def _is_correct_lmms(prediction: Prediction) -> bool:
    return prediction[2] == ("yes" if prediction[1] else "no")


def _lmms_counts(prediction: Prediction) -> tuple[int, int, int]:
    """Return whether an answer is a true positive, a false positive, a false negative."""
    _, label, text = prediction
    return int(text == "yes" and label), int(text == "yes" and not label), int(text == "no" and label)


def _lmms_metrics(predictions: Sequence[Prediction]) -> dict[str, float]:
    tp, fp, fn = (
        (sum(column) for column in zip(*map(_lmms_counts, predictions), strict=True)) if predictions else (0, 0, 0)
    )
    return {
        "accuracy": _ratio(sum(map(_is_correct_lmms, predictions)), len(predictions)),
        **_f1(tp, fp, fn),
        # As in lmms-eval, of the labels, not of the answers.
        "yes_ratio": _ratio(sum(label for _, label, _ in predictions), len(predictions)),
    }


def _f1(tp: float, fp: float, fn: float) -> dict[str, float]:
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    return {"precision": precision, "recall": recall, "f1": _ratio(2 * precision * recall, precision + recall)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
