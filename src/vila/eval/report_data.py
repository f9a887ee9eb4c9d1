"""Read a run folder of `vila eval` into summaries of bounded size, the input of its report and of comparisons.

RUN/eval.json                           model, data, scoring protocol, template, and the benchmarks' folders by name
RUN/BENCHMARK/scores.json               score, unit, interval, notes, metrics; or why there is no score
RUN/BENCHMARK/question_scores.jsonl     score of each question
RUN/BENCHMARK/predictions.jsonl         answers, and errors of questions that failed
RUN/BENCHMARK/speed.json                seconds, number of answers, and tokens where every session counted them
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, get_args

from PIL import Image as PilImage

from vila.core.errors import DataError, MediaError
from vila.core.files import resolve_path
from vila.core.reading import Fields, read_jsonl
from vila.core.types import Image, Video
from vila.eval.annotations import SHORT_ANSWER
from vila.eval.benchmark import BENCHMARKS, Item, QuestionScore, ScoringProtocol
from vila.eval.benchmarks.scienceqa import LETTER_INSTRUCTION
from vila.eval.predictions import PREDICTIONS_FILE, read_question_scores
from vila.eval.published import benchmark_title, published_table
from vila.eval.significance import Interval, mean_interval
from vila.media.image import open_image
from vila.media.video import open_frames
from vila.report.html import MAX_SIDE

_MAX_TEXT = 300
"""Characters of a question or an answer that a report shows."""
_MAX_CATEGORIES = 30
_MAX_FAILURES = 5
_MAX_WRONG = 8
_RESERVED_KEYS = ("benchmark", "model", "rules", "score", "unit", "interval", "notes", "problem")
"""Keys of scores.json that are not metrics."""
_UNFINISHED = "not finished: no scores.json; the same `vila eval` command resumes it"
_MAX_NUMBER = 10**12
_WRONG_BELOW = 0.5
"""Questions with a score below this count as wrong."""


@dataclass(frozen=True)
class SampleQuestion:
    """A question to show in a report, with its score.

    image:    longest side at most `MAX_SIDE` pixels; None if it cannot be shown.
    no_image: why there is no image.
    """

    score: QuestionScore
    question: str
    image: PilImage.Image | None = None
    no_image: str = ""


def sample_scores(scores: Iterable[QuestionScore], seed: str, count: int) -> list[QuestionScore]:
    """Choose up to `count` scores, round-robin over the categories, at most one per image.

    The choice is by a hash of seed and id: it does not depend on the order of `scores`, and one score more or less
    changes few of the others.
    """
    by_category: dict[str, list[QuestionScore]] = defaultdict(list)
    for score in scores:
        by_category[score.category].append(score)
    for own in by_category.values():
        own.sort(key=lambda score: hashlib.sha256(f"{seed}/{score.id}".encode()).digest())
    chosen: dict[str, QuestionScore] = {}
    for score in chain.from_iterable(zip_longest(*(by_category[category] for category in sorted(by_category)))):
        if score is not None:
            chosen.setdefault(score.group or f"\0{score.id}", score)
        if len(chosen) == count:
            break
    return list(chosen.values())


def load_samples(
    scores: Sequence[QuestionScore], predictions: Path, items: Callable[[], Sequence[Item]]
) -> tuple[SampleQuestion, ...]:
    """Add to each score the question text from the file `predictions` and the image of the benchmark's item."""
    if not scores:
        return ()
    ids = {_item_id(score) for score in scores}
    questions = _questions(predictions, ids)
    try:
        media = {item.id: _media(item) for item in items() if item.id in ids}
        absent = "no image"
    except DataError as error:
        media, absent = {}, str(error)
    samples = []
    for score in scores:
        name = _item_id(score)
        image, reason = _open(media[name]) if name in media else (None, absent)
        samples.append(SampleQuestion(score, shorten(questions.get(name, "")), image, reason))
    return tuple(samples)


def questions_from(name: str, data: str) -> Sequence[Item]:
    """Return the items of a benchmark whose data are in `data`. Raises DataError if it cannot be opened.

    name: a registered benchmark, or one with the suffix of its few-shot variants.
    """
    if not data:
        raise DataError("images are not shown: the run does not name its data directory")
    base = name if name in BENCHMARKS else name.partition("shot")[0].rstrip("0123456789").removesuffix("_")
    if base not in BENCHMARKS:
        raise DataError(f"images are not shown: unknown benchmark {name!r}")
    return BENCHMARKS[base](Path(data), 0).items()


def shorten(text: str, max_chars: int = _MAX_TEXT) -> str:
    """Remove `<image>` and the answer-format instruction from a question and cut it to `max_chars` characters."""
    text = text.strip().removeprefix("<image>").removesuffix(SHORT_ANSWER).removesuffix(LETTER_INSTRUCTION).strip()
    return text if len(text) <= max_chars else f"{text[: max_chars - 1].rstrip()}\N{HORIZONTAL ELLIPSIS}"


def _item_id(score: QuestionScore) -> str:
    return score.item or score.id


def _questions(predictions: Path, ids: Collection[str]) -> dict[str, str]:
    records = read_jsonl(predictions) if predictions.is_file() else ()
    known = (record for _, record in records if isinstance(record, dict) and isinstance(record.get("id"), str))
    return {record["id"]: str(record.get("prompt", "")) for record in known if record["id"] in ids}


def _media(item: Item) -> Image | Video | None:
    """Return the first image or video of the question itself, not of few-shot examples before it."""
    return next((part for part in item.messages[-1].parts if isinstance(part, Image | Video)), None)


def _open(part: Image | Video | None) -> tuple[PilImage.Image | None, str]:
    """Return a thumbnail and "", or None and the reason."""
    if part is None:
        return None, "no image"
    if isinstance(part.source, str) and "://" in part.source:
        return None, f"not downloaded: {part.source[:120]}"
    try:
        image = open_image(part) if isinstance(part, Image) else open_frames(part, 1)[0]
    except (MediaError, DataError) as error:
        return None, str(error)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image, ""


@dataclass(frozen=True)
class EvalRun:
    """A run folder.

    model, data: from eval.json; paths are relative to the run where possible, `data` is resolved.
    folders:     folder of each benchmark, in the order of the published table, then of the run.
    left_out:    why a requested benchmark has no folder, by name.
    metadata:    content of eval.json.
    """

    path: Path
    model: str
    data: str
    folders: Mapping[str, Path]
    left_out: Mapping[str, str]
    metadata: Mapping[str, Any]

    @property
    def short_model(self) -> str:
        """Last two components of the model's directory (`model` alone is ambiguous), or the hub id."""
        path = resolve_path(self.model, self.path)
        parts = path.resolve().parts if path.exists() else Path(self.model).parts
        return "/".join(parts[-2:]).lstrip("/") or self.model


@dataclass(frozen=True, slots=True)
class Speed:
    """Inference time of all sessions. tokens: generated; None, like prompt_tokens, where they were not counted."""

    seconds: float
    answered: int
    tokens: int | None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class BenchmarkSummary:
    """One benchmark of a run.

    score:    None if there is none; `problem` says why.
    interval: `mean`, `low` and `high` in the unit of the score, or of the mean question score in percent.
    asked:    questions of the run. scored: questions with a score. wrong: those with less than half of the points.
    categories: mean question scores by category, sorted; empty if there is only one.
    failed:   questions without an answer because of an error. failures: id and error of the first ones.
    sample:   some of the wrong answers; the same ones in every report.
    """

    name: str
    title: str
    score: float | None
    unit: str
    interval: Mapping[str, float] | None
    problem: str
    protocol: str
    asked: int
    scored: int
    wrong: int
    categories: Mapping[str, Interval]
    metrics: Mapping[str, Any]
    notes: tuple[str, ...]
    failed: int
    failures: tuple[tuple[str, str], ...]
    speed: Speed | None
    sample: tuple[SampleQuestion, ...]

    @property
    def interval_is_of_score(self) -> bool:
        """Whether the interval is that of the score, not of another mean."""
        return self.score is not None and bool(self.interval) and abs(self._mean - self.score) < 0.01

    @property
    def _mean(self) -> float:
        return self.interval["mean"] if self.interval else 0.0


def read_run(folder: Path) -> EvalRun:
    """Read eval.json of a run folder. Raises DataError if `folder` is not one."""
    path = folder / "eval.json"
    if not path.is_file():
        raise DataError("no eval.json", file=folder, hint="give the directory that `vila eval --output` wrote")
    metadata = Fields.of_file(path)
    named = metadata.get("benchmarks")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise metadata.refusal("benchmarks", expected="folders by benchmark name")
    table = list(published_table().benchmarks)
    names = sorted(named, key=lambda name: table.index(name) if name in table else len(table))
    data = metadata.text("data", "")
    # Before version 0.2 a relative path was relative to the working directory.
    data = str(path) if data and (path := resolve_path(data, folder)).exists() else data
    return EvalRun(
        folder,
        metadata.text("model", "") or folder.name,
        data,
        {name: folder / named[name] for name in names},
        {name: str(reason) for name, reason in metadata.section("left_out").items()},
        dict(metadata),
    )


def summarize_benchmark(name: str, folder: Path, items: Callable[[], Sequence[Item]]) -> BenchmarkSummary:
    """Summarize a benchmark's folder. items: returns its items; called only if a sample needs their images."""
    path = folder / "scores.json"
    scores = read_scores(path) if path.is_file() else _checked_scores(Fields({"problem": _UNFINISHED}, path))
    question_scores = read_question_scores(folder)
    failed, failures = _failed(folder / PREDICTIONS_FILE)
    wrong = [score for score in question_scores if score.value < _WRONG_BELOW]
    run = Fields.of_file(folder / "run.json") if (folder / "run.json").is_file() else None
    return BenchmarkSummary(
        name=name,
        title=benchmark_title(name),
        score=scores["score"],
        unit=scores["unit"],
        interval=scores["interval"],
        problem=scores["problem"],
        protocol=scores["rules"],
        asked=run.integer("questions", 0) if run else 0,
        scored=len(question_scores),
        wrong=len(wrong),
        categories=_category_scores(question_scores),
        metrics={key: value for key, value in scores.items() if key not in _RESERVED_KEYS},
        notes=tuple(scores["notes"]),
        failed=failed,
        failures=failures,
        speed=_speed(folder / "speed.json"),
        sample=load_samples(sample_scores(wrong, name, _MAX_WRONG), folder / PREDICTIONS_FILE, items),
    )


def read_scores(path: Path) -> dict[str, Any]:
    """Read scores.json; absent values are None or empty.

    Raises DataError naming file and field for a value of another type.
    """
    return _checked_scores(Fields.of_file(path))


def _checked_scores(fields: Fields) -> dict[str, Any]:
    interval = fields.section("interval")
    bounds = {
        name: interval.number(name, 0.0, minimum=-_MAX_NUMBER, maximum=_MAX_NUMBER) for name in ("mean", "low", "high")
    }
    return {
        **fields,
        "score": fields.number("score", None, minimum=-_MAX_NUMBER, maximum=_MAX_NUMBER),
        "unit": fields.text("unit", ""),
        "interval": {**interval, **bounds} if interval else None,
        "problem": fields.text("problem", ""),
        "rules": fields.text("rules", "", choices=("", *get_args(ScoringProtocol))),
        "notes": fields.texts("notes", []),
    }


def _category_scores(scores: Sequence[QuestionScore]) -> dict[str, Interval]:
    """Return the most frequent categories, sorted by name; none if there is only one."""
    by_category: dict[str, list[QuestionScore]] = defaultdict(list)
    for score in scores:
        by_category[score.category or "no category"].append(score)
    if len(by_category) < 2:
        return {}
    largest = sorted(by_category, key=lambda category: -len(by_category[category]))[:_MAX_CATEGORIES]
    found = {category: mean_interval(by_category[category]) for category in sorted(largest)}
    return {category: interval for category, interval in found.items() if interval}


def _failed(path: Path) -> tuple[int, tuple[tuple[str, str], ...]]:
    failures = [
        (str(record.get("id")), str(record["error"]))
        for _, record in (read_jsonl(path) if path.is_file() else ())
        if isinstance(record, dict) and "error" in record and "text" not in record
    ]
    return len(failures), tuple(failures[:_MAX_FAILURES])


def _speed(path: Path) -> Speed | None:
    if not path.is_file():
        return None
    record = Fields.of_file(path)
    tokens, prompt_tokens = (record.integer(name, None, maximum=_MAX_NUMBER) for name in ("tokens", "prompt_tokens"))
    return Speed(record.number("seconds"), record.integer("answered"), tokens, prompt_tokens)
