"""Prediction files of a run (appended during inference, resumed, merged) and answer files of other programs.

{"id": ..., "question_id": ..., "prompt": ..., "text": ..., "truth": ...}   an answer
{"id": ..., "error": ...}                                                   a question that failed
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.files import atomic_path, without_home, write_jsonl
from vila.core.reading import lone_surrogate, parse_json, read_jsonl
from vila.eval.annotation_files import iter_records
from vila.eval.benchmark import Answer, Item, QuestionScore

PREDICTIONS_FILE = "predictions.jsonl"
QUESTION_SCORES_FILE = "question_scores.jsonl"
_OLD_QUESTION_SCORES_FILE = "marks.jsonl"
"""Name in run folders of version 0.1, whose records have `kind` in place of `category`."""
_START_OVER = "delete the file to start over"


@dataclass
class Predictions:
    """Results in a benchmark's folder. texts: answers by item id. errors: of items without an answer."""

    folder: Path
    texts: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def add(self, rank: int, items: Sequence[Item], results: Sequence[str | Exception]) -> None:
        """Append results to this process's file and flush it to disk."""
        rows = []
        for item, result in zip(items, results, strict=True):
            if isinstance(result, str):
                rows.append(prediction_record(item, result))
                self.texts[item.id] = result
                self.errors.pop(item.id, None)
            else:
                rows.append({"id": item.id, "error": without_home(f"{type(result).__name__}: {result}")})
                self.errors[item.id] = rows[-1]["error"]
        path = self.folder / f"part-{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def merge(self, items: Sequence[Item]) -> None:
        """Write `predictions.jsonl` with a record per item, in order, and delete the files of the processes."""
        rows = [
            prediction_record(item, self.texts[item.id])
            if item.id in self.texts
            else {"id": item.id, "error": self.errors.get(item.id, "not asked")}
            for item in items
        ]
        write_jsonl(self.folder / PREDICTIONS_FILE, rows)
        for part in self.folder.glob("part-*.jsonl"):
            part.unlink()


def prediction_record(item: Item, text: str) -> dict[str, Any]:
    """Return the record of an answer, with the keys that the original scripts read."""
    return {
        "id": item.id,
        "question_id": item.question_id,
        "prompt": item.prompt,
        "text": text,
        "truth": item.truth,
        **item.extra,
    }


def predicted_answers(items: Iterable[Item], texts: Mapping[str, str]) -> list[Answer]:
    """Return the answers as `Benchmark.score` takes them, in the order of the items."""
    return [Answer(item.question_id, texts[item.id], item.prompt, id=item.id) for item in items if item.id in texts]


def read_predictions(folder: Path, known: Iterable[str]) -> Predictions:
    """Read the results in a benchmark's folder and remove lines that an interruption truncated from their files.

    known: item ids of the run. Raises DataError for invalid lines and for answers to other questions.
    """
    out = Predictions(folder)
    wanted = set(known)
    for path in [folder / PREDICTIONS_FILE, *sorted(folder.glob("part-*.jsonl"))]:
        for number, line in enumerate(_whole_lines(path), start=1):
            row = parse_json(line, file=path, record=f"line {number}", surrogates=True)
            name, text = _entry(row, path, f"line {number}")
            if "error" in row:
                out.errors[name] = text
                continue
            out.texts[name] = text
            out.errors.pop(name, None)
    for name in out.texts:
        out.errors.pop(name, None)
    if unknown := sorted(out.texts.keys() - wanted):
        raise DataError(
            f"has answers to {len(unknown)} questions that are not part of this run ({', '.join(unknown[:5])})",
            file=folder,
            hint="choose another --output",
        )
    return out


def read_texts(path: Path, wanted: Iterable[str]) -> dict[str, str]:
    """Read the answers of a predictions file by item id.

    Raises DataError naming file, line and field of an invalid line, or the first of the `wanted` ids without an answer.
    """
    entries = (_entry(row, path, f"line {number}") for number, row in read_jsonl(path, surrogates=True))
    texts = dict(entries)
    for name in wanted:
        if name not in texts:
            raise DataError("no answer to this question", file=path, field="id", value=name, hint=_START_OVER)
    return texts


def _entry(row: Any, path: Path, record: str) -> tuple[str, str]:
    """Return id and text, or id and error, of a record."""
    value = row if isinstance(row, dict) else {}
    content = "error" if "error" in value else "text"
    for key in ("id", content):
        if not isinstance(value.get(key), str):
            raise DataError(
                "not a prediction",
                file=path,
                record=record,
                field=key,
                value=value.get(key),
                expected="text",
                hint=_START_OVER,
            )
    return value["id"], value[content]


def _whole_lines(path: Path) -> list[bytes]:
    """Return the complete lines; remove a truncated last line from the file."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with atomic_path(path) as part:
            part.write_bytes(whole)
    return whole.split(b"\n")[:-1]


def write_question_scores(folder: Path, question_scores: Iterable[QuestionScore]) -> None:
    """Write `question_scores.jsonl` of a benchmark's folder."""
    write_jsonl(folder / QUESTION_SCORES_FILE, map(asdict, question_scores))
    (folder / _OLD_QUESTION_SCORES_FILE).unlink(missing_ok=True)


def read_question_scores(folder: Path) -> list[QuestionScore]:
    """Read the question scores of a benchmark's folder; an empty list if it has none.

    Raises DataError naming file and line of an invalid record.
    """
    path = folder / QUESTION_SCORES_FILE
    if not path.is_file():
        path = folder / _OLD_QUESTION_SCORES_FILE
    known = {field.name for field in fields(QuestionScore)}
    scores = []
    for number, record in read_jsonl(path) if path.is_file() else ():
        try:
            values = {"category" if key == "kind" else key: value for key, value in record.items()}
            score = QuestionScore(**{key: value for key, value in values.items() if key in known})
            # A value or text of another type raises TypeError here.
            _ = 0 <= score.value <= 1, "".join(getattr(score, name) for name in known - {"value"})
        except (AttributeError, TypeError) as error:
            raise DataError(
                f"not a question score ({error})", file=path, record=f"line {number}", hint="score the run again"
            ) from error
        scores.append(score)
    return scores


# Answer files of `vila eval` and of the original scripts.

# Records of video questions have the reference answer under `answer`, so `pred` comes first.
_TEXT_KEYS = ("text", "pred", "prediction", "answer")
_CHUNK_NAME = re.compile(r"(\d+)_(\d+)\.jsonl?").fullmatch
_MERGED_CHUNKS = "merge.jsonl"
_ID_KEYS = ("question_id", "questionId", "id", "index", "image")


@dataclass(frozen=True)
class AnswerFile:
    """Records of an answer file, in file order.

    bad:    errors of unreadable records, with file, line and field.
    failed: ids of questions that failed during inference.
    """

    answers: tuple[Answer, ...]
    bad: tuple[DataError, ...] = ()
    failed: tuple[str, ...] = ()


def read_answers(path: Path) -> AnswerFile:
    """Read a JSON-lines file, a JSON list, or a folder of `vila eval` or of the original scripts' chunk files.

    A record needs an id (`question_id`) and a text (`text`). Raises DataError if there are no answers, naming the first
    unreadable record.
    """
    files = [path] if path.is_file() else _files_in(path) if path.is_dir() else []
    if not files:
        raise DataError("no answer files in this folder" if path.is_dir() else "no such file", file=path)
    answers: list[Answer] = []
    bad: list[DataError] = []
    failed: list[str] = []
    for file in files:
        for record, row in iter_records(file):
            if isinstance(row, dict) and "error" in row and "text" not in row:
                failed.append(str(row.get("id", f"{file}, {record}")))
                continue
            try:
                answers.append(_answer(row, file, record))
            except DataError as error:
                bad.append(error.within(file, record))
    if not answers and not failed:
        bad_line_notes(bad, skipped=False)
        raise DataError("has no answers", file=path)
    return AnswerFile(tuple(answers), tuple(bad), tuple(failed))


def bad_line_notes(bad: Sequence[DataError], *, skipped: bool) -> list[str]:
    """Return a note on unreadable records if the benchmark skips them. Raises the first error if it does not."""
    if not bad:
        return []
    if not skipped:
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        bad[0].hint = f"correct or delete the line{more}"
        raise bad[0]
    return [f"{len(bad)} unreadable lines are ignored, as in the original script: {bad[0]}"]


def _files_in(folder: Path) -> list[Path]:
    """Return the files of a folder that have each answer once, in the order of the questions.

    The original scripts write chunks `8_0.jsonl` to `8_7.jsonl` and `merge.jsonl` with the same answers.
    """
    if (folder / PREDICTIONS_FILE).is_file():
        return [folder / PREDICTIONS_FILE, *sorted(folder.glob("part-*.jsonl"))]
    chunks = {tuple(map(int, found.groups())): file for file in folder.iterdir() if (found := _CHUNK_NAME(file.name))}
    if len({count for count, _ in chunks}) > 1:
        names = ", ".join(file.name for _, file in sorted(chunks.items()))
        raise DataError(
            f"has chunks of several runs ({names})", file=folder, hint="give one file, or delete the others"
        )
    if not chunks and (folder / _MERGED_CHUNKS).is_file():
        return [folder / _MERGED_CHUNKS]
    return [file for _, file in sorted(chunks.items())] or sorted(folder.glob("*.jsonl"))


def _answer(row: Any, file: Path, record: str) -> Answer:
    """Convert a record. Raises DataError without its location."""
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(value=row, expected="an object")
    name = next((row[key] for key in _ID_KEYS if key in row), None)
    text = next((row[key] for key in _TEXT_KEYS if key in row), None)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise DataError(field="question_id", value=name, expected="text or an integer")
    if not isinstance(text, str):
        raise DataError(field="text", value=text, expected="text")
    if (half := lone_surrogate([text, name])) is not None:
        raise DataError("unpaired surrogate, which UTF-8 cannot encode", value=half)
    # Records of video questions have the question in place of the prompt.
    prompt = row.get("prompt", row.get("question", "") if "pred" in row else "")
    item_id = str(row["id"]) if "id" in row and "question_id" in row else ""
    return Answer(name, text, prompt if isinstance(prompt, str) else "", f"{file}, {record}", item_id)
