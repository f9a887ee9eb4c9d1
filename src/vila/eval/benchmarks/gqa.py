"""GQA: compositional questions on scene graphs, one true answer each (Hudson and Manning, CVPR 2019).

    llava_gqa_testdev_balanced.jsonl        what is asked; 12,578 questions about 398 pictures
    testdev_balanced_questions.json         {"201307251": {"question": ..., "answer": "no", "isBalanced": true, ...}}
    testdev_balanced_choices.json           {"201307251": {"valid": [...], "plausible": [...]}}; need not be there

They lie in `gqa/`, where VILA has them, or in `gqa/data/`, where LLaVA has them.
"""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_json
from vila.eval.annotations import (
    build_items,
    check_all_answered,
    check_prompts,
    field_problem,
    find_file,
    find_optional,
    image_folder,
    match_answers,
    read_questions,
)
from vila.eval.benchmark import Answer, BenchmarkResult, Item, QuestionScore, ScoringProtocol

_ASKED = "llava_gqa_testdev_balanced.jsonl"
_TRUTHS = ("testdev_balanced_questions.json", "data/testdev_balanced_questions.json")
_CHOICES = ("testdev_balanced_choices.json", "data/testdev_balanced_choices.json")
_GQA = "https://cs.stanford.edu/people/dorarad/gqa/download.html (questions 1.2)"
_NO_STEPS = ("exist", "query: name", "choose name")
"""Operations that end a program without being a step of reasoning."""
_BY = {
    "by_structural_type": lambda row: row["types"]["structural"],
    "by_semantic_type": lambda row: row["types"]["semantic"],
    "by_steps": lambda row: _steps(row),
    "by_words": lambda row: len(row["question"].split()),
}


class Gqa:
    """The balanced test-dev questions."""

    name = "gqa"
    max_new_tokens = 128

    def __init__(self, folder: Path, limit: int = 0) -> None:
        self._folder, self._limit = folder, limit
        if find_optional(folder, self.name, *_TRUTHS) is None:
            find_file(folder, self.name, _ASKED)

    def items(self) -> Sequence[Item]:
        """The questions, picture by picture; their true answers where those are there."""
        return self._items

    @cached_property
    def _items(self) -> list[Item]:
        questions = read_questions(find_file(self._folder, self.name, _ASKED))
        truths = {}
        if find_optional(self._folder, self.name, *_TRUTHS):
            truths = {key: row["answer"] for key, row in self._truths.items()}
        pictures = image_folder(self._folder, self.name, "images", "data/images")
        return build_items(questions, pictures, truths=truths, limit=self._limit)

    @cached_property
    def _truths(self) -> dict[str, Any]:
        """The balanced questions by id."""
        path = find_file(self._folder, self.name, *_TRUTHS, obtain=_GQA)
        rows = read_json(path)
        if not isinstance(rows, dict) or not rows:
            raise DataError(f"{path}: expected questions by id")
        for key, row in rows.items():
            _check(path, key, row)
        return {key: row for key, row in rows.items() if row["isBalanced"]}

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Accuracy in percent over the balanced questions.

        upstream:  equality after full stops at the end are cut and letters made small; GQA's other figures beside.
        lmms-eval: equality without ASCII punctuation and case.
        Raises DataError naming the questions without an answer, as the original does.
        """
        truths = self._truths
        if self._limit:
            truths = {item.id: truths[item.id] for item in self._items if item.id in truths}
        joined = match_answers(self.name, answers, truths)
        check_prompts(self.name, answers, {key: row["question"] for key, row in truths.items()})
        check_all_answered(self.name, joined, "GQA is scored over all balanced questions")
        prepared = _lmms if protocol == "lmms-eval" else _converted
        predictions = {key: prepared(joined.texts[key]) for key in truths}
        right = {
            key: predictions[key] == (_lmms(row["answer"]) if protocol == "lmms-eval" else row["answer"])
            for key, row in truths.items()
        }
        question_scores = tuple(
            QuestionScore(
                key,
                float(right[key]),
                str(row.get("imageId", "")),
                row["types"]["structural"],
                joined.texts[key],
                row["answer"],
            )
            for key, row in truths.items()
        )
        notes = joined.notes()
        metrics = {"questions": len(truths), "accuracy": _percent(right.values()), **_by_kind(truths, right)}
        if protocol == "upstream":
            more, said = self._official_figures(truths, predictions)
            metrics, notes = {**metrics, **more}, [*notes, *said]
        return BenchmarkResult(metrics["accuracy"], "%", metrics, question_scores, tuple(notes))

    def _official_figures(
        self, truths: Mapping[str, Any], predictions: Mapping[str, str]
    ) -> tuple[dict[str, float], list[str]]:
        notes = []
        path = find_optional(self._folder, self.name, *_CHOICES)
        choices: Any = read_json(path) if path else None
        if path is None:
            notes.append(
                "no testdev_balanced_choices.json: validity and plausibility are 0, as the original prints them"
            )
        metrics = {
            name: _percent(
                bool(choices) and _belongs(predictions[key], choices, key, kind, row) for key, row in truths.items()
            )
            for name, kind in (("validity", "valid"), ("plausibility", "plausible"))
        }
        grouped = [(row["groups"]["global"], row["answer"], predictions[key]) for key, row in truths.items()]
        grouped = [one for one in grouped if one[0] is not None]
        if not grouped:
            notes.append("no question belongs to a group: the distance of distributions is 0")
        return {**metrics, "distribution": _distribution(grouped)}, notes


def _converted(text: str) -> str:
    return text.rstrip(".").lower()


def _lmms(text: str) -> str:
    return text.strip().lower().translate(str.maketrans("", "", string.punctuation))


def _percent(right: Iterable[bool]) -> float:
    values = list(right)
    return 100 * sum(values) / len(values) if values else 0.0


def _by_kind(truths: Mapping[str, Any], right: Mapping[str, bool]) -> dict[str, Any]:
    """Accuracy and number of questions for open and yes/no-like questions, types, steps and lengths."""
    query = {key: row["types"]["structural"] == "query" for key, row in truths.items()}
    out: dict[str, Any] = {
        "binary": _percent(right[key] for key in truths if not query[key]),
        "open": _percent(right[key] for key in truths if query[key]),
    }
    for name, kind_of in _BY.items():
        rows: dict[Any, list[bool]] = defaultdict(list)
        for key, row in truths.items():
            rows[kind_of(row)].append(right[key])
        out[name] = {
            str(kind): {"accuracy": _percent(values), "questions": len(values)} for kind, values in sorted(rows.items())
        }
    return out


def _steps(row: Mapping[str, Any]) -> int:
    operations = [f"{step['operation']}: {step['argument']}" for step in row["semantic"]]
    return sum(not any(last in operation for last in _NO_STEPS) for operation in operations)


def _belongs(prediction: str, choices: Any, key: str, kind: str, row: Mapping[str, Any]) -> bool:
    try:
        group = choices[key][kind]
    except (KeyError, TypeError) as error:
        raise DataError(f"gqa: {Path(_CHOICES[0]).name} has no {kind!r} answers for question {key}") from error
    if "detailed" not in row["types"]:
        raise DataError(f"gqa: {_TRUTHS[0]}: question {key} lacks types.detailed, which {kind} answers go by")
    return prediction in (("color", "material", "shape") if "Common" in row["types"]["detailed"] else group)


def _distribution(grouped: Sequence[tuple[str, str, str]]) -> float:
    """Chi-square distance of predicted from true answers: mean over groups by their size, divided by 100."""
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for group, truth, prediction in grouped:
        gold[group][truth] += 1
        predicted[group][prediction] += 1
    total = weighted = 0.0
    for group, truths in gold.items():
        distance = sum((predicted[group][answer] - count) ** 2 / count for answer, count in truths.items())
        weighted += distance * truths.total()
        total += truths.total()
    return weighted / total / 100 if total else 0.0


def _check(path: Path, key: str, row: Any) -> None:
    try:
        complete = isinstance(row["isBalanced"], bool) and isinstance(row["answer"], str)
        complete = complete and isinstance(row["question"], str) and bool(row["types"]["structural"])
        _ = row["types"]["semantic"], row["groups"]["global"], _steps(row)
        odd = field_problem(row["types"], structural=str, semantic=str, detailed=str)
        odd = odd or field_problem(row["groups"], **{"global": (str, type(None))})
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path}: question {key} lacks {error}; is it the file of another release? It comes from {_GQA}"
        ) from error
    if not complete or odd:
        wrong = odd or "no question, answer or isBalanced that can be read"
        raise DataError(f"{path}: question {key}: {wrong}; is it the file of another release? It comes from {_GQA}")
