"""Answers judged by a language model, as Video-ChatGPT's evaluation does it (arXiv 2306.05424): what is asked, how
replies are read, and what they amount to. Nothing here talks to a server; `judge_run` does.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from vila.core.errors import DataError, UnknownNameError
from vila.core.files import write_jsonl
from vila.core.reading import read_json, read_jsonl
from vila.eval.joining import naming
from vila.eval.judge_cost import Estimate, Prices, estimate_cost

DEFAULT_MODEL = "gpt-3.5-turbo"
"""The original's; the name is an alias, so what it stands for changes with time."""
_HOLE = re.compile(r"\{(question[12]?|answer|pred[12]?)\}")
_LONGEST_REPLY = 10_000
_NONE = object()


@dataclass(frozen=True, slots=True)
class Case:
    """One answer to be judged. fields: what the prompt's holes are filled with (`question`, `answer`, `pred`, ...)."""

    id: str
    fields: Mapping[str, str] = field(hash=False)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge said of one case. value: the reply as a Python value; `readable` tells whether it is one."""

    id: str
    reply: str
    value: Any = field(default=_NONE, hash=False)

    @property
    def readable(self) -> bool:
        """Whether the reply was a Python literal. The original asks again until it is, and then leaves it out."""
        return self.value is not _NONE


@dataclass(frozen=True, slots=True)
class Tally:
    """What verdicts amount to. accuracy: percent of yes among yes and no; average_score: 0..5.

    count:     verdicts that were read: the denominator of the average.
    no_score:  those of them without a whole number as score; they add nothing to the sum and have no yes or no.
    undecided: those with a score that say neither yes nor no.
    """

    accuracy: float
    average_score: float
    yes: int
    no: int
    count: int
    no_score: tuple[str, ...]
    undecided: tuple[str, ...]


class NotJudgedError(DataError):
    """The requests to a judge were written to a file, as was asked for; there are no verdicts yet."""


class Judging(Protocol):
    """Whoever gives verdicts: a server, a file of replies, or nobody yet."""

    model: str

    def verdicts(self, kind: str, cases: Sequence[Case]) -> list[Verdict]:
        """A verdict for each case, in their order. DataError when there are none to be had now."""


@cache
def prompts() -> Mapping[str, list[dict[str, str]]]:
    """The messages of every kind of judge, with holes: `video_qa` and Video-ChatGPT's five dimensions."""
    judges: dict[str, list[dict[str, str]]] = json.loads(
        files("vila.eval").joinpath("judge_prompts.json").read_text(encoding="utf-8")
    )["judges"]
    return judges


def fields_of(kind: str) -> list[str]:
    """What the messages of a kind of judge are filled with, each once."""
    return list(dict.fromkeys(_HOLE.findall("".join(message["content"] for message in prompts()[kind]))))


def request_body(kind: str, case: Case, model: str = DEFAULT_MODEL) -> dict[str, Any]:
    """The published request: `model` and `messages`, nothing else. Raises DataError naming a field that is missing."""
    if kind not in prompts():
        raise UnknownNameError("kind of judge", kind, prompts())

    def fill(hole: re.Match[str]) -> str:
        if hole[1] not in case.fields:
            raise DataError(f"case {case.id}: no {hole[1]!r}, which the judge of {kind} is shown")
        return case.fields[hole[1]]

    messages = [{"role": m["role"], "content": _HOLE.sub(fill, m["content"])} for m in prompts()[kind]]
    return {"model": model, "messages": messages}


def body_hash(body: Mapping[str, Any]) -> str:
    """What a reply is kept under: equal for equal model and messages."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_reply(id: str, reply: str) -> Verdict:
    """A reply as a verdict: it must be a Python literal and nothing else, as the prompt asks. Nothing is run."""
    if len(reply) > _LONGEST_REPLY:
        return Verdict(id, reply)
    try:
        return Verdict(id, reply, ast.literal_eval(reply))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return Verdict(id, reply)


def score_of(value: Any) -> int | None:
    """The score as the original reads it: cut to a whole number (4.8 is 4, '4' is 4); None when it is none."""
    try:
        return int(value["score"])
    except (LookupError, TypeError, ValueError, OverflowError):
        return None


def says_yes(value: Any) -> bool | None:
    """Whether `pred` holds "yes", or else "no", in whatever letters; None for neither, or without a readable score."""
    said = value.get("pred") if score_of(value) is not None and isinstance(value, dict) else None
    if not isinstance(said, str):
        return None
    return True if "yes" in said.lower() else False if "no" in said.lower() else None


def tally(verdicts: Iterable[Verdict]) -> Tally:
    """Figures by the original's rules: verdicts that are not readable are left out of every denominator."""
    read = [verdict for verdict in verdicts if verdict.readable]
    scores = [score_of(verdict.value) for verdict in read]
    said = [says_yes(verdict.value) for verdict in read]
    yes, no = said.count(True), said.count(False)
    undecided = [v.id for v, score, word in zip(read, scores, said, strict=True) if score is not None and word is None]
    return Tally(
        accuracy=100 * yes / (yes + no) if yes + no else 0.0,
        average_score=sum(score or 0 for score in scores) / len(read) if read else 0.0,
        yes=yes,
        no=no,
        count=len(read),
        no_score=tuple(v.id for v, score in zip(read, scores, strict=True) if score is None),
        undecided=tuple(undecided),
    )


@dataclass(frozen=True)
class RequestFile:
    """No judge: the requests go to a file, in the form that batch services take, and scoring says where it is."""

    path: Path
    model: str = DEFAULT_MODEL
    prices: Prices | None = None

    def verdicts(self, kind: str, cases: Sequence[Case]) -> list[Verdict]:
        """Writes `path`. Raises NotJudgedError, always: there is no verdict yet."""
        rows: list[dict[str, Any]] = [
            {
                "custom_id": case.id,
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": request_body(kind, case, self.model),
            }
            for case in cases
        ]
        write_jsonl(self.path, rows)
        cost: Estimate = estimate_cost([row["body"] for row in rows], self.model, self.prices)
        raise NotJudgedError(f"no judge was asked; its requests are in {self.path} ({cost.text})")


@dataclass(frozen=True)
class ReplyFile:
    """Verdicts that lie in a file: a batch service's output, or what the original's judge leaves behind."""

    path: Path
    model: str = "from file"

    def verdicts(self, kind: str, cases: Sequence[Case]) -> list[Verdict]:
        """Those of the cases; a case without one is as one whose reply cannot be read.

        Raises DataError when no case has one: the file holds the replies on other answers.
        """
        found = {verdict.id: verdict for verdict in read_verdicts(self.path)}
        if cases and not any(case.id in found for case in cases):
            raise DataError(
                f"{self.path}: holds {len(found)} replies and none on these answers (theirs: {naming(found)}; ours: "
                f"{naming(case.id for case in cases)}); name the replies on this set"
            )
        return [found.get(case.id, Verdict(case.id, "")) for case in cases]


def read_verdicts(path: Path) -> list[Verdict]:
    """The verdicts in a batch service's output (JSON lines), in the original's folder of `ID.json`, or its merged file.

    Raises DataError naming file and line for what is none of these.
    """
    if path.is_dir():
        return [_kept(file.stem, read_json(file), file) for file in sorted(path.glob("*.json"))]
    if not path.is_file():
        raise DataError(f"{path}: no such file of replies")
    if path.suffix == ".json":
        merged = read_json(path)
        if not isinstance(merged, dict):
            raise DataError(f"{path}: expected verdicts by id, {{ID: [reply, question and answers]}}")
        return [_kept(id, row, path) for id, row in merged.items()]
    verdicts = []
    for number, row in read_jsonl(path):
        try:
            choice = ((row["response"] or {}).get("body") or {}).get("choices", [{}])[0]
            reply = (choice.get("message") or {}).get("content")
            verdicts.append(read_reply(str(row["custom_id"]), reply if isinstance(reply, str) else ""))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            record = f"line {number}"
            raise DataError(f"not a line of a batch service's output ({error})", file=path, record=record) from error
    return verdicts


def _kept(id: str, row: Any, path: Path) -> Verdict:
    if not (isinstance(row, list) and row):
        raise DataError(f"{path}: verdict {id}: expected [reply, question and answers], got {str(row)[:80]!r}")
    return Verdict(id, repr(row[0]), row[0])
