"""Files for the benchmarks' servers, in the formats and the folder that the original's copying script uses."""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.errors import DataError
from vila.core.files import atomic_path
from vila.core.optional import MissingExtraError, require
from vila.eval.annotations import format_ids
from vila.eval.benchmark import BENCHMARKS, Submission
from vila.eval.predictions import PREDICTIONS_FILE

SERVERS = ("vqav2", "vizwiz", "mmbench", "mmbench_cn", "seed")
"""The benchmarks whose answers are sent somewhere."""


@dataclass(frozen=True, slots=True)
class SubmissionFile:
    """A file to upload: where it lies, where it goes, and what was checked."""

    benchmark: str
    path: Path
    server: str
    checks: tuple[str, ...]


def submit_run(
    run: Path, out: Path, data: Path, folders: Mapping[str, str], reasons: Mapping[str, str] | None = None
) -> tuple[list[SubmissionFile], list[str]]:
    """Write `out/BENCHMARK/RUN-HASH.EXT` for every benchmark of a run that has a server; and why others have no file.

    folders: of the benchmarks below `run`, by name. reasons: why the run left others out.
    """
    written: list[SubmissionFile] = []
    left_out = [f"{name}: not run" + _because(reasons, name) for name in SERVERS if name not in folders]
    for name, folder in folders.items():
        predictions = run / folder / PREDICTIONS_FILE
        if not predictions.is_file():
            begun = any((run / folder).glob("part-*.jsonl"))
            what = "not finished; the same `vila eval` goes on where it was" if begun else f"not run; no {predictions}"
            left_out.append(f"{name}: {what}")
            continue
        try:
            benchmark: Any = BENCHMARKS[name](data, 0)
            if not hasattr(benchmark, "submission"):
                continue
            written.append(submit_file(name, benchmark, predictions, out, run.name))
        except (DataError, MissingExtraError) as error:
            left_out.append(f"{name}: {error}")
    return written, left_out


def _because(reasons: Mapping[str, str] | None, name: str) -> str:
    return f" ({reasons[name]})" if reasons and name in reasons else ""


def submit_file(name: str, benchmark: Any, predictions: Path, out: Path, run: str) -> SubmissionFile:
    """Write the server's file of one file of answers. Raises DataError for what the server would refuse.

    And for lines that cannot be read, unless the original's converter skips them too.
    """
    from vila.eval.predictions import bad_line_notes, read_answers

    answers = read_answers(predictions)
    bad = bad_line_notes(answers.bad, skipped=getattr(benchmark, "skips_bad_lines", False))
    failed = (
        [f"{len(answers.failed)} questions could not be asked: {format_ids(answers.failed)}"] if answers.failed else []
    )
    submission: Submission = benchmark.submission(answers.rows)
    content = _encoded(submission)
    # The MMBench server knows files by name and gives the old result for a new file of the same name.
    short = hashlib.sha256(_canonical(submission)).hexdigest()[:8]
    path = out / name / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', run)}-{short}.{submission.format}"
    with atomic_path(path) as part:
        part.write_bytes(content)
    for old in path.parent.glob(f"*.{submission.format}"):
        if old != path and old.name.startswith(f"{path.stem[:-9]}-") and len(old.stem) == len(path.stem):
            old.unlink()
    return SubmissionFile(name, path, submission.server, (*bad, *failed, *submission.checks))


def _canonical(submission: Submission) -> bytes:
    return json.dumps(submission.rows, ensure_ascii=False).encode()


def _encoded(submission: Submission) -> bytes:
    if submission.format == "json":
        return _canonical(submission)
    if submission.format == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in submission.rows).encode()

    return xlsx_bytes(submission.rows)


def format_submissions(written: Sequence[SubmissionFile], left_out: Sequence[str]) -> list[str]:
    """Lines for the reader: each file, its checks, where it is uploaded, and what was left out."""
    lines = []
    for one in written:
        lines.append(f"{one.path}")
        lines += [f"  {check}" for check in one.checks]
        lines.append(f"  upload: {one.server}")
    return [*lines, *(f"left out: {reason}" for reason in left_out)]


# --- spreadsheet
# Spreadsheets for servers: one sheet, a header, text as text.


SHEET = "Sheet1"
_LONGEST = 32_767
"""Characters that a cell of a spreadsheet can hold."""
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
_MADE = re.compile(rb"(<dcterms:(?:created|modified)[^>]*>)[^<]*")
_NO_TIME = (1980, 1, 1, 0, 0, 0)


def cell_text(text: str) -> str:
    """Text as a cell can hold it: without control characters, and cut where it is longer than a cell."""
    return _FORBIDDEN.sub("", text)[:_LONGEST]


def xlsx_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """An xlsx file: the columns of the first row as header, then all rows; None leaves a cell empty.

    Equal rows give equal bytes. Raises MissingExtraError without openpyxl, and DataError naming the row for text that
    no cell can hold.
    """
    openpyxl = require("openpyxl", "an xlsx file", extra="eval")
    from openpyxl.cell import WriteOnlyCell

    if not rows:
        raise DataError("a spreadsheet without rows; there is nothing to submit")
    columns = list(rows[0])
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet(SHEET)

    def cell(value: Any, number: int, column: str) -> Any:
        if not isinstance(value, str):
            return value
        if value != cell_text(value):
            raise DataError(f"row {number} column {column}: a cell cannot hold {value[:40]!r}; see `cell_text`")
        made = WriteOnlyCell(sheet, value=value)
        # A text that opens with "=" would become a formula.
        made.data_type = "s"
        return made

    sheet.append(columns)
    for number, row in enumerate(rows, start=1):
        sheet.append([cell(row[column], number, column) for column in columns])
    stream = io.BytesIO()
    book.save(stream)
    return _timeless(stream.getvalue())


def _timeless(book: bytes) -> bytes:
    """The file without the time it was made at, which stands in its properties and beside every part."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(book)) as parts, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as kept:
        for part in parts.infolist():
            content = parts.read(part)
            if part.filename == "docProps/core.xml":
                content = _MADE.sub(rb"\g<1>1980-01-01T00:00:00Z", content)
            kept.writestr(zipfile.ZipInfo(part.filename, _NO_TIME), content, zipfile.ZIP_DEFLATED)
    return out.getvalue()
