"""LLM-as-a-judge scoring as in Video-ChatGPT (arXiv 2306.05424): prompts, reply parsing, metrics, costs and caching."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from vila.core.errors import DataError, UnknownNameError
from vila.core.files import cache_dir, write_json, write_jsonl
from vila.core.progress import SILENT, Events, task
from vila.core.reading import Fields, lone_surrogate, read_json, read_jsonl
from vila.eval.annotation_files import iter_records
from vila.eval.annotations import format_ids
from vila.eval.benchmark import Benchmark, JudgeCase, Verdict
from vila.eval.openai_client import ChatCompletion, OpenAIClient, ServerError

DEFAULT_MODEL = "gpt-3.5-turbo"
"""Model of the original evaluation; OpenAI changes what this alias refers to."""

Prices = Mapping[str, tuple[float, float]]
"""US dollars per million input and output tokens, by model."""

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
"""OpenAI's list prices of 2025."""

_BYTES_PER_TOKEN = 4
_TOKENS_PER_MESSAGE = 4
_TOKENS_PER_REPLY = 20
"""`{'pred': 'yes', 'score': 4}` and a margin."""
_DATE_SUFFIX = re.compile(r"-\d{4}(-\d{2}-\d{2})?$")
_PLACEHOLDER = re.compile(r"\{(question[12]?|answer|pred[12]?)\}")
_MAX_REPLY_CHARS = 10_000
_STALE_ROUNDS = 10
"""Rounds without a further readable reply after which the original evaluation gives up."""


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """Estimated cost of judging. dollars: None if the price is unknown. cached: requests with a cached reply."""

    model: str
    requests: int
    cached: int
    input_tokens: int
    output_tokens: int
    dollars: float | None

    @property
    def text(self) -> str:
        """One line for the user."""
        cached = f" ({self.cached:,} cached)" if self.cached else ""
        cost = "price unknown" if self.dollars is None else f"about ${self.dollars:.2f}"
        if self.dollars is not None and (self.model in PRICES or _DATE_SUFFIX.sub("", self.model) in PRICES):
            cost += " at prices of 2025"
        return (
            f"judge {self.model}: {self.requests:,} requests{cached}, about {self.input_tokens:,} input and "
            f"{self.output_tokens:,} output tokens, {cost}"
        )


def estimate_cost(
    bodies: Sequence[Mapping[str, Any]], model: str, prices: Prices | None = None, cached: int = 0
) -> CostEstimate:
    """Estimate tokens and cost of requests.

    prices: of further models; they replace those of `PRICES`. A dated model (`gpt-4o-2024-11-20`) has the price of its
            name without the date.
    cached: requests that need not be sent.
    """
    input_tokens = sum(
        _TOKENS_PER_MESSAGE + -(-len(message["content"].encode()) // _BYTES_PER_TOKEN)
        for body in bodies
        for message in body["messages"]
    )
    output_tokens = _TOKENS_PER_REPLY * len(bodies)
    table = {**PRICES, **(prices or {})}
    price = table.get(model) or table.get(_DATE_SUFFIX.sub("", model))
    dollars = None if price is None else (input_tokens * price[0] + output_tokens * price[1]) / 1e6
    return CostEstimate(model, len(bodies), cached, input_tokens, output_tokens, dollars)


@dataclass(frozen=True, slots=True)
class JudgeSummary:
    """Metrics of verdicts, by the rules of the original evaluation.

    accuracy:      percent of yes among yes and no.
    average_score: 0..5, over all readable verdicts.
    count:         readable verdicts.
    no_score:      ids of readable verdicts without an integer score; they count as 0 and as neither yes nor no.
    undecided:     ids of verdicts with a score but neither yes nor no.
    """

    accuracy: float
    average_score: float
    yes: int
    no: int
    count: int
    no_score: tuple[str, ...]
    undecided: tuple[str, ...]


class NotJudgedError(DataError):
    """The requests were written to a file as requested; there are no verdicts yet."""


@cache
def judge_prompts() -> Mapping[str, list[dict[str, str]]]:
    """Return the message templates of every kind of judge: `video_qa` and Video-ChatGPT's five dimensions."""
    judges: dict[str, list[dict[str, str]]] = json.loads(
        files("vila.eval").joinpath("judge_prompts.json").read_text(encoding="utf-8")
    )["judges"]
    return judges


def prompt_fields(kind: str) -> list[str]:
    """Return the names of the placeholders of a kind of judge."""
    return list(dict.fromkeys(_PLACEHOLDER.findall("".join(message["content"] for message in judge_prompts()[kind]))))


def request_body(kind: str, case: JudgeCase, model: str = DEFAULT_MODEL) -> dict[str, Any]:
    """Build the published request: `model` and `messages` only. Raises DataError if the case lacks a field."""
    if kind not in judge_prompts():
        raise UnknownNameError("kind of judge", kind, judge_prompts())

    def fill(placeholder: re.Match[str]) -> str:
        if placeholder[1] not in case.fields:
            raise DataError(f"missing; the prompt of {kind} needs it", record=f"case {case.id}", field=placeholder[1])
        return case.fields[placeholder[1]]

    messages = [{"role": m["role"], "content": _PLACEHOLDER.sub(fill, m["content"])} for m in judge_prompts()[kind]]
    return {"model": model, "messages": messages}


def request_hash(body: Mapping[str, Any]) -> str:
    """Return the cache key of a request."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def parse_reply(id: str, reply: str) -> Verdict:
    """Parse a reply, which must be a Python literal and nothing else. No code is executed."""
    if len(reply) > _MAX_REPLY_CHARS:
        return Verdict(id, reply)
    try:
        return Verdict(id, reply, ast.literal_eval(reply))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return Verdict(id, reply)


def verdict_score(value: Any) -> int | None:
    """Return the score truncated to an integer (4.8 and '4' are 4), as in the original; None if there is none."""
    try:
        return int(value["score"])
    except (LookupError, TypeError, ValueError, OverflowError):
        return None


def verdict_is_yes(value: Any) -> bool | None:
    """Return True if `pred` contains "yes", False if it contains "no", in any case.

    None: it contains neither, or the verdict has no score.
    """
    pred = value.get("pred") if verdict_score(value) is not None and isinstance(value, dict) else None
    if not isinstance(pred, str):
        return None
    return True if "yes" in pred.lower() else False if "no" in pred.lower() else None


def summarize_verdicts(verdicts: Iterable[Verdict]) -> JudgeSummary:
    """Compute the metrics; unreadable verdicts are left out of every denominator."""
    read = [verdict for verdict in verdicts if verdict.readable]
    scores = [verdict_score(verdict.value) for verdict in read]
    decisions = [verdict_is_yes(verdict.value) for verdict in read]
    yes, no = decisions.count(True), decisions.count(False)
    undecided = [
        verdict.id
        for verdict, score, decision in zip(read, scores, decisions, strict=True)
        if score is not None and decision is None
    ]
    return JudgeSummary(
        accuracy=100 * yes / (yes + no) if yes + no else 0.0,
        average_score=sum(score or 0 for score in scores) / len(read) if read else 0.0,
        yes=yes,
        no=no,
        count=len(read),
        no_score=tuple(verdict.id for verdict, score in zip(read, scores, strict=True) if score is None),
        undecided=tuple(undecided),
    )


@dataclass(frozen=True)
class RequestFile:
    """Judge that writes its requests to a file in the format of OpenAI's batch API."""

    path: Path
    model: str = DEFAULT_MODEL
    prices: Prices | None = None

    def verdicts(self, kind: str, cases: Sequence[JudgeCase]) -> list[Verdict]:
        """Write `path`. Always raises NotJudgedError: there are no verdicts yet."""
        records: list[dict[str, Any]] = [
            {
                "custom_id": case.id,
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": request_body(kind, case, self.model),
            }
            for case in cases
        ]
        write_jsonl(self.path, records)
        cost = estimate_cost([record["body"] for record in records], self.model, self.prices)
        raise NotJudgedError(f"not judged yet: the requests are in this file ({cost.text})", file=self.path)


@dataclass(frozen=True)
class ReplyFile:
    """Judge that reads verdicts from the output of a batch API or of the original evaluation."""

    path: Path
    model: str = "from file"

    def verdicts(self, kind: str, cases: Sequence[JudgeCase]) -> list[Verdict]:
        """Return the verdicts of the cases; an unreadable one for a case that the file does not have.

        Raises DataError if the file has none of the cases.
        """
        found = {verdict.id: verdict for verdict in read_verdicts(self.path)}
        if cases and not any(case.id in found for case in cases):
            raise DataError(
                f"none of its {len(found)} replies belongs to one of these answers "
                f"(ids in the file: {format_ids(found)}; "
                f"ids of the answers: {format_ids(case.id for case in cases)})",
                file=self.path,
            )
        return [found.get(case.id, Verdict(case.id, "")) for case in cases]


def read_verdicts(path: Path) -> list[Verdict]:
    """Read the output of a batch API (JSON lines), or the original evaluation's folder of `ID.json` or merged file.

    Raises DataError naming file and record.
    """
    if path.is_dir():
        return [_verdict(file.stem, read_json(file), file) for file in sorted(path.glob("*.json"))]
    if not path.is_file():
        raise DataError("no such file", file=path)
    if path.suffix == ".json":
        merged = read_json(path)
        if not isinstance(merged, dict):
            raise DataError(file=path, value=merged, expected="verdicts by id, {ID: [reply, question and answers]}")
        return [_verdict(id, record, path) for id, record in merged.items()]
    verdicts = []
    for number, record in read_jsonl(path):
        try:
            choice = ((record["response"] or {}).get("body") or {}).get("choices", [{}])[0]
            reply = (choice.get("message") or {}).get("content")
            verdicts.append(parse_reply(str(record["custom_id"]), reply if isinstance(reply, str) else ""))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(
                f"not a line of a batch API's output ({error})", file=path, record=f"line {number}"
            ) from error
    return verdicts


def _verdict(id: str, record: Any, path: Path) -> Verdict:
    if not (isinstance(record, list) and record):
        raise DataError(file=path, record=f"verdict {id}", value=record, expected="[reply, question and answers]")
    return Verdict(id, repr(record[0]), record[0])


_ALTERNATIVE_KEYS = {"question": "Q", "answer": "A", "question1": "Q1", "question2": "Q2"}
_ID_KEYS = ("id", "question_id", "video_name")


def read_cases(path: Path, kind: str) -> list[JudgeCase]:
    """Read the predictions of the original evaluation, a JSON list or JSON lines, as cases for a judge.

    A further record of an id is a case of its own. Raises DataError naming file and record.
    """
    if kind not in judge_prompts():
        raise UnknownNameError("kind of judge", kind, judge_prompts())
    counts: Counter[str] = Counter()
    cases = []
    for location, record in iter_records(path):
        if isinstance(record, DataError):
            record.hint = record.hint or "correct or delete the line"
            raise record
        if (half := lone_surrogate(record)) is not None:
            raise DataError("unpaired surrogate", file=path, record=location, value=half)
        fields = {name: _field(record, name, path, location) for name in prompt_fields(kind)}
        own = next((str(record[key]) for key in _ID_KEYS if key in record), None)
        if own is None:
            raise DataError("no id", file=path, record=location, expected=" or ".join(_ID_KEYS))
        counts[own] += 1
        cases.append(JudgeCase(own if counts[own] == 1 else f"{own} again ({counts[own]})", fields))
    if not cases:
        raise DataError("no predictions", file=path)
    return cases


def _field(record: Any, name: str, path: Path, location: str) -> str:
    if not isinstance(record, dict):
        raise DataError(file=path, record=location, value=record, expected="an object")
    found = record.get(name, record.get(_ALTERNATIVE_KEYS.get(name, name)))
    if not isinstance(found, str | int | float):
        keys = [name, *filter(None, [_ALTERNATIVE_KEYS.get(name)])]
        raise DataError("missing", file=path, record=location, field=" or ".join(keys))
    return str(found)


@dataclass
class OpenAIJudge:
    """Judge behind a chat server.

    cache:  folder of readable replies, by hash of model and messages.
    rounds: give up on the remaining cases after this many rounds without a further readable reply.
    prices: of further models; see `estimate_cost`.
    """

    client: OpenAIClient
    cache: Path
    model: str = DEFAULT_MODEL
    rounds: int = _STALE_ROUNDS
    prices: Prices | None = None
    events: Events = SILENT

    def estimate(self, kind: str, cases: Sequence[JudgeCase]) -> CostEstimate:
        """Estimate the cost of the requests that are not cached."""
        bodies = self._bodies(kind, cases)
        unsent = [body for key, body in bodies.items() if not self._path(key).is_file()]
        return estimate_cost(unsent, self.model, self.prices, len(bodies) - len(unsent))

    def verdicts(self, kind: str, cases: Sequence[JudgeCase]) -> list[Verdict]:
        """Log the cost estimate and return a verdict per case; equal requests are sent once.

        Unreadable replies and server errors are retried in rounds; what remains is returned as unreadable verdicts.
        Raises ServerError if the server permanently rejects requests, or answers none of a round.
        """
        self.events.log(self.estimate(kind, cases).text)
        bodies = self._bodies(kind, cases)
        replies = {key: reply for key in bodies if (reply := self._cached(key)) is not None}
        stale = 0
        name = f"judge {self.model}: {len(cases)} answers"
        with task(self.events, name, len(bodies), "answers"):
            self.events.advanced(name, len(replies))
            while stale < self.rounds:
                waiting = {key: body for key, body in bodies.items() if not _readable(replies.get(key))}
                if not waiting:
                    break
                progress = self._round(waiting, replies, name)
                stale = 0 if progress else stale + 1
        keys = [request_hash(request_body(kind, case, self.model)) for case in cases]
        return [parse_reply(case.id, replies.get(key, "")) for case, key in zip(cases, keys, strict=True)]

    def _round(self, waiting: Mapping[str, Mapping[str, Any]], replies: dict[str, str], name: str) -> int:
        """Send each of `waiting` once. Returns the number of readable replies."""
        keys = list(waiting)
        jobs = [partial(self.client.complete, waiting[key]) for key in keys]
        readable = answered = 0
        error: Exception | None = None
        for index, result in self.client.run_parallel(jobs):
            if not isinstance(result, ChatCompletion):
                if isinstance(result, ServerError) and result.final:
                    raise result
                error = result
                continue
            answered += 1
            key = keys[index]
            replies[key] = result.text
            if _readable(result.text):
                readable += 1
                self.events.advanced(name, 1)
                record = {"model": self.model, "messages": waiting[key]["messages"], "reply": result.text}
                write_json(self._path(key), record)
        if error is not None and not answered:
            raise error
        return readable

    def _bodies(self, kind: str, cases: Sequence[JudgeCase]) -> dict[str, dict[str, Any]]:
        bodies = [request_body(kind, case, self.model) for case in cases]
        return {request_hash(body): body for body in bodies}

    def _path(self, key: str) -> Path:
        return self.cache / key[:2] / f"{key}.json"

    def _cached(self, key: str) -> str | None:
        path = self._path(key)
        return Fields.of_file(path).text("reply") if path.is_file() else None


def _readable(reply: str | None) -> bool:
    return reply is not None and parse_reply("", reply).readable


def check_judge(judge: str) -> None:
    """Check the URL or the file of replies of `--judge` before work starts. Raises VilaError."""
    if not judge or judge == "none":
        return
    if "://" in judge:
        OpenAIClient(judge)
        return
    read_verdicts(Path(judge).expanduser())


def attach_judge(benchmark: Benchmark, judge: str, model: str, folder: Path, events: Events) -> None:
    """Set the judge of a benchmark with open-ended answers; other benchmarks do not change.

    judge:  URL of an OpenAI-compatible server, a file of replies, or `none` to write the requests into `folder`.
    """
    if not judge or not benchmark.needs_judge:
        return
    if judge == "none":
        benchmark.judge = RequestFile(folder / f"{benchmark.name}-requests.jsonl", model)
    elif "://" in judge:
        benchmark.judge = OpenAIJudge(OpenAIClient(judge), cache_dir() / "judge", model, events=events)
    else:
        benchmark.judge = ReplyFile(Path(judge).expanduser())
