"""Scoring rules that several benchmarks share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vila.core.errors import DataError


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
