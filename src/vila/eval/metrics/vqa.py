"""How VQA answers are normalised and compared: EvalAI's processor with M4C's first step, and the official VQA score.

VQA v2 (Goyal et al., CVPR 2017) has ten human answers to a question; an answer that three others gave is right.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib import resources
from typing import Any, NamedTuple

# Written as in the public code: the look-behind is mistyped, so this is any period that no digit follows.
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_PERIODS_AT_MOST = int(re.UNICODE)
"""The public code passes the flag where the count belongs: 32 periods are removed, later ones stay."""
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
    """The processor of EvalAI and M4C, which TextVQA's scorer and the files for the VQAv2 and VizWiz servers use."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _plain_words(_without_punctuation(one_line(text), _COMMA_EVALAI))


@lru_cache(maxsize=1 << 17)
def normalize_official(text: str) -> str:
    """The two steps of the official VQA score: punctuation, then numbers, articles and contractions."""
    return _plain_words(_without_punctuation(text, _COMMA_OFFICIAL))


@lru_cache(maxsize=1 << 17)
def normalize_lmms(text: str) -> str:
    """lmms-eval's steps for VQAv2: like the official ones, but for how commas between digits are looked for."""
    return _plain_words(_without_punctuation(one_line(text), _COMMA_EVALAI))


def one_line(text: str) -> str:
    """Line breaks and tabs become spaces; white space at both ends goes."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the humans of min(1, how many of the others said `prediction` / 3), 0..1; texts as they are."""
    same = sum(answer == prediction for answer in answers)
    points = [min(1.0, (same - (answer == prediction)) / 3) for answer in answers]
    return sum(points) / len(points)


def official_accuracy(prediction: str, answers: Sequence[Mapping[str, Any]]) -> float:
    """The official VQA score of one question, 0..1.

    answers: the annotation's rows with `answer` and whatever else tells them apart. Where all humans wrote the same,
    texts are compared as they are; else both sides are normalised.
    """
    rows = [{**row, "answer": one_line(row["answer"])} for row in answers]
    prediction = one_line(prediction)
    if len({row["answer"] for row in rows}) > 1:
        rows = [{**row, "answer": normalize_official(row["answer"])} for row in rows]
        prediction = normalize_official(prediction)
    return _leave_one_out(prediction, rows)


def lmms_accuracy(prediction: str, answers: Sequence[Mapping[str, Any]]) -> float:
    """lmms-eval's score of one VQAv2 question, 0..1: always normalised."""
    rows = [{**row, "answer": normalize_lmms(row["answer"])} for row in answers]
    return _leave_one_out(normalize_lmms(prediction), rows)


def most_frequent(answers: Sequence[str]) -> str:
    """The answer that most humans gave, the first of several; "" of none."""
    return Counter(answers).most_common(1)[0][0] if answers else ""


def _leave_one_out(prediction: str, rows: Sequence[Mapping[str, Any]]) -> float:
    # The public code leaves out every row that equals this one in all fields, not only this one.
    matching = [row for row in rows if row["answer"] == prediction]
    points = []
    for row in rows:
        others = sum(other != row for other in matching) if row["answer"] == prediction else len(matching)
        points.append(min(1.0, others / 3))
    return sum(points) / len(points)


def _without_punctuation(text: str, comma: re.Pattern[str]) -> str:
    out = text
    number = comma.search(text) is not None
    for scored in _words().punctuation:
        if scored in out:
            out = out.replace(scored, "" if number or f"{scored} " in text or f" {scored}" in text else " ")
    return _PERIOD.sub("", out, count=_PERIODS_AT_MOST)


def _plain_words(text: str) -> str:
    words = _words()
    numbered = [words.numbers.get(word, word) for word in text.lower().split()]
    return " ".join(words.contractions.get(word, word) for word in numbered if word not in words.articles)
