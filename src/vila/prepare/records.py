"""Read records of published files: JSON lines (plain, gzip, zip) and parquet.

Truncated and damaged files and decompression bombs raise DataError.
"""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from vila.core.errors import DataError
from vila.core.optional import require
from vila.core.reading import (
    bounded_lines,
    file_errors,
    foreign_content,
    lone_surrogate,
    parse_json,
    read_head,
)
from vila.data.readers.parquet import row_group_sizes

MAX_RATIO = 200
"""Maximum compression ratio. JSON text has ratios of 3 to 15, decompression bombs of 1000."""
_MIN_LIMIT_BYTES = 64 * 2**20
_AGAIN = "download it again"
_END_MARK = b"PK\x05\x06"
_END_SIZE = 22


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield row numbers (from 1) and records of `.jsonl`, `.jsonl.gz`, `.jsonl.zip` or `.parquet`.

    A text with a lone surrogate stays in its record: see `text_problem`. Raises DataError with file and line.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield from read_parquet(path)
    elif name.endswith(".zip"):
        yield from _zip_rows(path)
    elif name.endswith(".gz"):
        with file_errors(path, kind="gzip"):
            limit = _max_unpacked(path.stat().st_size)
            stream = gzip.open(path, "rb")  # noqa: SIM115
        with stream:
            yield from _json_lines(cast(IO[bytes], stream), str(path), limit, kind="gzip")
    elif name.endswith((".jsonl", ".ndjson")):
        with file_errors(path):
            known = foreign_content(read_head(path))
        if known and path.stat().st_size:
            raise DataError(known[0], file=path, hint=known[1])
        with path.open("rb") as plain:
            yield from _json_lines(plain, str(path), None)
    else:
        expected = ".jsonl, .jsonl.gz, .jsonl.zip or .parquet"
        raise DataError("unsupported format", file=path, value=path.suffix, expected=expected)


def text_problem(record: Any) -> str:
    """Return why the text of a record cannot be written as UTF-8; "" if it can."""
    return "" if lone_surrogate(record) is None else "half a surrogate pair in the text"


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield row numbers (from 1) and records of a parquet file; one batch is in memory at a time."""
    pq = require("pyarrow.parquet", "parquet")
    parquet_rows(path)
    with file_errors(path, kind="parquet", hint=_AGAIN):
        table = pq.ParquetFile(path)
    with table:
        known = table.schema_arrow.names
        missing = sorted(set(columns or ()) - set(known))
        if missing:
            raise DataError("no such column", file=path, field=missing[0], expected=f"one of {', '.join(known)}")
        batches = table.iter_batches(batch_size=1024, columns=list(columns) if columns else None)
        row = 0
        while True:
            with file_errors(path, record=f"row {row + 1}", kind="parquet", hint=_AGAIN):
                batch = next(batches, None)
                records = [] if batch is None else batch.to_pylist()
            if batch is None:
                return
            for record in records:
                row += 1
                yield row, record


def parquet_rows(path: Path) -> int:
    """Return the number of rows from the footer of a parquet file, after checking it."""
    return sum(row_group_sizes(path))


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive. Raises DataError for damage, and for data before or after it, which zipfile would ignore."""
    with file_errors(path, kind="zip", hint=_AGAIN):
        archive = zipfile.ZipFile(path)
        first = min((one.header_offset for one in archive.infolist()), default=0)
        size = path.stat().st_size
        end = size - _END_SIZE - len(archive.comment)
        with path.open("rb") as stream:
            stream.seek(max(0, end))
            is_last = stream.read(4) == _END_MARK
        if first or not is_last:
            where = "before" if first else "after"
            raise DataError(f"data {where} the zip archive", file=path, hint="unpack archives that were concatenated")
    with archive:
        yield archive


def _zip_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_zip(path) as archive:
        names = [one for one in archive.infolist() if one.filename.lower().endswith((".jsonl", ".ndjson"))]
        members = [one for one in names if not one.filename.startswith("__MACOSX/")]
        if not members:
            raise DataError("no .jsonl file in the archive", file=path)
        limit = _max_unpacked(path.stat().st_size)
        row = 0
        for member in sorted(members, key=lambda one: one.filename):
            with file_errors(path, record=f"member {member.filename!r}", kind="zip", hint=_AGAIN):
                stream = archive.open(member)
            with stream:
                for _, record in _json_lines(stream, f"{path} ({member.filename})", limit, kind="zip"):
                    row += 1
                    yield row, record


def _max_unpacked(packed_bytes: int) -> int:
    return max(_MIN_LIMIT_BYTES, packed_bytes * MAX_RATIO)


def _json_lines(
    stream: IO[bytes], name: str, limit: int | None, kind: str = ""
) -> Iterator[tuple[int, dict[str, Any]]]:
    read = 0
    for number, line in bounded_lines(stream, name, kind=kind, hint=_AGAIN):
        read += len(line)
        if limit is not None and read > limit:
            raise DataError(
                "too large when unpacked (decompression bomb)", file=name, expected=f"at most {limit:,} bytes"
            )
        if line.strip(b" \t\r\n"):
            record = parse_json(line, file=name, record=f"line {number}", surrogates=True)
            if not isinstance(record, dict):
                raise DataError(file=name, record=f"line {number}", value=record, expected="an object ({...})")
            yield number, record
