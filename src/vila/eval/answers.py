"""Reading files of answers, whoever made them: our predictions, or the original's answer files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.reading import lone_surrogate
from vila.eval.benchmark import Answer
from vila.eval.json_array import iter_rows
from vila.eval.predictions import MERGED

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
        for where, row in iter_rows(file):
            if isinstance(row, dict) and "error" in row and "text" not in row:
                failed.append(str(row.get("id", where)))
                continue
            answer = _answer(row, where)
            if isinstance(answer, str):
                bad.append(answer)
            else:
                rows.append(answer)
    if not rows and not failed:
        raise DataError(f"{path}: holds no answer" + (f"; {bad[0]}" if bad else ""))
    return AnswerFile(tuple(rows), tuple(bad), tuple(failed))


def bad_lines(bad: Sequence[str], *, skipped: bool) -> list[str]:
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
    if (folder / MERGED).is_file():
        return [folder / MERGED, *sorted(folder.glob("part-*.jsonl"))]
    chunks = {tuple(map(int, found.groups())): file for file in folder.iterdir() if (found := _CHUNK(file.name))}
    if len({count for count, _ in chunks}) > 1:
        names = ", ".join(file.name for _, file in sorted(chunks.items()))
        raise DataError(f"{folder}: holds chunks of several runs ({names}); give one file, or delete the others")
    if not chunks and (folder / _MERGED_CHUNKS).is_file():
        return [folder / _MERGED_CHUNKS]
    return [file for _, file in sorted(chunks.items())] or sorted(folder.glob("*.jsonl"))


def _answer(row: Any, where: str) -> Answer | str:
    if not isinstance(row, dict):
        return f"{where}: {row.problem}" if isinstance(row, DataError) else f"{where}: not an object"
    name = next((row[key] for key in _ID if key in row), None)
    text = next((row[key] for key in _TEXT if key in row), None)
    if not isinstance(name, str | int) or isinstance(name, bool):
        return f"{where}: no question_id" + _instead(name)
    if not isinstance(text, str):
        return f"{where}: no text" + _instead(text)
    if (half := lone_surrogate([text, name])) is not None:
        return f"{where}: half a surrogate pair in {half!r}, which no file can hold"
    # Rows of video questions have the question itself where others have the prompt.
    prompt = row.get("prompt", row.get("question", "") if "pred" in row else "")
    own = str(row["id"]) if "id" in row and "question_id" in row else ""
    return Answer(name, text, prompt if isinstance(prompt, str) else "", where, own)


def _instead(value: Any) -> str:
    return "" if value is None else f", but {str(value)[:40]!r}"
