"""POPE: yes-or-no questions on object presence, with three ways of choosing absent objects (Li et al., EMNLP 2023).

    llava_pope_test.jsonl                                   8,910 questions with their category
    coco/coco_pope_{random,popular,adversarial}.json        a line per question: image, text, label

The published metric is the mean F1 of the three categories. The original script pairs answers and labels by position,
which is silently wrong if an answer is missing or out of order; here they are matched by image and question.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from vila.core.errors import DataError
from vila.core.reading import read_jsonl
from vila.eval.annotations import AnnotatedBenchmark, Question, build_items, check_fields, format_ids, read_questions
from vila.eval.benchmark import AggregateMetric, Answer, BenchmarkResult, Item, QuestionScore, ScoringProtocol

_QUESTIONS = "llava_pope_test.jsonl"
_COCO = "coco"
_POPE = "github.com/AoiDragon/POPE, output/coco at commit e3e3926; later ones have 3,000 random questions, not 2,910"
_COUNTED = ("tp", "fp", "fn")
_HINT = f"is it another release? Download it from {_POPE}"


class Prediction(NamedTuple):
    """Parsed answer to a question of a category, and its label. is_yes: None for neither yes nor no."""

    category: str
    is_yes: bool | None
    label: bool

    @property
    def outcome(self) -> str:
        """Return tp, fp, tn or fn; "" for an answer that is neither yes nor no."""
        if self.is_yes is None:
            return ""
        return ("t" if self.is_yes == self.label else "f") + ("p" if self.is_yes else "n")


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
        is_lmms = protocol == "lmms-eval"
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
        predictions: list[Prediction] = []
        for key, question in questions.items():
            if key not in matched.texts and not is_lmms:
                continue
            text = matched.texts.get(key, "")
            said_yes = {"yes": True, "no": False}.get(text.lower().strip()) if is_lmms else is_yes(text)
            # lmms-eval has one F1 over all categories.
            prediction = Prediction("" if is_lmms else question.category, said_yes, labels[key] != "no")
            predictions.append(prediction)
            is_correct = prediction.is_yes == prediction.label
            rule = "no answer" if key not in matched.texts else "parsed as yes" if is_yes(text) else "parsed as no"
            scores.append(
                QuestionScore(key, float(is_correct), question.image, question.category, text, labels[key], rule)
            )
        notes = matched.notes("wrong" if is_lmms else "not counted") + self._order_note(answers, questions)
        metrics: dict[str, Any] = {"questions": len(scores), "missing": len(matched.missing)}
        pooled = _metrics(predictions)
        if is_lmms:
            metrics |= {name: pooled[name] for name in ("accuracy", "precision", "recall", "f1")}
            # As in lmms-eval, of the labels, not of the answers.
            metrics["yes_ratio"] = _ratio(sum(one.label for one in predictions), len(predictions))
            score = 100 * pooled["f1"]
        else:
            by_category = {
                category: [one for one in predictions if one.category == category]
                for category in dict.fromkeys(question.category for question in self._questions)
            }
            absent = [category for category, own in by_category.items() if not own]
            notes += [f"no answers in category {category}: it is not part of the mean" for category in absent]
            rows = {category: _metrics(own) for category, own in by_category.items() if own}
            metrics |= {"by_category": rows, "pooled": pooled}
            without = [category for category, row in rows.items() if not row["tp"]]
            notes += [f"{category}: no true positives, F1 is undefined and counts as 0" for category in without]
            score = 100 * sum(row["f1"] for row in rows.values()) / len(rows)
        return BenchmarkResult(score, "%", metrics, tuple(scores), tuple(notes), _aggregate(predictions))

    def _order_note(self, answers: Sequence[Answer], questions: Mapping[str, Question]) -> list[str]:
        """Return a note if the original script would pair answers with the labels of other questions."""
        expected: dict[str, list[str]] = defaultdict(list)
        given: dict[str, list[str]] = defaultdict(list)
        for key, question in questions.items():
            expected[question.category].append(key)
        for answer in answers:
            key = str(answer.question_id)
            given[questions[key].category].append(key)
        wrong = [category for category, keys in expected.items() if keys[: len(given[category])] != given[category]]
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


def _aggregate(predictions: Sequence[Prediction]) -> AggregateMetric:
    """Return the mean F1 of the answered categories from their counts of `_COUNTED` outcomes."""
    offsets = {category: 3 * index for index, category in enumerate(dict.fromkeys(one.category for one in predictions))}
    terms = []
    for one in predictions:
        row = [0.0] * (3 * len(offsets))
        if one.outcome in _COUNTED:
            row[offsets[one.category] + _COUNTED.index(one.outcome)] = 1.0
        terms.append(tuple(row))
    return AggregateMetric(tuple(terms), _mean_f1)


def _mean_f1(sums: Sequence[float]) -> float:
    """Return the mean F1 in percent; sums: tp, fp, fn of each category in turn."""
    counts = [sums[start : start + 3] for start in range(0, len(sums), 3)]
    return 100 * sum(_f1(*own)["f1"] for own in counts) / len(counts)


def _metrics(predictions: Sequence[Prediction]) -> dict[str, float]:
    counts = Counter(one.outcome for one in predictions)
    tp, fp, tn, fn = (counts[outcome] for outcome in ("tp", "fp", "tn", "fn"))
    return {
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
        "accuracy": _ratio(tp + tn, len(predictions)),
        **_f1(tp, fp, fn),
        "yes_ratio": _ratio(tp + fp, len(predictions)),
    }


def _f1(tp: float, fp: float, fn: float) -> dict[str, float]:
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    return {"precision": precision, "recall": recall, "f1": _ratio(2 * precision * recall, precision + recall)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
