"""What a report tells of one benchmark, read from the runner's folder: bounded, whatever the benchmark's size.

RUN/eval.json                       model, data, rules, template, and the benchmarks' folders by name
RUN/BENCHMARK/scores.json           headline, unit, interval, notes, figures; or no score and why
RUN/BENCHMARK/marks.jsonl           question by question
RUN/BENCHMARK/predictions.jsonl     answers, and questions that could not be asked
RUN/BENCHMARK/speed.json            seconds and questions answered in them; tokens where all were counted
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, get_args

from PIL import Image as PilImage

from vila.core.errors import DataError, MediaError
from vila.core.files import resolve_path
from vila.core.reading import Fields, read_jsonl
from vila.core.types import Image, Video
from vila.eval.annotations import SHORT_ANSWER
from vila.eval.benchmark import BENCHMARKS, Item, Mark, Rules
from vila.eval.benchmarks.scienceqa import LETTER
from vila.eval.predictions import MERGED
from vila.eval.published import published_table, title_of
from vila.eval.stats import interval
from vila.media.image import open_image
from vila.media.video import open_frames
from vila.report.html import MAX_SIDE

# --- report_sample
# Answers to show in a report: a fixed sample of questions, with their words and pictures.


_LONGEST = 300
"""Characters of a question or an answer that are shown."""


@dataclass(frozen=True)
class Shown:
    """A question with its mark. picture: at most 320 pixels a side; None, and `no_picture` says why."""

    mark: Mark
    question: str
    picture: PilImage.Image | None = None
    no_picture: str = ""


def spread(marks: Iterable[Mark], seed: str, count: int) -> list[Mark]:
    """At most `count` marks, the kinds in turn, each picture once: the same ones whenever the same marks are given.

    Which ones does not depend on their order, and one more or one less mark exchanges few.
    """
    by_kind: dict[str, list[Mark]] = defaultdict(list)
    for mark in marks:
        by_kind[mark.kind].append(mark)
    for own in by_kind.values():
        own.sort(key=lambda mark: hashlib.sha256(f"{seed}/{mark.id}".encode()).digest())
    chosen: dict[str, Mark] = {}
    for mark in chain.from_iterable(zip_longest(*(by_kind[kind] for kind in sorted(by_kind)))):
        if mark is not None:
            chosen.setdefault(mark.group or f"\0{mark.id}", mark)
        if len(chosen) == count:
            break
    return list(chosen.values())


def show(marks: Sequence[Mark], predictions: Path, items: Callable[[], Sequence[Item]]) -> tuple[Shown, ...]:
    """The marks with the questions that `predictions` repeats, and pictures from the benchmark's items."""
    if not marks:
        return ()
    ids = {_item_id(mark) for mark in marks}
    questions = _questions(predictions, ids)
    try:
        media = {item.id: _media(item) for item in items() if item.id in ids}
        absent = "no picture"
    except DataError as error:
        media, absent = {}, str(error)
    shown = []
    for mark in marks:
        name = _item_id(mark)
        picture, why = _open(media[name]) if name in media else (None, absent)
        shown.append(Shown(mark, shorten(questions.get(name, "")), picture, why))
    return tuple(shown)


def questions_from(name: str, data: str) -> Sequence[Item]:
    """The questions of a benchmark whose data lie in `data`. Raises DataError when they cannot be opened."""
    if not data:
        raise DataError("pictures are not shown: the run does not say where its data are")
    base = name if name in BENCHMARKS else name.partition("shot")[0].rstrip("0123456789").removesuffix("_")
    if base not in BENCHMARKS:
        raise DataError(f"pictures are not shown: no benchmark is called {name}")
    return BENCHMARKS[base](Path(data), 0).items()


def shorten(text: str, longest: int = _LONGEST) -> str:
    """`text` without the picture's mark and what questions of its kind all end with, cut to `longest` characters."""
    text = text.strip().removeprefix("<image>").removesuffix(SHORT_ANSWER).removesuffix(LETTER).strip()
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}\N{HORIZONTAL ELLIPSIS}"


def _item_id(mark: Mark) -> str:
    return mark.item or mark.id


def _questions(predictions: Path, ids: Collection[str]) -> dict[str, str]:
    rows = read_jsonl(predictions) if predictions.is_file() else ()
    known = (row for _, row in rows if isinstance(row, dict) and isinstance(row.get("id"), str))
    return {row["id"]: str(row.get("prompt", "")) for row in known if row["id"] in ids}


def _media(item: Item) -> Image | Video | None:
    """What the question itself shows first; worked examples before it do not count."""
    return next((part for part in item.messages[-1].parts if isinstance(part, Image | Video)), None)


def _open(part: Image | Video | None) -> tuple[PilImage.Image | None, str]:
    if part is None:
        return None, "no picture"
    if isinstance(part.source, str) and "://" in part.source:
        return None, f"not fetched: {part.source[:120]}"
    try:
        picture = open_image(part) if isinstance(part, Image) else open_frames(part, 1)[0]
    except (MediaError, DataError) as error:
        return None, str(error)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture, ""


_KINDS_SHOWN = 30
_FAILURES_SHOWN = 5
_WRONG_SHOWN = 8
_HEADLINE = ("benchmark", "model", "rules", "score", "unit", "interval", "notes", "problem")
_LARGEST = 10**12
_WRONG_BELOW = 0.5
"""Marks from here on are not called wrong: half of the points and more."""


@dataclass(frozen=True)
class RunFolder:
    """A run. folders: of its benchmarks, in the order of the published table and then of the run.

    model, data: as eval.json has them, relative to the run where that is possible; data is resolved.
    left_out: why a benchmark that was asked for has no folder, by name. facts: all that eval.json holds.
    """

    path: Path
    model: str
    data: str
    folders: Mapping[str, Path]
    left_out: Mapping[str, str]
    facts: Mapping[str, Any]

    @property
    def short_model(self) -> str:
        """Name of the model's directory with the one that holds it, as names like `model` say little; or the hub id."""
        path = resolve_path(self.model, self.path)
        parts = path.resolve().parts if path.exists() else Path(self.model).parts
        return "/".join(parts[-2:]).lstrip("/") or self.model


@dataclass(frozen=True, slots=True)
class Kind:
    """Mean mark of one kind of question in percent, with its 95 % interval."""

    name: str
    mean: float
    low: float
    high: float
    questions: int


@dataclass(frozen=True, slots=True)
class Speed:
    """How long asking took, over all sessions. tokens: of the answers; None where nobody counted, as prompt_tokens."""

    seconds: float
    answered: int
    tokens: int | None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Digest:
    """One benchmark of a run.

    score:     None when it was not scored; `problem` says why.
    interval:  of the mean mark in percent, with `mean`, `low` and `high`.
    asked:     questions of the run; marks: questions that were scored; wrong: those below half of their points.
    failed:    questions that could not be asked; failures: the first of them with their errors.
    sample:    some of the wrong answers, the same ones in every report.
    """

    name: str
    title: str
    score: float | None
    unit: str
    interval: Mapping[str, float] | None
    problem: str
    rules: str
    asked: int
    marks: int
    wrong: int
    kinds: tuple[Kind, ...]
    figures: Mapping[str, Any]
    notes: tuple[str, ...]
    failed: int
    failures: tuple[tuple[str, str], ...]
    speed: Speed | None
    sample: tuple[Shown, ...]

    @property
    def interval_is_of_score(self) -> bool:
        """Whether the headline is the mean mark, so that the interval is its own."""
        return self.score is not None and bool(self.interval) and abs(self._mean - self.score) < 0.01

    @property
    def _mean(self) -> float:
        return self.interval["mean"] if self.interval else 0.0


def read_run(folder: Path) -> RunFolder:
    """A run's folder. Raises DataError when it is none."""
    path = folder / "eval.json"
    if not path.is_file():
        raise DataError(f"{folder}: no eval.json; give the directory that `vila eval --output` wrote")
    facts = Fields.of_file(path)
    named = facts.get("benchmarks")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise DataError(f"{path}: expected folders by benchmark under 'benchmarks', got {named!r}")
    table = list(published_table().benchmarks)
    names = sorted(named, key=lambda name: table.index(name) if name in table else len(table))
    data = facts.text("data", "")
    # Before version 0.2 a relative path was one from the working directory.
    data = str(path) if data and (path := resolve_path(data, folder)).exists() else data
    return RunFolder(
        folder,
        facts.text("model", "") or folder.name,
        data,
        {name: folder / named[name] for name in names},
        {name: str(why) for name, why in facts.section("left_out").items()},
        dict(facts),
    )


def digest(name: str, folder: Path, items: Callable[[], Sequence[Item]]) -> Digest:
    """One benchmark's folder in brief. items: gives its questions, for their pictures; asked only if one is shown."""
    scores = _scores(folder / "scores.json")
    marks = read_marks(folder / "marks.jsonl")
    failed, failures = _failed(folder / MERGED)
    wrong = [mark for mark in marks if mark.value < _WRONG_BELOW]
    run = Fields.of_file(folder / "run.json") if (folder / "run.json").is_file() else None
    return Digest(
        name=name,
        title=title_of(name),
        score=scores["score"],
        unit=scores["unit"],
        interval=scores["interval"],
        problem=scores["problem"],
        rules=scores["rules"],
        asked=run.integer("questions", 0) if run else 0,
        marks=len(marks),
        wrong=len(wrong),
        kinds=tuple(_kinds(marks)),
        figures={key: value for key, value in scores.items() if key not in _HEADLINE},
        notes=tuple(scores["notes"]),
        failed=failed,
        failures=failures,
        speed=_speed(folder / "speed.json"),
        sample=show(spread(wrong, name, _WRONG_SHOWN), folder / MERGED, items),
    )


def read_marks(path: Path) -> list[Mark]:
    """Marks of a run; none when there is no file. Raises DataError naming file and line of a row that is none."""
    known = {field.name for field in fields(Mark)}
    marks = []
    for number, row in read_jsonl(path) if path.is_file() else ():
        try:
            mark = Mark(**{key: value for key, value in row.items() if key in known})
            _ = 0 <= mark.value < _WRONG_BELOW, "".join(getattr(mark, name) for name in known - {"value"})
        except (AttributeError, TypeError) as error:
            raise DataError(f"{path} line {number}: not a mark ({error}); score the run again") from error
        marks.append(mark)
    return marks


def _scores(path: Path) -> dict[str, Any]:
    if not path.is_file():
        problem = "not finished: no scores.json; the same `vila eval` goes on where it was"
        return _checked_scores(Fields({"problem": problem}, path))
    return read_scores(path)


def read_scores(path: Path) -> dict[str, Any]:
    """Read the headline and figures of a benchmark; values that are absent are None or empty.

    Raises DataError naming file and field for a value of another type.
    """
    return _checked_scores(Fields.of_file(path))


def _checked_scores(fields: Fields) -> dict[str, Any]:
    interval = fields.section("interval")
    sure = {name: interval.number(name, 0.0, minimum=-_LARGEST, maximum=_LARGEST) for name in ("mean", "low", "high")}
    return {
        **fields,
        "score": fields.number("score", None, minimum=-_LARGEST, maximum=_LARGEST),
        "unit": fields.text("unit", ""),
        "interval": {**interval, **sure} if interval else None,
        "problem": fields.text("problem", ""),
        "rules": fields.text("rules", "", choices=("", *get_args(Rules))),
        "notes": fields.texts("notes", []),
    }


def _kinds(marks: Sequence[Mark]) -> Iterable[Kind]:
    by_kind: dict[str, list[Mark]] = defaultdict(list)
    for mark in marks:
        by_kind[mark.kind or "no kind"].append(mark)
    if len(by_kind) < 2:
        return
    kept = {kind for kind, _ in Counter({kind: len(own) for kind, own in by_kind.items()}).most_common(_KINDS_SHOWN)}
    for kind in sorted(kept):
        sure = interval(by_kind[kind])
        assert sure is not None
        yield Kind(kind, sure.mean, sure.low, sure.high, sure.questions)


def _failed(path: Path) -> tuple[int, tuple[tuple[str, str], ...]]:
    failures = [
        (str(row.get("id")), str(row["error"]))
        for _, row in (read_jsonl(path) if path.is_file() else ())
        if isinstance(row, dict) and "error" in row and "text" not in row
    ]
    return len(failures), tuple(failures[:_FAILURES_SHOWN])


def _speed(path: Path) -> Speed | None:
    if not path.is_file():
        return None
    row = Fields.of_file(path)
    tokens, prompt_tokens = (row.integer(name, None, maximum=_LARGEST) for name in ("tokens", "prompt_tokens"))
    return Speed(row.number("seconds"), row.integer("answered"), tokens, prompt_tokens)
