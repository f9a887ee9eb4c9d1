"""Running a benchmark: batches through the engine, predictions appended as they come, resumed by id."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.events import SILENT, Events, task
from vila.core.files import read_json, sha256_tree, write_json, write_text
from vila.engine.engine import Engine
from vila.engine.request import Sampling
from vila.eval.benchmark import Answer, Benchmark, Item
from vila.eval.scoring import exact_match

_BATCH_GROUPS = 16
"""Pictures that one batch holds, with all their questions."""


@dataclass(frozen=True, slots=True)
class Result:
    """Scores of one benchmark, the predictions behind them, and the time that the new ones took."""

    benchmark: str
    scores: dict[str, Any]
    predictions: dict[str, str]
    seconds: float
    answered: int


def run(
    engine: Engine, benchmark: Benchmark, out: Path, *, model: str = "", template: str = "", events: Events = SILENT
) -> Result:
    """Answer what `out/predictions.jsonl` does not answer yet, score everything, write `out/scores.json`.

    model: what made the predictions; answers of another model in `out` are refused.
    A batch is always made of the same questions, so that an interrupted run ends with the same answers.
    Raises DataError when `out` holds predictions of another model or benchmark.
    """
    items = benchmark.items()
    _same_run(out, {"benchmark": benchmark.name, "model": model, "questions": len(items), "template": template})
    path = out / "predictions.jsonl"
    done = _read_predictions(path)
    name = f"{benchmark.name}: {len(items)} questions"
    began = time.monotonic()
    answered = seen = right = 0
    with task(events, name, len(items), "questions"):
        for batch in batches(items):
            if any(item.id not in done for item in batch):
                sampling = Sampling(max_new_tokens=benchmark.max_new_tokens)
                answers = engine.generate_batch([item.messages for item in batch], sampling, template=template)
                rows = {item.id: answer for item, answer in zip(batch, answers, strict=True)}
                _append(path, [(item, rows[item.id]) for item in batch if item.id not in done])
                done.update(rows)
                answered += len(batch)
            seen += len(batch)
            right += sum(exact_match(done[item.id], item.truth) for item in batch)
            events.advanced(name, len(batch), exact=f"{right / seen:.1%}")
    answers = [Answer(item.id, done[item.id], id=item.id) for item in items]
    scored = benchmark.score(answers)
    scores = {**scored.figures, "score": scored.score}
    write_json(out / "scores.json", {"benchmark": benchmark.name, "model": model, **scores})
    return Result(benchmark.name, scores, done, time.monotonic() - began, answered)


def result_dir(root: Path, name: str, questions: int) -> Path:
    """Where the predictions of a benchmark, or of about `questions` of its questions, lie below `root`."""
    return root / (f"{name}-{questions}" if questions else name)


def model_hash(folder: Path) -> str:
    """What tells one model directory from another: a hash of its weights and configs."""
    return sha256_tree(folder)[:32]


def batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Consecutive groups, at most `_BATCH_GROUPS` of them at a time."""
    batch: list[Item] = []
    groups: set[str] = set()
    for item in items:
        if item.group not in groups and len(groups) == _BATCH_GROUPS:
            yield batch
            batch, groups = [], set()
        groups.add(item.group)
        batch.append(item)
    if batch:
        yield batch


def _same_run(out: Path, facts: dict[str, Any]) -> None:
    path = out / "run.json"
    if path.is_file():
        before = read_json(path)
        changed = [
            f"{key}: {before.get(key)!r} -> {value!r}" for key, value in facts.items() if before.get(key) != value
        ]
        if changed:
            raise DataError(f"{out}: holds the predictions of another run ({'; '.join(changed)}); choose another --out")
    else:
        write_json(path, facts)


def _read_predictions(path: Path) -> dict[str, str]:
    """Answers by id; a last line that a kill cut short is dropped from the file."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        write_text(path, "".join(lines[:-1]))
        lines.pop()
    out: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            out[row["id"]] = row["answer"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} line {number}: not a prediction ({error}); delete the file to start over"
            ) from error
    return out


def _append(path: Path, rows: Sequence[tuple[Item, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        for item, answer in rows:
            row = {"id": item.id, "question": item.messages[-1].text, "answer": answer, "truth": item.truth}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
