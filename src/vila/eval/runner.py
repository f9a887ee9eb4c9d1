"""Run benchmarks: batched inference, predictions appended to disk, resume by question id, scoring."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from vila.core.errors import ContextOverflowError, DataError
from vila.core.files import DirectoryLock, remove_partials, sha256_file, without_home, write_json
from vila.core.progress import SILENT, Events, task
from vila.core.reading import Fields, read_json_object
from vila.core.system import ProcessInfo
from vila.core.types import Message, Text
from vila.core.vision_spec import ImageMode
from vila.engine.sampling_params import SamplingParams
from vila.eval.benchmark import Benchmark, BenchmarkResult, Item, ScoringProtocol, exact_match
from vila.eval.predictions import Predictions, predicted_answers, read_predictions, write_question_scores
from vila.eval.significance import score_interval

_MIN_NEW_TOKENS = 32
"""The generation limit is not halved below this to fit a question into the context."""


class Completion(Protocol):
    """Answer of a model with its token counts; None where they are unknown. Prompt tokens include image tokens."""

    @property
    def text(self) -> str:
        """The answer."""

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of the prompt."""

    @property
    def completion_tokens(self) -> int | None:
        """Number of generated tokens."""


class ChatModel(Protocol):
    """Model under evaluation: `vila.engine.engine.Engine`, or `RemoteEngine` for a server."""

    def complete(
        self, conversations: Sequence[Sequence[Message]], sampling: SamplingParams, *, template: str = ""
    ) -> Sequence[Completion]:
        """Return the completions in the order of the conversations; raise if one of them fails."""

    def with_vision(self, *, image_mode: ImageMode | None = None, exif_orientation: bool | None = None) -> ChatModel:
        """Return the model with other image preprocessing; None keeps a setting. A server may ignore `image_mode`."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of prompts, image tokens included, and generated tokens."""

    prompt: int = 0
    completion: int = 0


class AnswerGenerator:
    """Generates the answers to batches of items. A failing question costs only its own answer.

    tokens: counts of all answers so far; None if the model does not report them.
    """

    def __init__(self, model: ChatModel, *, exif_orientation: bool | None = None) -> None:
        """exif_orientation: whether images are rotated by their EXIF orientation; None keeps the model's setting."""
        if exif_orientation is not None:
            model = model.with_vision(exif_orientation=exif_orientation)
        self._models: dict[ImageMode | None, ChatModel] = {None: model}
        self.tokens: TokenCounts | None = TokenCounts()

    def generate(self, batch: Sequence[Item], sampling: SamplingParams, template: str = "") -> list[str | Exception]:
        """Return an answer per item, or the exception of an item that fails even alone.

        batch:    items with the same template and image mode.
        template: of items that set none.
        """
        try:
            return list(self._texts(batch, sampling, batch[0].template or template))
        except ContextOverflowError as error:
            # Benchmarks reserve far more tokens for the answer than answers need.
            if len(batch) == 1 and sampling.max_new_tokens > _MIN_NEW_TOKENS:
                return self.generate(batch, replace(sampling, max_new_tokens=sampling.max_new_tokens // 2), template)
            if len(batch) == 1:
                return [error]
        except Exception as error:  # noqa: BLE001 - recorded with its question
            if len(batch) == 1:
                return [error]
        return [result for item in batch for result in self.generate([item], sampling, template)]

    def _texts(self, batch: Sequence[Item], sampling: SamplingParams, template: str) -> list[str]:
        mode = batch[0].image_mode
        if mode not in self._models:
            self._models[mode] = self._models[None].with_vision(image_mode=mode)
        found = self._models[mode].complete([item.messages for item in batch], sampling, template=template)
        for one in found:
            if self.tokens is None or one.prompt_tokens is None or one.completion_tokens is None:
                self.tokens = None
            else:
                self.tokens = TokenCounts(
                    self.tokens.prompt + one.prompt_tokens, self.tokens.completion + one.completion_tokens
                )
        # A server may send unpaired surrogates, which UTF-8 files cannot hold.
        return [one.text.encode("utf-8", "replace").decode("utf-8") for one in found]


# Throughput: each process writes speed-RANK.json, rank 0 adds them to speed.json at the end of a session.

_MAX_COUNT = 2**53
_SPEED_PARTS = "speed-*.json"
_TOKENS = ("prompt_tokens", "tokens")


def delete_speed_parts(out: Path) -> None:
    """Delete the files of an interrupted session, whose time is unknown."""
    for path in out.glob(_SPEED_PARTS):
        path.unlink()


def write_speed_part(out: Path, rank: int, answered: int, tokens: TokenCounts | None) -> None:
    """Record what this process has answered in this session. tokens: None if unknown."""
    tokens = tokens if answered else TokenCounts()
    counts = (tokens.prompt, tokens.completion) if tokens else (None, None)
    write_json(out / f"speed-{rank}.json", {"answered": answered, **dict(zip(_TOKENS, counts, strict=True))})


def merge_speed_parts(out: Path, seconds: float) -> int:
    """Add the counts of all processes to speed.json and return how many questions they answered.

    Tokens are null if a session or process did not count them.
    """
    parts = [_read_counts(path) for path in sorted(out.glob(_SPEED_PARTS))]
    delete_speed_parts(out)
    answered = sum(part["answered"] for part in parts)
    if answered:
        path = out / "speed.json"
        if path.is_file():
            parts.append(_read_counts(path))
            seconds += Fields.of_file(path).number("seconds")
        counts = {name: _sum([part[name] for part in parts]) for name in _TOKENS}
        write_json(path, {"seconds": seconds, "answered": sum(part["answered"] for part in parts), **counts})
    return answered


def _read_counts(path: Path) -> dict[str, Any]:
    fields = Fields.of_file(path)
    tokens = {name: fields.integer(name, None, maximum=_MAX_COUNT) for name in _TOKENS}
    return {"answered": fields.integer("answered", maximum=_MAX_COUNT), **tokens}


def _sum(values: list[int | None]) -> int | None:
    return None if None in values else sum(value or 0 for value in values)


_DIGEST = "questions_sha256"
"""Key of run.json: hash of ids, texts and references of all questions."""
_BATCH_GROUPS = 16
"""Maximum number of images per batch, each with all its questions."""
_BATCH_ITEMS = 96
_BATCH_CHARACTERS = 200_000
_CHARACTERS_PER_IMAGE = 2_000
"""Size of an image in the batch size."""


@dataclass(frozen=True, slots=True)
class BenchmarkRun:
    """Outcome of a benchmark.

    result:      None if the answers cannot be scored here; `problem` says why.
    predictions: answers by item id. failed: errors of items without an answer.
    seconds:     inference time of this session, for `answered` questions.
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
        """Score and metrics as JSON types. Raises DataError if there is no score."""
        if self.result is None:
            raise DataError(self.problem, field=self.benchmark)
        return {**self.result.metrics, "score": self.result.score}


def run_benchmark(
    model: ChatModel,
    benchmark: Benchmark,
    out: Path,
    *,
    model_id: str = "",
    template: str = "",
    protocol: ScoringProtocol = "upstream",
    process: ProcessInfo = ProcessInfo(),  # noqa: B008 - frozen
    barrier: Callable[[], None] = lambda: None,
    events: Events = SILENT,
) -> BenchmarkRun | None:
    """Answer the questions that have no answer in `out` yet, score all, write `out/scores.json`.

    model_id: identifies the model; predictions of another one in `out` are rejected.
    process:  rank among the processes that share the questions; rank 0 scores, the others return None.
    barrier:  waits for the other processes.
    The same questions always form a batch, so that interrupted and multi-process runs end with the same answers. If a
    batch fails, its questions are retried one by one; a question that fails is recorded with its error.
    Raises DataError if `out` has predictions of another model or benchmark, DirectoryInUseError if another process
    writes there.
    """
    items = benchmark.items()
    with ExitStack() as stack:
        if process.is_main:
            stack.enter_context(DirectoryLock(out).acquire(events=events))
            remove_partials(out)
            delete_speed_parts(out)
            _start_run(out, {**run_metadata(benchmark, template), "model": model_id})
        barrier()
        generator = AnswerGenerator(model, exif_orientation=applies_exif_orientation(protocol))
        seconds = _answer_items(generator, benchmark, items, out, template, process, events)
        barrier()
        if not process.is_main:
            return None
        done = read_predictions(out, (item.id for item in items))
        done.merge(items)
        result, problem = _score(benchmark, items, done, protocol)
        metadata = {"benchmark": benchmark.name, "model": model_id, "rules": protocol}
        write_json(out / "scores.json", {**metadata, **_scores_record(result, problem)})
        write_question_scores(out, result.question_scores if result else ())
        answered = merge_speed_parts(out, seconds)
    return BenchmarkRun(benchmark.name, result, done.texts, seconds, answered, done.errors, problem)


def _answer_items(
    generator: AnswerGenerator,
    benchmark: Benchmark,
    items: Sequence[Item],
    out: Path,
    template: str,
    process: ProcessInfo,
    events: Events,
) -> float:
    """Answer this process's part of the questions without an answer; return the seconds."""
    done = read_predictions(out, (item.id for item in items))
    sampling = benchmark.sampling or SamplingParams(max_new_tokens=benchmark.max_new_tokens)
    name = f"{benchmark.name}: {len(items)} questions"
    started = time.monotonic()
    answered = visited = correct = 0
    with task(events, name, len(items), "questions"):
        for index, batch in enumerate(batches(items)):
            if index % process.world_size == process.rank and any(item.id not in done.texts for item in batch):
                # The whole batch is generated again: the answers must not depend on where a run was interrupted.
                results = generator.generate(batch, sampling, template)
                missing = [(i, r) for i, r in zip(batch, results, strict=True) if i.id not in done.texts]
                done.add(process.rank, [item for item, _ in missing], [result for _, result in missing])
                answered += len(missing)
            visited += len(batch)
            correct += sum(bool(i.truth) and exact_match(done.texts.get(i.id, ""), i.truth) for i in batch)
            events.advanced(name, len(batch), exact=f"{correct / visited:.1%}")
    write_speed_part(out, process.rank, answered, generator.tokens)
    return time.monotonic() - started


def applies_exif_orientation(protocol: ScoringProtocol) -> bool:
    """Return whether a protocol rotates images by their EXIF orientation; see docs/images.md.

    The original scripts ignore it; lmms-eval reads images through `datasets`, which applies it.
    """
    return protocol != "upstream"


def _score(
    benchmark: Benchmark, items: Sequence[Item], done: Predictions, protocol: ScoringProtocol
) -> tuple[BenchmarkResult | None, str]:
    try:
        return benchmark.score(predicted_answers(items, done.texts), protocol), ""
    except DataError as error:
        failed = f" ({len(done.errors)} questions failed)" if done.errors else ""
        return None, without_home(f"not scored here: {error}{failed}")


def _scores_record(result: BenchmarkResult | None, problem: str) -> dict[str, Any]:
    if result is None:
        return {"score": None, "problem": problem}
    interval = score_interval(result)
    return {
        "score": result.score,
        "unit": result.unit,
        "interval": None if interval is None else interval.as_json(),
        "notes": [without_home(note) for note in result.notes],
        **result.metrics,
    }


def result_dir(root: Path, name: str, limit: int) -> Path:
    """Return the folder of a benchmark below `root`; runs with a question limit have their own."""
    return root / (f"{name}-{limit}" if limit else name)


def model_hash(folder: Path) -> str:
    """Return a hash of a model directory: weights and configs, without Markdown files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()[:32]


def batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Yield all items in batches of bounded size: whole groups, sorted by decreasing size.

    The batches depend on the items alone. All items of a batch have the same template and image mode.
    """
    groups: dict[tuple[str, str, str], list[Item]] = {}
    for item in items:
        groups.setdefault((*_settings(item), item.group or item.id), []).append(item)
    sized = [(_size(group), group) for group in groups.values()]
    # The sort is stable: images of one size stay in the benchmark's order.
    sized.sort(key=lambda pair: (*_settings(pair[1][0]), -pair[0]))
    batch: list[Item] = []
    count = size = 0
    for own, group in sized:
        full = count == _BATCH_GROUPS or len(batch) + len(group) > _BATCH_ITEMS or size + own > _BATCH_CHARACTERS
        if batch and (full or _settings(group[0]) != _settings(batch[0])):
            yield batch
            batch, count, size = [], 0, 0
        batch.extend(group)
        count, size = count + 1, size + own
    if batch:
        yield batch


def _settings(item: Item) -> tuple[str, str]:
    """Return template and image mode; only items with equal ones share a batch."""
    return item.template, item.image_mode or ""


def _size(group: Sequence[Item]) -> int:
    """Estimate the prompt size in characters: images once, and the text of every question."""
    media = sum(not isinstance(part, Text) for message in group[0].messages for part in message.parts)
    return media * _CHARACTERS_PER_IMAGE + sum(len(message.text) for item in group for message in item.messages)


def run_metadata(benchmark: Benchmark, template: str) -> dict[str, Any]:
    """Return the settings that identify the predictions in a folder, except the model."""
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


def check_run_folder(out: Path, metadata: Mapping[str, Any]) -> None:
    """Raise DataError if `out` has the predictions of another run.

    Called before the model is loaded: `model` is compared without the backend that loading chooses.
    """
    path = out / "run.json"
    if path.is_file():
        before = read_json_object(path)
        model = before.get("model")
        if isinstance(model, str) and model.startswith(f"{metadata['model']} "):
            before = {**before, "model": metadata["model"]}
        _check_unchanged(path, before, metadata)


def _start_run(out: Path, metadata: Mapping[str, Any]) -> None:
    path = out / "run.json"
    if path.is_file():
        _check_unchanged(path, read_json_object(path), metadata)
    else:
        write_json(path, metadata)


def _check_unchanged(path: Path, before: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    # Earlier versions did not record the hash of the questions.
    compared = {key: value for key, value in metadata.items() if key in before or key != _DIGEST}
    changed = [
        f"{key}: {before.get(key)!r} -> {value!r}" for key, value in compared.items() if before.get(key) != value
    ]
    if changed:
        raise DataError(
            f"has the predictions of another run ({'; '.join(changed)})", file=path, hint="choose another --output"
        )
