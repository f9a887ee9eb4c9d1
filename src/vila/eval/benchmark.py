"""The `Benchmark` interface: questions, scoring of answers, and the submission file of its server.

Scoring is independent of models: it reads answers of `vila eval`, or files in the format of the LLaVA evaluation
scripts ("the original scripts" in this package).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from vila.core.errors import ConfigError, DataError
from vila.core.registry import Registry
from vila.core.types import Image, Message, Video
from vila.core.vision_spec import ImageMode
from vila.engine.sampling_params import SamplingParams

ScoringProtocol = Literal["upstream", "lmms-eval"]
"""Scoring rules: those of the published table, or those of lmms-eval where they differ."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question: its conversation, the reference answer and the metadata that scoring needs.

    id:          unique within the benchmark.
    truth:       reference answer, or the most frequent of several; "" if only the benchmark's server has it.
    group:       items with the same group share an image and go into one batch.
    category:    question category; scores are also reported per category.
    question_id: id in the benchmark's files, not necessarily unique; `id` by default.
    prompt:      question text to write into prediction files; the text of the last message by default.
    template:    conversation template if the benchmark prescribes one; "": the model's.
    image_mode:  image preprocessing if the benchmark prescribes one; None: the model's.
    extra:       additional keys of the prediction record, such as options.
    """

    id: str
    messages: tuple[Message, ...]
    truth: str
    group: str
    category: str = ""
    question_id: str | int = ""
    prompt: str = ""
    template: str = ""
    image_mode: ImageMode | None = None
    extra: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def __post_init__(self) -> None:
        if self.question_id == "":
            object.__setattr__(self, "question_id", self.id)
        if not self.prompt:
            object.__setattr__(self, "prompt", self.messages[-1].text)


@dataclass(frozen=True, slots=True)
class Answer:
    """One record of an answer file.

    question_id: as in the record.
    prompt:      question text in the record; some benchmarks parse it.
    location:    file and line, for error messages.
    id:          item id if the record has one; "" in files of the original scripts.
    """

    question_id: str | int
    text: str
    prompt: str = ""
    location: str = ""
    id: str = ""


@dataclass(frozen=True, slots=True)
class QuestionScore:
    """Score of one question.

    value:    fraction of the points of the question, 0..1.
    group:    questions with the same group share an image; "": a group of its own.
    rule:     why the question has this score, e.g. the rule that parsed the answer.
    item:     id of the item that `answer` belongs to, if several items make one question; "": `id`.
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
    """How to compute a score that is not the mean question score, for bootstrap intervals.

    terms:      K summable numbers per question score, in the order of the scores.
    compute:    the score from the K sums.
    stratified: resample each category separately, which keeps its number of images in every bootstrap draw.
    """

    terms: tuple[tuple[float, ...], ...]
    compute: Callable[[Sequence[float]], float]
    stratified: bool = False


@dataclass(frozen=True)
class BenchmarkResult:
    """Result of scoring an answer file.

    score:           the published metric, in `unit`: `%` or `points`.
    metrics:         all further metrics, as JSON types.
    question_scores: one per scored question.
    notes:           irregularities that the scoring protocol tolerates: missing, repeated or unreadable answers.
    aggregate:       how the score follows from the questions; None if it is the mean question score in percent.
    """

    score: float
    unit: str
    metrics: dict[str, Any]
    question_scores: tuple[QuestionScore, ...]
    notes: tuple[str, ...] = ()
    aggregate: AggregateMetric | None = None


@dataclass(frozen=True)
class Submission:
    """File for a benchmark server.

    format: `json`, `jsonl` or `xlsx`.
    rows:   mappings with the columns in order.
    server: where to upload the file.
    checks: description of the performed checks.
    """

    name: str
    format: str
    rows: list[dict[str, Any]]
    server: str
    checks: tuple[str, ...] = ()


_NO_VALUE = object()


@dataclass(frozen=True, slots=True)
class JudgeCase:
    """One answer for a judge. fields: values of the prompt's placeholders (`question`, `answer`, `pred`, ...)."""

    id: str
    fields: Mapping[str, str] = field(hash=False)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Reply of a judge to one case. value: the reply parsed as a Python literal, if `readable`."""

    id: str
    reply: str
    value: Any = field(default=_NO_VALUE, hash=False)

    @property
    def readable(self) -> bool:
        """Whether the reply is a Python literal."""
        return self.value is not _NO_VALUE


class Judge(Protocol):
    """Source of verdicts: a chat server, a file of replies, or a file that collects the requests."""

    @property
    def model(self) -> str:
        """Name of the judge model."""

    def verdicts(self, kind: str, cases: Sequence[JudgeCase]) -> list[Verdict]:
        """Return a verdict per case, in order. Raises DataError if there are none (yet)."""


class Benchmark(ABC):
    """Base class of all benchmarks. Constructors follow `OpenBenchmark`.

    name:            registered name; also the name of the result folder.
    max_new_tokens:  generation limit.
    sampling:        generation settings; None: greedy with `max_new_tokens`.
    skips_bad_lines: unreadable lines of answer files are skipped, as in the original scripts, instead of rejected.
    needs_judge:     scored by `judge`, which the caller sets; without it `score` raises DataError.
    """

    name: str
    max_new_tokens: int
    sampling: SamplingParams | None = None
    skips_bad_lines: bool = False
    needs_judge: bool = False
    judge: Judge | None = None

    def items(self) -> Sequence[Item]:
        """Return all questions in a fixed order, those of a group adjacent."""
        return self._items

    @cached_property
    def _items(self) -> list[Item]:
        return self.load_items()

    @abstractmethod
    def load_items(self) -> list[Item]:
        """Read the questions; called once, by `items`."""

    @abstractmethod
    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Score answers in the order of their file. Raises DataError with ids if the protocol cannot score them."""

    def submission(self, answers: Sequence[Answer]) -> Submission:
        """Build the file for the benchmark's server; see `vila.eval.submit.SERVERS` for the benchmarks that have one.

        Raises DataError with ids for answers that the server would reject, and for benchmarks without a server.
        """
        raise DataError("has no server for submissions", field=self.name)


class OpenBenchmark(Protocol):
    """Constructor of a benchmark."""

    def __call__(self, folder: Path, limit: int) -> Benchmark:
        """Open the benchmark whose data are in a directory.

        folder: `playground/data/eval`, or the benchmark's own directory in it.
        limit:  approximate number of questions, whole groups only; 0: all.
        Raises DataError that names a missing file and where to download it.
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
        "videoqa_msvd": "vila.eval.benchmarks.videoqa:Msvd",
        "videoqa_msrvtt": "vila.eval.benchmarks.videoqa:Msrvtt",
        "videoqa_tgif": "vila.eval.benchmarks.videoqa:Tgif",
        "videoqa_activitynet": "vila.eval.benchmarks.videoqa:ActivityNet",
    },
)


def exact_match(prediction: str, truth: str) -> bool:
    """Return whether both texts are equal after stripping white space at both ends."""
    return prediction.strip() == truth.strip()


def percent(values: Iterable[float]) -> float:
    """Return the mean of fractions in percent; 0 for none."""
    numbers = list(values)
    return 100 * sum(numbers) / len(numbers) if numbers else 0.0


def percent_by(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the mean in percent of the values of each key, by key in alphabetical order."""
    by_key: dict[str, list[float]] = defaultdict(list)
    for key, value in values:
        by_key[key].append(value)
    return {key: percent(by_key[key]) for key in sorted(by_key)}


def missing_media(items: Sequence[Item]) -> list[str]:
    """Return the paths of image and video files that do not exist, each once, in the order of the questions."""
    paths = {
        str(part.source): None
        for item in items
        for message in item.messages
        for part in message.parts
        if isinstance(part, Image | Video) and isinstance(part.source, str | Path) and "://" not in str(part.source)
    }
    return [path for path in paths if not Path(path).is_file()]


PUBLISHED_BENCHMARKS = (
    "vqav2",
    "gqa",
    "vizwiz",
    "scienceqa",
    "textvqa",
    "pope",
    "mme",
    "mmbench",
    "mmbench_cn",
    "seed",
)
"""Benchmarks of the published results table, in its order."""


_ALIASES = {
    "sqa": "scienceqa", "sqa_i": "scienceqa", "vqa_v2": "vqav2", "vqa_t": "textvqa", "mmb": "mmbench",
    "mmb_cn": "mmbench_cn", "seed_bench": "seed",
}  # fmt: skip
"""Names in the published table, directories and scripts: lower case, dashes as underscores."""


def parse_benchmark_names(text: str) -> list[str]:
    """Parse comma-separated names or published names of benchmarks, in any case; `all` is PUBLISHED_BENCHMARKS.

    Raises UnknownNameError for other names.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    names = [one for name in names for one in (PUBLISHED_BENCHMARKS if name == "all" else (_canonical_name(name),))]
    for name in names:
        BENCHMARKS[name]
    if not names:
        raise ConfigError(field="--benchmarks", value=text, expected="comma-separated benchmark names")
    return list(dict.fromkeys(names))


def _canonical_name(name: str) -> str:
    plain = name.lower().replace("-", "_")
    own = _ALIASES.get(plain, plain)
    return own if own in BENCHMARKS else name
