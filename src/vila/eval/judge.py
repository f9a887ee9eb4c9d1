"""Answers judged by a language model, as Video-ChatGPT's evaluation does it (arXiv 2306.05424): what is asked, how
replies are read, and what they amount to. Nothing here talks to a server; `judge_run` does.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from vila.core.errors import DataError, UnknownNameError
from vila.core.files import write_json, write_jsonl
from vila.core.progress import SILENT, Events, task
from vila.core.reading import Fields, lone_surrogate, read_json, read_jsonl
from vila.eval.annotation_files import iter_records
from vila.eval.annotations import format_ids
from vila.eval.openai_client import ChatCompletion, OpenAIClient, ServerError

# --- judge_cost
# What asking a judge will cost, before it is asked: tokens guessed from characters, prices from a table.


Prices = Mapping[str, tuple[float, float]]
"""US dollars for a million tokens read and for a million written, by model."""

PRICES: Prices = {
    "gpt-3.5-turbo": (0.50, 1.50),
    "gpt-4": (30.0, 60.0),
    "gpt-4-turbo": (10.0, 30.0),
    "gpt-4o": (2.50, 10.0),
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4.1": (2.00, 8.00),
    "gpt-4.1-mini": (0.40, 1.60),
    "gpt-4.1-nano": (0.10, 0.40),
}
"""As OpenAI published them in 2025; prices change, so an estimate says that it is one."""

_BYTES_PER_TOKEN = 4
_TOKENS_PER_MESSAGE = 4
_TOKENS_PER_REPLY = 20
"""`{'pred': 'yes', 'score': 4}` and a little more."""
_DATED = re.compile(r"-\d{4}(-\d{2}-\d{2})?$")


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """dollars: None where the model's price is not known. kept: requests whose replies are there already."""

    model: str
    requests: int
    kept: int
    read_tokens: int
    written_tokens: int
    dollars: float | None

    @property
    def text(self) -> str:
        """One line for the user."""
        kept = f" ({self.kept:,} more are answered already)" if self.kept else ""
        cost = (
            f"the price of {self.model!r} is not known"
            if self.dollars is None
            else f"about ${self.dollars:.2f} at the prices of 2025"
            if self.model in PRICES or _DATED.sub("", self.model) in PRICES
            else f"about ${self.dollars:.2f}"
        )
        return (
            f"judge {self.model}: {self.requests:,} requests{kept}, about {self.read_tokens:,} tokens in and "
            f"{self.written_tokens:,} out; {cost}"
        )


def estimate_cost(
    bodies: Sequence[Mapping[str, Any]], model: str, prices: Prices | None = None, kept: int = 0
) -> CostEstimate:
    """prices: of models that the table does not have, or other ones. kept: requests that need not be sent.

    A dated model (`gpt-4o-2024-11-20`) costs what its name without the date does.
    """
    read = sum(
        _TOKENS_PER_MESSAGE + -(-len(message["content"].encode()) // _BYTES_PER_TOKEN)
        for body in bodies
        for message in body["messages"]
    )
    written = _TOKENS_PER_REPLY * len(bodies)
    table = {**PRICES, **(prices or {})}
    price = table.get(model) or table.get(_DATED.sub("", model))
    dollars = None if price is None else (read * price[0] + written * price[1]) / 1e6
    return CostEstimate(model, len(bodies), kept, read, written, dollars)


DEFAULT_MODEL = "gpt-3.5-turbo"
"""The original's; the name is an alias, so what it stands for changes with time."""
_HOLE = re.compile(r"\{(question[12]?|answer|pred[12]?)\}")
_LONGEST_REPLY = 10_000
_NONE = object()


@dataclass(frozen=True, slots=True)
class JudgeCase:
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
class JudgeSummary:
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


class Judge(Protocol):
    """Whoever gives verdicts: a server, a file of replies, or nobody yet."""

    model: str

    def verdicts(self, kind: str, cases: Sequence[JudgeCase]) -> list[Verdict]:
        """A verdict for each case, in their order. DataError when there are none to be had now."""


@cache
def judge_prompts() -> Mapping[str, list[dict[str, str]]]:
    """The messages of every kind of judge, with holes: `video_qa` and Video-ChatGPT's five dimensions."""
    judges: dict[str, list[dict[str, str]]] = json.loads(
        files("vila.eval").joinpath("judge_prompts.json").read_text(encoding="utf-8")
    )["judges"]
    return judges


def prompt_fields(kind: str) -> list[str]:
    """What the messages of a kind of judge are filled with, each once."""
    return list(dict.fromkeys(_HOLE.findall("".join(message["content"] for message in judge_prompts()[kind]))))


def request_body(kind: str, case: JudgeCase, model: str = DEFAULT_MODEL) -> dict[str, Any]:
    """The published request: `model` and `messages`, nothing else. Raises DataError naming a field that is missing."""
    if kind not in judge_prompts():
        raise UnknownNameError("kind of judge", kind, judge_prompts())

    def fill(hole: re.Match[str]) -> str:
        if hole[1] not in case.fields:
            raise DataError(f"case {case.id}: no {hole[1]!r}, which the judge of {kind} is shown")
        return case.fields[hole[1]]

    messages = [{"role": m["role"], "content": _HOLE.sub(fill, m["content"])} for m in judge_prompts()[kind]]
    return {"model": model, "messages": messages}


def request_hash(body: Mapping[str, Any]) -> str:
    """What a reply is kept under: equal for equal model and messages."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def parse_reply(id: str, reply: str) -> Verdict:
    """A reply as a verdict: it must be a Python literal and nothing else, as the prompt asks. Nothing is run."""
    if len(reply) > _LONGEST_REPLY:
        return Verdict(id, reply)
    try:
        return Verdict(id, reply, ast.literal_eval(reply))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return Verdict(id, reply)


def verdict_score(value: Any) -> int | None:
    """The score as the original reads it: cut to a whole number (4.8 is 4, '4' is 4); None when it is none."""
    try:
        return int(value["score"])
    except (LookupError, TypeError, ValueError, OverflowError):
        return None


def verdict_is_yes(value: Any) -> bool | None:
    """Whether `pred` holds "yes", or else "no", in whatever letters; None for neither, or without a readable score."""
    said = value.get("pred") if verdict_score(value) is not None and isinstance(value, dict) else None
    if not isinstance(said, str):
        return None
    return True if "yes" in said.lower() else False if "no" in said.lower() else None


def summarize_verdicts(verdicts: Iterable[Verdict]) -> JudgeSummary:
    """Figures by the original's rules: verdicts that are not readable are left out of every denominator."""
    read = [verdict for verdict in verdicts if verdict.readable]
    scores = [verdict_score(verdict.value) for verdict in read]
    said = [verdict_is_yes(verdict.value) for verdict in read]
    yes, no = said.count(True), said.count(False)
    undecided = [v.id for v, score, word in zip(read, scores, said, strict=True) if score is not None and word is None]
    return JudgeSummary(
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

    def verdicts(self, kind: str, cases: Sequence[JudgeCase]) -> list[Verdict]:
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
        cost: CostEstimate = estimate_cost([row["body"] for row in rows], self.model, self.prices)
        raise NotJudgedError(f"no judge was asked; its requests are in {self.path} ({cost.text})")


@dataclass(frozen=True)
class ReplyFile:
    """Verdicts that lie in a file: a batch service's output, or what the original's judge leaves behind."""

    path: Path
    model: str = "from file"

    def verdicts(self, kind: str, cases: Sequence[JudgeCase]) -> list[Verdict]:
        """Those of the cases; a case without one is as one whose reply cannot be read.

        Raises DataError when no case has one: the file holds the replies on other answers.
        """
        found = {verdict.id: verdict for verdict in read_verdicts(self.path)}
        if cases and not any(case.id in found for case in cases):
            raise DataError(
                f"{self.path}: holds {len(found)} replies and none on these answers (theirs: {format_ids(found)}; "
                f"ours: {format_ids(case.id for case in cases)}); name the replies on this set"
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
            verdicts.append(parse_reply(str(row["custom_id"]), reply if isinstance(reply, str) else ""))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            record = f"line {number}"
            raise DataError(f"not a line of a batch service's output ({error})", file=path, record=record) from error
    return verdicts


def _kept(id: str, row: Any, path: Path) -> Verdict:
    if not (isinstance(row, list) and row):
        raise DataError(f"{path}: verdict {id}: expected [reply, question and answers], got {str(row)[:80]!r}")
    return Verdict(id, repr(row[0]), row[0])


# --- judge_cases
# Files of predictions about clips, as the original's programs write them, made into cases for a judge.


_OTHER = {"question": "Q", "answer": "A", "question1": "Q1", "question2": "Q2"}
_IDS = ("id", "question_id", "video_name")


def read_cases(path: Path, kind: str) -> list[JudgeCase]:
    """The cases of a JSON list or of JSON lines. A second row of one id is a case of its own.

    Raises DataError naming file and row for one that cannot be read or lacks what judges of this kind are shown.
    """
    if kind not in judge_prompts():
        raise UnknownNameError("kind of judge", kind, judge_prompts())
    seen: Counter[str] = Counter()
    cases = []
    for location, row in iter_records(path):
        if isinstance(row, DataError):
            row.hint = row.hint or "correct or delete the line"
            raise row
        if (half := lone_surrogate(row)) is not None:
            raise DataError(f"{location}: half a surrogate pair in the text {half!r}; remove it")
        fields = {name: _field(row, name, location) for name in prompt_fields(kind)}
        own = next((str(row[key]) for key in _IDS if key in row), None)
        if own is None:
            raise DataError(f"{location}: no id; expected {' or '.join(_IDS)}")
        seen[own] += 1
        cases.append(JudgeCase(own if seen[own] == 1 else f"{own} again ({seen[own]})", fields))
    if not cases:
        raise DataError(f"{path}: holds no prediction")
    return cases


def _field(row: Any, name: str, location: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{location}: expected a mapping, got {str(row)[:60]!r}")
    found = row.get(name, row.get(_OTHER.get(name, name)))
    if not isinstance(found, str | int | float):
        other = f" or {_OTHER[name]!r}" if name in _OTHER else ""
        raise DataError(f"{location}: no {name!r}{other}")
    return str(found)


# --- judge_run
# Asking a judge: every case until its reply can be read, replies kept on disk, the cost told before the start.


_STALE_ROUNDS = 10
"""The original gives up after so many rounds in which no further reply could be read."""


@dataclass
class OpenAIJudge:
    """A judge behind a server.

    cache:  folder of replies that could be read, by hash of model and messages; what lies there is not asked again.
    rounds: give up on the rest after this many rounds in a row without a further readable reply.
    prices: of models that the table does not have, or other ones.
    """

    endpoint: OpenAIClient
    cache: Path
    model: str = DEFAULT_MODEL
    rounds: int = _STALE_ROUNDS
    prices: Prices | None = None
    events: Events = SILENT

    def estimate(self, kind: str, cases: Sequence[JudgeCase]) -> CostEstimate:
        """What `verdicts` would ask now, and about what that costs."""
        bodies = self._bodies(kind, cases)
        asked = [body for key, body in bodies.items() if not self._path(key).is_file()]
        return estimate_cost(asked, self.model, self.prices, kept=len(bodies) - len(asked))

    def verdicts(self, kind: str, cases: Sequence[JudgeCase]) -> list[Verdict]:
        """A verdict for each case; equal requests are sent once. Says the estimate first.

        Replies that could not be read, and failures of the server, are asked again in rounds; what then remains comes
        as a verdict that is not readable. Raises ServerError when the server refuses, or answers nothing in a round.
        """
        self.events.log(self.estimate(kind, cases).text)
        bodies = self._bodies(kind, cases)
        replies = {key: reply for key in bodies if (reply := self._kept(key)) is not None}
        stale = 0
        name = f"judge {self.model}: {len(cases)} answers"
        with task(self.events, name, len(bodies), "answers"):
            self.events.advanced(name, len(replies))
            while stale < self.rounds:
                waiting = {key: body for key, body in bodies.items() if not _readable(replies.get(key))}
                if not waiting:
                    break
                came = self._round(waiting, replies, name)
                stale = 0 if came else stale + 1
        return [
            parse_reply(case.id, replies.get(key, "")) for case, key in zip(cases, self._keys(kind, cases), strict=True)
        ]

    def _round(self, waiting: Mapping[str, Mapping[str, Any]], replies: dict[str, str], name: str) -> int:
        """Ask each of `waiting` once more. Returns how many replies could be read."""
        keys = list(waiting)
        jobs = [partial(self.endpoint.complete, waiting[key]) for key in keys]
        readable = answered = 0
        error: Exception | None = None
        for number, result in self.endpoint.each(jobs):
            if not isinstance(result, ChatCompletion):
                if isinstance(result, ServerError) and result.final:
                    raise result
                error = result
                continue
            answered += 1
            replies[keys[number]] = result.text
            if _readable(result.text):
                readable += 1
                self.events.advanced(name, 1)
                kept = {"model": self.model, "messages": waiting[keys[number]]["messages"], "reply": result.text}
                write_json(self._path(keys[number]), kept)
        if error is not None and not answered:
            raise error
        return readable

    def _bodies(self, kind: str, cases: Sequence[JudgeCase]) -> dict[str, dict[str, Any]]:
        bodies = [request_body(kind, case, self.model) for case in cases]
        return {request_hash(body): body for body in bodies}

    def _keys(self, kind: str, cases: Sequence[JudgeCase]) -> list[str]:
        return [request_hash(request_body(kind, case, self.model)) for case in cases]

    def _path(self, key: str) -> Path:
        return self.cache / key[:2] / f"{key}.json"

    def _kept(self, key: str) -> str | None:
        path = self._path(key)
        return Fields.of_file(path).text("reply") if path.is_file() else None


def _readable(reply: str | None) -> bool:
    return reply is not None and parse_reply("", reply).readable
