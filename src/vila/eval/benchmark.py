"""What a benchmark is: questions, how answers are scored, and the file that its server wants.

Scoring knows nothing of models: it reads answers, ours or those of anybody who writes the original's files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from vila.core.errors import DataError
from vila.core.registry import Registry
from vila.core.types import Message
from vila.core.vision_spec import ImageMode

ScoringProtocol = Literal["upstream", "lmms-eval"]
"""Whose rules count: those that the published table was made with, or lmms-eval's where they differ."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question: its id, the conversation that asks it, the true answer, and what it is about.

    id:          unique in the benchmark, as text.
    truth:       the answer, or the most frequent of several; "" where only the benchmark's server knows it.
    group:       items of equal group share a picture and are asked together.
    kind:        category that scores are also given by.
    question_id: as the benchmark's files name it; need not be unique. None: `id`.
    prompt:      what the original's answer files repeat of the question; "" for the text of the last message.
    template:    conversation template where the benchmark asks for one of its own; "" for the model's.
    image_mode:  how its pictures become square where the benchmark has a way of its own; None for the model's.
    facts:       what the original writes into the answer's row besides, such as options.
    """

    id: str
    messages: tuple[Message, ...]
    truth: str
    group: str
    category: str = ""
    question_id: str | int | None = None
    prompt: str = ""
    template: str = ""
    image_mode: ImageMode | None = None
    facts: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """One row of a file of answers.

    question_id: as the row has it.
    prompt:      the question as the row repeats it; some benchmarks read facts from it.
    where:       file and line, for messages.
    id:          of our own items where the row names it; "" in the original's files.
    """

    question_id: str | int
    text: str
    prompt: str = ""
    location: str = ""
    id: str = ""


@dataclass(frozen=True, slots=True)
class QuestionScore:
    """What one question got: value 0..1 of the points that it can give, and why.

    item: id of the item that `answer` is to, where several items make one question; "" for `id`.
    """

    id: str
    value: float
    group: str = ""
    category: str = ""
    answer: str = ""
    truth: str = ""
    rule: str = ""
    item: str = ""


@dataclass(frozen=True)
class AggregateMetric:
    """How a score that is not the mean mark follows from sums over questions.

    terms:      K summable numbers per question score, in the order of the scores.
    compute:    the score from the K sums.
    stratified: resample each category separately, which keeps its number of images in every bootstrap draw.
    """

    terms: tuple[tuple[float, ...], ...]
    compute: Callable[[Sequence[float]], float]
    stratified: bool = False


@dataclass(frozen=True)
class BenchmarkResult:
    """The score of a file of answers.

    score:    the headline figure as it is published: percent, or points.
    unit:     `%` or `points`.
    figures:  everything else that is reported, as plain data.
    marks:    question by question, for intervals, comparisons and galleries; their weighted mean is not always `score`.
    notes:    what was noticed and scored as the rules say: rows that are missing, given twice, or not read.
    headline: how the score follows from the marks; None when it is their mean in percent.
    """

    score: float
    unit: str
    metrics: dict[str, Any]
    question_scores: tuple[QuestionScore, ...]
    notes: tuple[str, ...] = ()
    aggregate: AggregateMetric | None = None


@dataclass(frozen=True)
class Submission:
    """File for a benchmark server. format: `json`, `jsonl` or `xlsx`; rows: mappings with the columns in order."""

    name: str
    format: str
    rows: list[dict[str, Any]]
    server: str
    checks: tuple[str, ...] = ()


class Benchmark(Protocol):
    """Questions and how their answers are scored."""

    name: str
    max_new_tokens: int

    def items(self) -> Sequence[Item]:
        """All questions, in a fixed order; items of one group stand together."""

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Score answers, in the order of their file. DataError for what the rules cannot score, naming ids."""


class Submits(Protocol):
    """A benchmark whose answers are sent to a server."""

    def submission(self, answers: Sequence[Answer]) -> Submission:
        """The server's file. DataError for what the server would refuse, naming ids."""


class OpenBenchmark(Protocol):
    """Opens a benchmark whose data lie in a directory."""

    def __call__(self, folder: Path, limit: int) -> Benchmark:
        """folder: `playground/data/eval`, or the benchmark's own folder in it. limit: about how many questions; 0: all.

        Raises DataError saying which file is missing and where it is obtained.
        """


BENCHMARKS: Registry[OpenBenchmark] = Registry(
    "benchmark",
    {
        "easy_vqa": "vila.eval.benchmarks.easy_vqa:EasyVqa",
        "vqav2": "vila.eval.benchmarks.vqav2:Vqav2",
        "gqa": "vila.eval.benchmarks.gqa:Gqa",
        "vizwiz": "vila.eval.benchmarks.vizwiz:VizWiz",
        "textvqa": "vila.eval.benchmarks.textvqa:TextVqa",
        "pope": "vila.eval.benchmarks.pope:Pope",
        "scienceqa": "vila.eval.benchmarks.scienceqa:ScienceQa",
        "mme": "vila.eval.benchmarks.mme:Mme",
        "mmbench": "vila.eval.benchmarks.mmbench:MmBench",
        "mmbench_cn": "vila.eval.benchmarks.mmbench:MmBenchCn",
        "seed": "vila.eval.benchmarks.seed:Seed",
        "videoqa": "vila.eval.benchmarks.videoqa:VideoQa",
        "videoqa_msvd": "vila.eval.benchmarks.videoqa:msvd",
        "videoqa_msrvtt": "vila.eval.benchmarks.videoqa:msrvtt",
        "videoqa_tgif": "vila.eval.benchmarks.videoqa:tgif",
        "videoqa_activitynet": "vila.eval.benchmarks.videoqa:activitynet",
    },
)


# --- scoring
# Scoring rules that several benchmarks share.


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


def answers_by_item(name: str, answers: Sequence[Answer], items: Sequence[Item]) -> dict[str, str]:
    """Answers by item id, exactly one for each. Raises DataError for ids that are missing, unknown or given twice."""
    known = {str(item.id if item.question_id is None else item.question_id): item.id for item in items}
    out: dict[str, str] = {}
    for answer in answers:
        key = answer.id or known.get(str(answer.question_id), str(answer.question_id))
        if key in out:
            raise DataError(f"{name}: {answer.location or 'answers'}: a second answer to question {key}")
        out[key] = answer.text
    check_ids(name, out, (item.id for item in items))
    return out
