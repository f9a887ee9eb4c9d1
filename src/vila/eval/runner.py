"""Running benchmarks: batches through an engine, predictions appended as they come, resumed by id, then scored."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from vila.core.distributed import ProcessInfo
from vila.core.errors import ContextOverflowError, DataError
from vila.core.files import DirectoryLock, remove_partials, sha256_file, without_home, write_json
from vila.core.progress import SILENT, Events, task
from vila.core.reading import Fields, read_json_object
from vila.core.types import Image, Message, Text
from vila.core.vision_spec import ImageMode
from vila.engine.request import SamplingParams
from vila.eval.benchmark import Benchmark, BenchmarkResult, Item, ScoringProtocol, exact_match
from vila.eval.predictions import Predictions, predicted_answers, read_predictions, write_question_scores
from vila.eval.significance import score_interval

# --- asking
# Asking an engine or a server for the answers to a batch of questions: whatever fails costs its own answer alone.


_LEAST_NEW_TOKENS = 32


class ChatModel(Protocol):
    """Whatever answers conversations: our engine, or a server."""

    def generate_batch(
        self, conversations: Sequence[Sequence[Message]], sampling: SamplingParams, *, template: str = ""
    ) -> list[str]:
        """The answers, in the order of the conversations."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of prompts, slots of pictures included, and of answers."""

    prompt: int = 0
    new: int = 0


class Asking:
    """Asks what answers, and counts its tokens.

    tokens: of all answers so far; None when whatever answers does not count them.
    """

    def __init__(self, engine: ChatModel, *, exif_orientation: bool | None = None) -> None:
        """exif_orientation: whether images are turned upright; None leaves that to the engine."""
        if exif_orientation is not None and hasattr(engine, "with_vision"):
            engine = engine.with_vision(exif_orientation=exif_orientation)
        self._engines: dict[ImageMode | None, ChatModel] = {None: engine}
        self._of_generations = TokenCounts()

    def __call__(self, batch: Sequence[Item], sampling: SamplingParams, template: str = "") -> list[str | Exception]:
        """The answers of a batch; an exception for each question that cannot be answered even alone.

        batch: of one template and one image mode. template: of items that name none.
        """
        try:
            return list(self._texts(batch, sampling, batch[0].template or template))
        except ContextOverflowError as error:
            # The benchmark's room for an answer is far more than answers take; a small context holds less of it.
            if len(batch) == 1 and sampling.max_new_tokens > _LEAST_NEW_TOKENS:
                return self(batch, replace(sampling, max_new_tokens=sampling.max_new_tokens // 2), template)
            if len(batch) == 1:
                return [error]
        except Exception as error:  # noqa: BLE001 - recorded with the question that it belongs to
            if len(batch) == 1:
                return [error]
        return [result for item in batch for result in self([item], sampling, template)]

    @property
    def tokens(self) -> TokenCounts | None:
        """See the class."""
        engine: Any = self._engines[None]
        if hasattr(engine, "complete"):
            return self._of_generations
        counted = TokenCounts(getattr(engine, "prompt_tokens", 0), getattr(engine, "reply_tokens", 0))
        return counted if counted.new else None

    def _texts(self, batch: Sequence[Item], sampling: SamplingParams, template: str) -> list[str]:
        engine: Any = self._of_mode(batch[0].image_mode)
        conversations = [item.messages for item in batch]
        if not hasattr(engine, "complete"):
            return [_writable(text) for text in engine.generate_batch(conversations, sampling, template=template)]
        found = engine.complete(conversations, sampling, template=template)
        before = self._of_generations
        self._of_generations = TokenCounts(
            before.prompt + sum(one.prompt_tokens for one in found), before.new + sum(len(one.ids) for one in found)
        )
        return [_writable(one.text) for one in found]

    def _of_mode(self, mode: ImageMode | None) -> ChatModel:
        """The engine for questions whose images are made square that way; a server does it in its own way."""
        if mode not in self._engines:
            engine: Any = self._engines[None]
            self._engines[mode] = engine.with_vision(image_mode=mode) if hasattr(engine, "with_vision") else engine
        return self._engines[mode]


def _writable(text: str) -> str:
    """The text without halves of surrogate pairs, which a server may send and no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


# --- speed
# How long a benchmark took and how many tokens that were, over all sessions and processes.


_MAX = 2**53
_PARTS = "speed-*.json"
_NONE: dict[str, Any] = {"prompt_tokens": 0, "tokens": 0}
_UNCOUNTED: dict[str, Any] = {"prompt_tokens": None, "tokens": None}


def delete_speed_parts(out: Path) -> None:
    """Delete what a session that was killed left: its time is not known."""
    for path in out.glob(_PARTS):
        path.unlink()


def write_speed_part(out: Path, rank: int, answered: int, tokens: TokenCounts | None) -> None:
    """What this process has answered in this session. tokens: None when they were not counted."""
    counted = {"prompt_tokens": tokens.prompt, "tokens": tokens.new} if tokens else _UNCOUNTED
    write_json(out / f"speed-{rank}.json", {"answered": answered, **(counted if answered else _NONE)})


def merge_speed_parts(out: Path, seconds: float) -> int:
    """Add what all processes answered in this session to the earlier ones; how many questions that were.

    Tokens are noted as long as they were counted in every session and process, and else as not known.
    """
    parts = [_counts(path) for path in sorted(out.glob(_PARTS))]
    delete_speed_parts(out)
    answered = sum(part["answered"] for part in parts)
    if answered:
        path = out / "speed.json"
        before = _counts(path) if path.is_file() else {"answered": 0, **_NONE}
        earlier = Fields.of_file(path).number("seconds") if path.is_file() else 0.0
        counted = {name: _sum([before[name], *(part[name] for part in parts)]) for name in _NONE}
        write_json(path, {"seconds": earlier + seconds, "answered": before["answered"] + answered, **counted})
    return answered


def _counts(path: Path) -> dict[str, Any]:
    """Read the counts of a file; tokens are None where they were not counted. Raises DataError for other values."""
    facts = Fields.of_file(path)
    tokens = {name: facts.integer(name, None, maximum=_MAX) for name in _NONE}
    return {"answered": facts.integer("answered", maximum=_MAX), **tokens}


def _sum(values: list[int | None]) -> int | None:
    return None if None in values else sum(value or 0 for value in values)


_DIGEST = "questions_sha256"
"""Key of `run.json`: a hash of ids, texts and truths of all questions."""
_BATCH_GROUPS = 16
"""Pictures that one batch holds, with all their questions."""
_BATCH_ROWS = 96
_BATCH_CHARACTERS = 200_000
_PICTURE_CHARACTERS = 2_000
"""What a picture counts in the size of a batch."""


@dataclass(frozen=True, slots=True)
class BenchmarkRun:
    """What came of one benchmark.

    scored:      None when the answers cannot be scored here; `problem` says why.
    predictions: answers by item id. failed: why others have none.
    seconds:     that asking took, of `answered` questions that were new.
    """

    benchmark: str
    result: BenchmarkResult | None
    predictions: dict[str, str]
    seconds: float
    answered: int
    failed: dict[str, str] = field(default_factory=dict)
    problem: str = ""

    @property
    def scores(self) -> dict[str, Any]:
        """The figures with the headline, as plain data. Raises DataError when there is none."""
        if self.result is None:
            raise DataError(f"{self.benchmark}: {self.problem}")
        return {**self.result.metrics, "score": self.result.score}


def run_benchmark(
    engine: ChatModel,
    benchmark: Benchmark,
    out: Path,
    *,
    model: str = "",
    template: str = "",
    protocol: ScoringProtocol = "upstream",
    process: ProcessInfo = ProcessInfo(),  # noqa: B008 - frozen
    meet: Callable[[], None] = lambda: None,
    events: Events = SILENT,
) -> BenchmarkRun | None:
    """Answer what `out` does not answer yet, score everything, write `out/scores.json`.

    model: what made the predictions; answers of another model in `out` are refused.
    process: rank of this process among those that share the questions; the first one scores, the others return None.
    meet:  waits for the other processes.
    A batch is always made of the same questions, so that an interrupted run, or one of several processes, ends with the
    same answers. A batch that fails is asked question by question; a question that fails is recorded with its error.
    Raises DataError when `out` holds predictions of another model or benchmark, DirectoryInUseError when another
    process writes there.
    """
    items = benchmark.items()
    with ExitStack() as stack:
        if process.is_main:
            stack.enter_context(DirectoryLock(out).acquire(events=events))
            remove_partials(out)
            delete_speed_parts(out)
            _same_run(out, {**run_metadata(benchmark, template), "model": model})
        meet()
        asking = Asking(engine, exif_orientation=applies_exif_orientation(protocol))
        seconds = _ask(asking, benchmark, items, out, template, process, events)
        meet()
        if not process.is_main:
            return None
        done = read_predictions(out, (item.id for item in items))
        done.merge(items)
        result, problem = _score(benchmark, items, done, protocol)
        metadata = {"benchmark": benchmark.name, "model": model, "rules": protocol}
        write_json(out / "scores.json", {**metadata, **_scores_record(result, problem)})
        write_question_scores(out, result.question_scores if result else ())
        answered = merge_speed_parts(out, seconds)
    return BenchmarkRun(benchmark.name, result, done.texts, seconds, answered, done.errors, problem)


def _ask(
    asking: Asking,
    benchmark: Benchmark,
    items: Sequence[Item],
    out: Path,
    template: str,
    process: ProcessInfo,
    events: Events,
) -> float:
    """Answer this process's share of the questions that have no answer yet; returns the seconds that took."""
    done = read_predictions(out, (item.id for item in items))
    sampling = getattr(benchmark, "sampling", None) or SamplingParams(max_new_tokens=benchmark.max_new_tokens)
    name = f"{benchmark.name}: {len(items)} questions"
    began = time.monotonic()
    answered = seen = right = 0
    with task(events, name, len(items), "questions"):
        for number, batch in enumerate(batches(items)):
            if number % process.world_size == process.rank and any(item.id not in done.texts for item in batch):
                results = asking(batch, sampling, template)
                missing = [(i, r) for i, r in zip(batch, results, strict=True) if i.id not in done.texts]
                done.add(process.rank, [item for item, _ in missing], [result for _, result in missing])
                answered += len(missing)
            seen += len(batch)
            right += sum(bool(i.truth) and exact_match(done.texts.get(i.id, ""), i.truth) for i in batch)
            events.advanced(name, len(batch), exact=f"{right / seen:.1%}")
    write_speed_part(out, process.rank, answered, asking.tokens)
    return time.monotonic() - began


def applies_exif_orientation(protocol: ScoringProtocol) -> bool:
    """Whether images of a benchmark are turned upright as their EXIF says; see docs/images.md.

    The original's loaders ignore it; lmms-eval reads images by `datasets`, which applies it.
    """
    return protocol != "upstream"


def _score(
    benchmark: Benchmark, items: Sequence[Item], done: Predictions, protocol: ScoringProtocol
) -> tuple[BenchmarkResult | None, str]:
    try:
        return benchmark.score(predicted_answers(items, done.texts), protocol), ""
    except DataError as error:
        failed = f" ({len(done.errors)} questions could not be asked)" if done.errors else ""
        return None, without_home(f"not scored here: {error}{failed}")


def _scores_record(result: BenchmarkResult | None, problem: str) -> dict[str, Any]:
    if result is None:
        return {"score": None, "problem": problem}
    sure = score_interval(result)
    return {
        "score": result.score,
        "unit": result.unit,
        "interval": None if sure is None else sure.as_json(),
        "notes": [without_home(note) for note in result.notes],
        **result.metrics,
    }


def result_dir(root: Path, name: str, questions: int) -> Path:
    """Where the predictions of a benchmark, or of about `questions` of its questions, lie below `root`."""
    return root / (f"{name}-{questions}" if questions else name)


def model_hash(folder: Path) -> str:
    """What tells one model directory from another: a hash of its weights and configs; its card may change."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()[:32]


def batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    """All items in batches of bounded size, groups whole, groups of like size together, the largest first.

    What a batch holds depends on the items alone. Items of another template or image mode are never in one batch.
    """
    groups: dict[tuple[str, str, str], list[Item]] = {}
    for item in items:
        groups.setdefault((*_way(item), item.group or item.id), []).append(item)
    sized = [(_size(group), group) for group in groups.values()]
    # Python's sort keeps the order of equals: pictures of one size stay in the benchmark's order.
    sized.sort(key=lambda pair: (*_way(pair[1][0]), -pair[0]))
    batch: list[Item] = []
    count = size = 0
    for own, group in sized:
        full = count == _BATCH_GROUPS or len(batch) + len(group) > _BATCH_ROWS or size + own > _BATCH_CHARACTERS
        if batch and (full or _way(group[0]) != _way(batch[0])):
            yield batch
            batch, count, size = [], 0, 0
        batch.extend(group)
        count, size = count + 1, size + own
    if batch:
        yield batch


def _way(item: Item) -> tuple[str, str]:
    """How an item is asked; only equals are asked together."""
    return item.template, item.image_mode or ""


def _size(group: Sequence[Item]) -> int:
    """About how much there is to read: the pictures once, and every question."""
    pictures = sum(not isinstance(part, Text) for message in group[0].messages for part in message.parts)
    return pictures * _PICTURE_CHARACTERS + sum(len(message.text) for item in group for message in item.messages)


def missing_images(items: Sequence[Item]) -> list[str]:
    """Paths of pictures that are not there, each once, in the order of the questions."""
    paths = {
        str(part.source): None
        for item in items
        for message in item.messages
        for part in message.parts
        if isinstance(part, Image) and isinstance(part.source, str | Path) and "://" not in str(part.source)
    }
    return [path for path in paths if not Path(path).is_file()]


def run_metadata(benchmark: Benchmark, template: str) -> dict[str, Any]:
    """Return what the predictions in a directory belong to, but for the model."""
    items = benchmark.items()
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.id, item.truth, [message.text for message in item.messages]]).encode())
    return {
        "benchmark": benchmark.name,
        "questions": len(items),
        _DIGEST: digest.hexdigest()[:32],
        "template": template,
    }


def check_run_folder(out: Path, facts: Mapping[str, Any]) -> None:
    """Raise DataError if `out` holds the predictions of another run.

    For the time before the model is loaded: its `model` is compared without the backend that loading chooses.
    """
    path = out / "run.json"
    if path.is_file():
        before = read_json_object(path)
        model = before.get("model")
        if isinstance(model, str) and model.startswith(f"{facts['model']} "):
            before = {**before, "model": facts["model"]}
        _refuse_changes(out, before, facts)


def _same_run(out: Path, facts: Mapping[str, Any]) -> None:
    path = out / "run.json"
    if path.is_file():
        _refuse_changes(out, read_json_object(path), facts)
    else:
        write_json(path, facts)


def _refuse_changes(out: Path, before: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    # Earlier versions kept no digest of the questions.
    compared = {key: value for key, value in facts.items() if key in before or key != _DIGEST}
    changed = [
        f"{key}: {before.get(key)!r} -> {value!r}" for key, value in compared.items() if before.get(key) != value
    ]
    if changed:
        raise DataError(f"{out}: holds the predictions of another run ({'; '.join(changed)}); choose another --output")
