"""VQA answer normalization and accuracy: EvalAI's processor as in M4C, the official VQA v2 score, lmms-eval's variant.

VQA v2 (Goyal et al., CVPR 2017) has ten human answers per question; an answer that three others gave is fully correct.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib import resources
from typing import Any, NamedTuple

# As in the public code: because of a typo in the look-behind it matches every period that no digit follows.
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_MAX_PERIODS = int(re.UNICODE)
"""The public code passes this flag as the count: 32 periods are removed, further ones stay."""
_COMMA_EVALAI = re.compile(r"(?<=\d)(,)+(?=\d)")
_COMMA_OFFICIAL = re.compile(r"(\d)(,)(\d)")


class _Words(NamedTuple):
    contractions: dict[str, str]
    numbers: dict[str, str]
    articles: frozenset[str]
    punctuation: tuple[str, ...]


@cache
def _words() -> _Words:
    table = json.loads(resources.files("vila.eval").joinpath("vqa_words.json").read_text(encoding="utf-8"))
    return _Words(
        table["contractions"], table["number_words"], frozenset(table["articles"]), tuple(table["punctuation"])
    )


@lru_cache(maxsize=1 << 17)
def normalize_evalai(text: str) -> str:
    """Normalize like EvalAI's processor in M4C: for TextVQA and the submissions to VQAv2 and VizWiz."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _plain_words(_without_punctuation(one_line(text), _COMMA_EVALAI))


@lru_cache(maxsize=1 << 17)
def normalize_official(text: str) -> str:
    """Normalize like the official VQA score: punctuation, then numbers, articles and contractions."""
    return _plain_words(_without_punctuation(text, _COMMA_OFFICIAL))


@lru_cache(maxsize=1 << 17)
def normalize_lmms(text: str) -> str:
    """Normalize like lmms-eval for VQAv2: the official steps, except for commas between digits."""
    return _plain_words(_without_punctuation(one_line(text), _COMMA_EVALAI))


def one_line(text: str) -> str:
    """Replace line breaks and tabs by spaces and strip both ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the mean over the human answers of min(1, matching other answers / 3), 0..1; no normalization."""
    same = sum(answer == prediction for answer in answers)
    points = [min(1.0, (same - (answer == prediction)) / 3) for answer in answers]
    return sum(points) / len(points)


def official_accuracy(prediction: str, answers: Sequence[Mapping[str, Any]]) -> float:
    """Return the official VQA score of one question, 0..1.

    answers: records of the annotation with `answer`. If all human answers are equal, texts are compared without
    normalization, else both sides are normalized.
    """
    rows = [{**row, "answer": one_line(row["answer"])} for row in answers]
    prediction = one_line(prediction)
    if len({row["answer"] for row in rows}) > 1:
        rows = [{**row, "answer": normalize_official(row["answer"])} for row in rows]
        prediction = normalize_official(prediction)
    return _leave_one_out(prediction, rows)


def lmms_accuracy(prediction: str, answers: Sequence[Mapping[str, Any]]) -> float:
    """Return lmms-eval's score of one VQAv2 question, 0..1; always normalized."""
    rows = [{**row, "answer": normalize_lmms(row["answer"])} for row in answers]
    return _leave_one_out(normalize_lmms(prediction), rows)


def most_frequent(answers: Sequence[str]) -> str:
    """Return the most frequent answer, the first one of ties; "" for no answers."""
    return Counter(answers).most_common(1)[0][0] if answers else ""


def _leave_one_out(prediction: str, rows: Sequence[Mapping[str, Any]]) -> float:
    # The public code leaves out every record that equals this one in all fields, not only this one.
    matching = [row for row in rows if row["answer"] == prediction]
    points = []
    for row in rows:
        others = sum(other != row for other in matching) if row["answer"] == prediction else len(matching)
        points.append(min(1.0, others / 3))
    return sum(points) / len(points)


def _without_punctuation(text: str, comma: re.Pattern[str]) -> str:
    out = text
    number = comma.search(text) is not None
    for char in _words().punctuation:
        if char in out:
            out = out.replace(char, "" if number or f"{char} " in text or f" {char}" in text else " ")
    return _PERIOD.sub("", out, count=_MAX_PERIODS)


def _plain_words(text: str) -> str:
    words = _words()
    numbered = [words.numbers.get(word, word) for word in text.lower().split()]
    return " ".join(words.contractions.get(word, word) for word in numbered if word not in words.articles)
