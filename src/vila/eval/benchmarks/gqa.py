"""GQA: compositional questions about images, one reference answer each (Hudson and Manning, CVPR 2019).

    llava_gqa_testdev_balanced.jsonl    questions: 12,578 about 398 images
    testdev_balanced_questions.json     {"201307251": {"question": ..., "answer": "no", "isBalanced": true, ...}}
    testdev_balanced_choices.json       {"201307251": {"valid": [...], "plausible": [...]}}; optional

The files are in `gqa/`, as in VILA, or in `gqa/data/`, as in LLaVA.
"""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import read_json
from vila.eval.annotation_files import OTHER_RELEASE
from vila.eval.annotations import OPTIONAL, AnnotatedBenchmark, build_items, check_fields, read_questions
from vila.eval.benchmark import Answer, BenchmarkResult, Item, QuestionScore, ScoringProtocol, percent

_QUESTIONS = "llava_gqa_testdev_balanced.jsonl"
_TRUTHS = ("testdev_balanced_questions.json", "data/testdev_balanced_questions.json")
_CHOICES = ("testdev_balanced_choices.json", "data/testdev_balanced_choices.json")
_GQA = "https://cs.stanford.edu/people/dorarad/gqa/download.html (questions 1.2)"
_NO_STEPS = ("exist", "query: name", "choose name")
"""Final operations of a program, which do not count as reasoning steps."""
_BY = {
    "by_structural_type": lambda row: row["types"]["structural"],
    "by_semantic_type": lambda row: row["types"]["semantic"],
    "by_steps": lambda row: _steps(row),
    "by_words": lambda row: len(row["question"].split()),
}


class Gqa(AnnotatedBenchmark):
    """GQA balanced test-dev: accuracy of short answers to compositional questions."""

    name = "gqa"
    max_new_tokens = 128

    def __init__(self, folder: Path, limit: int = 0) -> None:
        super().__init__(folder, limit)
        if self.find_optional(*_TRUTHS) is None:
            self.find_file(_QUESTIONS)

    def load_items(self) -> list[Item]:
        """Return the questions by image, with reference answers if their file exists."""
        questions = read_questions(self.find_file(_QUESTIONS))
        truths = {}
        if self.find_optional(*_TRUTHS):
            truths = {key: row["answer"] for key, row in self._truths.items()}
        images = self.image_folder("images", "data/images")
        return build_items(questions, images, truths=truths, limit=self._limit)

    @cached_property
    def _truths(self) -> dict[str, Any]:
        """Annotations of the balanced questions by id."""
        path = self.find_file(*_TRUTHS, source=_GQA)
        rows = read_json(path)
        if not isinstance(rows, dict) or not rows:
            raise DataError(file=path, value=rows, expected="an object with questions by id")
        for key, row in rows.items():
            _check(path, key, row)
        return {key: row for key, row in rows.items() if row["isBalanced"]}

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Return the accuracy in percent over the balanced questions.

        upstream:  exact match of the lower-case answer without trailing full stops; also GQA's further metrics.
        lmms-eval: exact match ignoring case and ASCII punctuation.
        Raises DataError naming the questions without an answer; the original script fails for them.
        """
        truths = self.within_limit(self._truths)
        matched = self.match(answers, truths)
        self.check_prompts(answers, {key: row["question"] for key, row in truths.items()})
        self.check_all_answered(matched, "GQA needs an answer to every balanced question")
        normalize = _normalize_lmms if protocol == "lmms-eval" else _normalize_upstream
        predictions = {key: normalize(matched.texts[key]) for key in truths}
        right = {
            key: predictions[key] == (_normalize_lmms(row["answer"]) if protocol == "lmms-eval" else row["answer"])
            for key, row in truths.items()
        }
        question_scores = tuple(
            QuestionScore(
                key,
                float(right[key]),
                str(row.get("imageId", "")),
                row["types"]["structural"],
                matched.texts[key],
                row["answer"],
            )
            for key, row in truths.items()
        )
        notes = matched.notes()
        metrics = {"questions": len(truths), "accuracy": percent(right.values()), **_by_type(truths, right)}
        if protocol == "upstream":
            more, more_notes = self._official_metrics(truths, predictions)
            metrics, notes = {**metrics, **more}, [*notes, *more_notes]
        return BenchmarkResult(metrics["accuracy"], "%", metrics, question_scores, tuple(notes))

    def _official_metrics(
        self, truths: Mapping[str, Any], predictions: Mapping[str, str]
    ) -> tuple[dict[str, float], list[str]]:
        notes = []
        path = self.find_optional(*_CHOICES)
        choices: Any = read_json(path) if path else None
        if path is None:
            notes.append("no testdev_balanced_choices.json: validity and plausibility are 0, as in the original script")
        metrics = {
            name: percent(
                bool(choices) and _is_choice(predictions[key], choices, key, kind, row) for key, row in truths.items()
            )
            for name, kind in (("validity", "valid"), ("plausibility", "plausible"))
        }
        grouped = [(row["groups"]["global"], row["answer"], predictions[key]) for key, row in truths.items()]
        grouped = [one for one in grouped if one[0] is not None]
        if not grouped:
            notes.append("no question has a group: the distribution distance is 0")
        return {**metrics, "distribution": _distribution(grouped)}, notes


def _normalize_upstream(text: str) -> str:
    return text.rstrip(".").lower()


def _normalize_lmms(text: str) -> str:
    return text.strip().lower().translate(str.maketrans("", "", string.punctuation))


def _by_type(truths: Mapping[str, Any], right: Mapping[str, bool]) -> dict[str, Any]:
    """Return accuracy and number of questions by answer form, question type, reasoning steps and length."""
    query = {key: row["types"]["structural"] == "query" for key, row in truths.items()}
    out: dict[str, Any] = {
        "binary": percent(right[key] for key in truths if not query[key]),
        "open": percent(right[key] for key in truths if query[key]),
    }
    for name, value_of in _BY.items():
        rows: dict[Any, list[bool]] = defaultdict(list)
        for key, row in truths.items():
            rows[value_of(row)].append(right[key])
        out[name] = {
            str(kind): {"accuracy": percent(values), "questions": len(values)} for kind, values in sorted(rows.items())
        }
    return out


def _steps(row: Mapping[str, Any]) -> int:
    operations = [f"{step['operation']}: {step['argument']}" for step in row["semantic"]]
    return sum(not any(last in operation for last in _NO_STEPS) for operation in operations)


def _is_choice(prediction: str, choices: Any, key: str, kind: str, row: Mapping[str, Any]) -> bool:
    try:
        group = choices[key][kind]
    except (KeyError, TypeError) as error:
        raise DataError(f"no {kind!r} answers", file=_CHOICES[0], record=f"question {key}") from error
    if "detailed" not in row["types"]:
        raise DataError("missing", file=_TRUTHS[0], record=f"question {key}", field="types.detailed")
    return prediction in (("color", "material", "shape") if "Common" in row["types"]["detailed"] else group)


def _distribution(grouped: Sequence[tuple[str, str, str]]) -> float:
    """Return the chi-square distance of predicted and reference answers: size-weighted mean over groups / 100."""
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
    record, hint = f"question {key}", f"{OTHER_RELEASE} Download it from {_GQA}"
    check_fields(row, path, record, hint=hint, isBalanced=bool, answer=str, question=str, types=dict, groups=dict)
    check_fields(row["types"], path, record, hint=hint, structural=str, semantic=str, detailed=(str, OPTIONAL))
    check_fields(row["groups"], path, record, hint=hint, **{"global": (str, type(None))})
    try:
        _steps(row)
    except (KeyError, TypeError) as error:
        raise DataError(f"invalid ({error!r})", file=path, record=record, field="semantic", hint=hint) from error
