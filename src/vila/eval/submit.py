"""Submission files for benchmark servers, in the formats and folders of the original scripts."""

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
from vila.eval.benchmark import BENCHMARKS, Benchmark, Submission
from vila.eval.predictions import PREDICTIONS_FILE, bad_line_notes, read_answers

SERVERS = ("vqav2", "vizwiz", "mmbench", "mmbench_cn", "seed")
"""Benchmarks whose test answers are scored by a server."""


@dataclass(frozen=True, slots=True)
class SubmissionFile:
    """A written file, the server to upload it to, and the performed checks."""

    benchmark: str
    path: Path
    server: str
    checks: tuple[str, ...]


def submit_run(
    run: Path, out: Path, data: Path, folders: Mapping[str, str], reasons: Mapping[str, str] | None = None
) -> tuple[list[SubmissionFile], list[str]]:
    """Write `out/BENCHMARK/RUN-HASH.EXT` for every benchmark with a server; also return why others have no file.

    folders: name of the folder of each benchmark below `run`. reasons: why the run left benchmarks out.
    """
    written: list[SubmissionFile] = []
    left_out = [f"{name}: not run" + _because(reasons, name) for name in SERVERS if name not in folders]
    for name, folder in folders.items():
        if name not in SERVERS:
            continue
        predictions = run / folder / PREDICTIONS_FILE
        if not predictions.is_file():
            begun = any((run / folder).glob("part-*.jsonl"))
            reason = "not finished; the same `vila eval` command resumes it" if begun else f"not run; no {predictions}"
            left_out.append(f"{name}: {reason}")
            continue
        try:
            written.append(submit_file(name, BENCHMARKS[name](data, 0), predictions, out, run.name))
        except (DataError, MissingExtraError) as error:
            left_out.append(f"{name}: {error}")
    return written, left_out


def _because(reasons: Mapping[str, str] | None, name: str) -> str:
    return f" ({reasons[name]})" if reasons and name in reasons else ""


def submit_file(name: str, benchmark: Benchmark, predictions: Path, out: Path, run: str) -> SubmissionFile:
    """Write the submission file of an answer file.

    Raises DataError for answers that the server would reject, and for unreadable lines unless the benchmark skips them.
    """
    answers = read_answers(predictions)
    bad = bad_line_notes(answers.bad, skipped=benchmark.skips_bad_lines)
    failed = [f"{len(answers.failed)} questions failed: {format_ids(answers.failed)}"] if answers.failed else []
    submission: Submission = benchmark.submission(answers.answers)
    content = _encode(submission)
    # The MMBench server caches results by file name, so that other answers need another name.
    short = hashlib.sha256(_json_bytes(submission)).hexdigest()[:8]
    path = out / name / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', run)}-{short}.{submission.format}"
    with atomic_path(path) as part:
        part.write_bytes(content)
    for old in path.parent.glob(f"*.{submission.format}"):
        if old != path and old.name.startswith(f"{path.stem[:-9]}-") and len(old.stem) == len(path.stem):
            old.unlink()
    return SubmissionFile(name, path, submission.server, (*bad, *failed, *submission.checks))


def _json_bytes(submission: Submission) -> bytes:
    return json.dumps(submission.rows, ensure_ascii=False).encode()


def _encode(submission: Submission) -> bytes:
    if submission.format == "json":
        return _json_bytes(submission)
    if submission.format == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in submission.rows).encode()

    return xlsx_bytes(submission.rows)


def format_submissions(written: Sequence[SubmissionFile], left_out: Sequence[str]) -> list[str]:
    """Return lines for the user: each file, its checks and server, and the benchmarks without a file."""
    lines = []
    for one in written:
        lines.append(f"{one.path}")
        lines += [f"  {check}" for check in one.checks]
        lines.append(f"  upload: {one.server}")
    return [*lines, *(f"left out: {reason}" for reason in left_out)]


SHEET = "Sheet1"
_MAX_CELL_CHARS = 32_767
"""Limit of an xlsx cell."""
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
_TIMESTAMP = re.compile(rb"(<dcterms:(?:created|modified)[^>]*>)[^<]*")
_FIXED_TIME = (1980, 1, 1, 0, 0, 0)


def cell_text(text: str) -> str:
    """Remove control characters and cut the text to the limit of a cell."""
    return _FORBIDDEN.sub("", text)[:_MAX_CELL_CHARS]


def xlsx_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return an xlsx file with the columns of the first row as header; None leaves a cell empty.

    Equal rows give equal bytes. Raises MissingExtraError without openpyxl, DataError for text that a cell cannot hold.
    """
    openpyxl = require("openpyxl", "an xlsx file", extra="eval")
    from openpyxl.cell import WriteOnlyCell

    if not rows:
        raise DataError("nothing to submit: no rows")
    columns = list(rows[0])
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet(SHEET)

    def cell(value: Any, number: int, column: str) -> Any:
        if not isinstance(value, str):
            return value
        if value != cell_text(value):
            raise DataError("not representable in a cell; see `cell_text`", record=number, field=column, value=value)
        created = WriteOnlyCell(sheet, value=value)
        # Text that starts with "=" would become a formula.
        created.data_type = "s"
        return created

    sheet.append(columns)
    for number, row in enumerate(rows, start=1):
        sheet.append([cell(row[column], number, column) for column in columns])
    stream = io.BytesIO()
    book.save(stream)
    return _without_timestamps(stream.getvalue())


def _without_timestamps(book: bytes) -> bytes:
    """Replace the creation times in the properties and in the zip entries."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(book)) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for part in source.infolist():
            content = source.read(part)
            if part.filename == "docProps/core.xml":
                content = _TIMESTAMP.sub(rb"\g<1>1980-01-01T00:00:00Z", content)
            target.writestr(zipfile.ZipInfo(part.filename, _FIXED_TIME), content, zipfile.ZIP_DEFLATED)
    return out.getvalue()
