"""Scoring rules that several benchmarks share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vila.core.errors import DataError
from vila.eval.benchmark import Answer, Item


def exact_match(prediction: str, truth: str) -> bool:
    """Equal after stripping white space at both ends; nothing else is forgiven."""
    return prediction.strip() == truth.strip()


def check_ids(name: str, predictions: Mapping[str, str], wanted: Iterable[str]) -> None:
    """Every wanted id has one prediction and no other id has one. Raises DataError naming ids."""
    expected = set(wanted)
    missing, extra = sorted(expected - set(predictions)), sorted(set(predictions) - expected)
    problems = [
        f"{len(ids)} {what} ({', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})"
        for ids, what in ((missing, "questions without a prediction"), (extra, "predictions of unknown questions"))
        if ids
    ]
    if problems:
        raise DataError(f"{name}: {'; '.join(problems)}")


def by_item(name: str, answers: Sequence[Answer], items: Sequence[Item]) -> dict[str, str]:
    """Answers by item id, exactly one for each. Raises DataError for ids that are missing, unknown or given twice."""
    known = {str(item.id if item.question_id is None else item.question_id): item.id for item in items}
    out: dict[str, str] = {}
    for answer in answers:
        key = answer.id or known.get(str(answer.question_id), str(answer.question_id))
        if key in out:
            raise DataError(f"{name}: {answer.where or 'answers'}: a second answer to question {key}")
        out[key] = answer.text
    check_ids(name, out, (item.id for item in items))
    return out
