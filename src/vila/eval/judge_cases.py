"""Files of predictions about clips, as the original's programs write them, made into cases for a judge.

{"id": ..., "question": ..., "answer": ..., "pred": ...}                         video QA
{"video_name": ..., "Q": ..., "A": ..., "pred": ...}                             Video-ChatGPT's dimensions
{"video_name": ..., "Q1": ..., "Q2": ..., "A": ..., "pred1": ..., "pred2": ...}  its consistency
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from vila.core.errors import DataError, UnknownNameError
from vila.core.reading import lone_surrogate
from vila.eval.json_array import iter_rows
from vila.eval.judge import Case, fields_of, prompts

_OTHER = {"question": "Q", "answer": "A", "question1": "Q1", "question2": "Q2"}
_IDS = ("id", "question_id", "video_name")


def read_cases(path: Path, kind: str) -> list[Case]:
    """The cases of a JSON list or of JSON lines. A second row of one id is a case of its own.

    Raises DataError naming file and row for one that cannot be read or lacks what judges of this kind are shown.
    """
    if kind not in prompts():
        raise UnknownNameError("kind of judge", kind, prompts())
    seen: Counter[str] = Counter()
    cases = []
    for where, row in iter_rows(path):
        if isinstance(row, DataError):
            row.hint = row.hint or "correct or delete the line"
            raise row
        if (half := lone_surrogate(row)) is not None:
            raise DataError(f"{where}: half a surrogate pair in the text {half!r}; remove it")
        fields = {name: _field(row, name, where) for name in fields_of(kind)}
        own = next((str(row[key]) for key in _IDS if key in row), None)
        if own is None:
            raise DataError(f"{where}: no id; expected {' or '.join(_IDS)}")
        seen[own] += 1
        cases.append(Case(own if seen[own] == 1 else f"{own} again ({seen[own]})", fields))
    if not cases:
        raise DataError(f"{path}: holds no prediction")
    return cases


def _field(row: Any, name: str, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a mapping, got {str(row)[:60]!r}")
    found = row.get(name, row.get(_OTHER.get(name, name)))
    if not isinstance(found, str | int | float):
        other = f" or {_OTHER[name]!r}" if name in _OTHER else ""
        raise DataError(f"{where}: no {name!r}{other}")
    return str(found)
