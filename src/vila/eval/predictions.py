"""The predictions of a run: lines appended as answers come, read back after a kill, merged when several wrote.

{"id": ..., "question_id": ..., "prompt": ..., "text": ..., "truth": ...}      an answer; the original's keys and ours
{"id": ..., "error": ...}                                                       a question that could not be asked
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
_AGAIN = "delete the file to start over"


@dataclass
class Predictions:
    """What has been answered so far in a directory. texts: by item id; errors: of items that have no answer."""

    folder: Path
    texts: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def add(self, rank: int, items: Sequence[Item], results: Sequence[str | Exception]) -> None:
        """Append results to this process's file and put them on the disk."""
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
        """Write `predictions.jsonl`, a row for each item in their order, and delete the parts."""
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
    """A line of a predictions file, with the keys that the original's scorers read."""
    return {
        "id": item.id,
        "question_id": item.id if item.question_id is None else item.question_id,
        "prompt": item.prompt or item.messages[-1].text,
        "text": text,
        "truth": item.truth,
        **item.facts,
    }


def predicted_answers(items: Iterable[Item], texts: Mapping[str, str]) -> list[Answer]:
    """The answers of items that have one, in the order of the items, as scoring reads them."""
    return [
        Answer(
            question_id=item.id if item.question_id is None else item.question_id,
            text=texts[item.id],
            prompt=item.prompt or item.messages[-1].text,
            id=item.id,
        )
        for item in items
        if item.id in texts
    ]


def read_predictions(folder: Path, known: Iterable[str]) -> Predictions:
    """What `folder` holds of a run; lines that a kill cut short are dropped from their files.

    Raises DataError for lines that are no predictions, and for answers to questions that the run does not ask.
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
            f"{folder}: holds answers to {len(unknown)} questions that this run does not ask "
            f"({', '.join(unknown[:5])}); choose another --output"
        )
    return out


def read_texts(path: Path, wanted: Iterable[str]) -> dict[str, str]:
    """Read the texts of a predictions file by id.

    Raises DataError naming file, line and field of a line that is no prediction, or the first of the `wanted` ids that
    the file has no answer to.
    """
    entries = (_entry(row, path, f"line {number}") for number, row in read_jsonl(path, surrogates=True))
    texts = dict(entries)
    for name in wanted:
        if name not in texts:
            raise DataError("no answer to this question", file=path, field="id", value=name, hint=_AGAIN)
    return texts


def _entry(row: Any, path: Path, record: str) -> tuple[str, str]:
    """Return id and text, or id and error, of a line. Raises DataError."""
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
                hint=_AGAIN,
            )
    return value["id"], value[content]


def _whole_lines(path: Path) -> list[bytes]:
    """Return the lines that end as lines; what a kill left of another one is cut off the file."""
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


# --- answers
# Reading files of answers, whoever made them: our predictions, or the original's answer files.


# Rows of video questions have the true answer beside the predicted one.
_TEXT = ("text", "pred", "prediction", "answer")
_CHUNK = re.compile(r"(\d+)_(\d+)\.jsonl?").fullmatch
_MERGED_CHUNKS = "merge.jsonl"
_ID = ("question_id", "questionId", "id", "index", "image")


@dataclass(frozen=True)
class AnswerFile:
    """Rows in the order of the file.

    bad:    lines that could not be read, as `FILE line N: reason`.
    failed: ids of questions that could not be asked.
    """

    rows: tuple[Answer, ...]
    bad: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


def read_answers(path: Path) -> AnswerFile:
    """The answers in a JSON-lines file, a JSON list, or a folder: of a run of ours, or of the original's chunk files.

    A row needs an id (`question_id`) and a text (`text`); `prompt` is kept. Raises DataError when nothing is there.
    """
    files = [path] if path.is_file() else _files_in(path) if path.is_dir() else []
    if not files:
        raise DataError(f"{path}: {'no answers in this folder' if path.is_dir() else 'no such file of answers'}")
    rows: list[Answer] = []
    bad: list[str] = []
    failed: list[str] = []
    for file in files:
        for location, row in iter_records(file):
            if isinstance(row, dict) and "error" in row and "text" not in row:
                failed.append(str(row.get("id", location)))
                continue
            answer = _answer(row, location)
            if isinstance(answer, str):
                bad.append(answer)
            else:
                rows.append(answer)
    if not rows and not failed:
        raise DataError(f"{path}: holds no answer" + (f"; {bad[0]}" if bad else ""))
    return AnswerFile(tuple(rows), tuple(bad), tuple(failed))


def bad_line_notes(bad: Sequence[str], *, skipped: bool) -> list[str]:
    """A note on lines that could not be read where the original skips them. Raises DataError where it does not."""
    if not bad:
        return []
    if not skipped:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise DataError(f"{bad[0]}{more}; correct or delete the line")
    return [f"{len(bad)} lines could not be read and are left out, as upstream does: {bad[0]}"]


def _files_in(folder: Path) -> list[Path]:
    """The files of a folder that hold answers, each answer once, in the order of the questions.

    The original leaves `merge.jsonl` beside the chunks `8_0.jsonl` to `8_7.jsonl`; we leave marks beside predictions.
    Chunks of other names than the original's are in its merged file too.
    """
    if (folder / PREDICTIONS_FILE).is_file():
        return [folder / PREDICTIONS_FILE, *sorted(folder.glob("part-*.jsonl"))]
    chunks = {tuple(map(int, found.groups())): file for file in folder.iterdir() if (found := _CHUNK(file.name))}
    if len({count for count, _ in chunks}) > 1:
        names = ", ".join(file.name for _, file in sorted(chunks.items()))
        raise DataError(f"{folder}: holds chunks of several runs ({names}); give one file, or delete the others")
    if not chunks and (folder / _MERGED_CHUNKS).is_file():
        return [folder / _MERGED_CHUNKS]
    return [file for _, file in sorted(chunks.items())] or sorted(folder.glob("*.jsonl"))


def _answer(row: Any, location: str) -> Answer | str:
    if not isinstance(row, dict):
        return f"{location}: {row.problem}" if isinstance(row, DataError) else f"{location}: not an object"
    name = next((row[key] for key in _ID if key in row), None)
    text = next((row[key] for key in _TEXT if key in row), None)
    if not isinstance(name, str | int) or isinstance(name, bool):
        return f"{location}: no question_id" + _instead(name)
    if not isinstance(text, str):
        return f"{location}: no text" + _instead(text)
    if (half := lone_surrogate([text, name])) is not None:
        return f"{location}: half a surrogate pair in {half!r}, which no file can hold"
    # Rows of video questions have the question itself where others have the prompt.
    prompt = row.get("prompt", row.get("question", "") if "pred" in row else "")
    own = str(row["id"]) if "id" in row and "question_id" in row else ""
    return Answer(name, text, prompt if isinstance(prompt, str) else "", location, own)


def _instead(value: Any) -> str:
    return "" if value is None else f", but {str(value)[:40]!r}"
