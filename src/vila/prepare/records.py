"""Rows of published files: JSON lines (plain, gzip, zip) and parquet. Whatever is cut, broken or a bomb is an error."""

from __future__ import annotations

import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from vila.core.errors import DataError

MAX_LINE_BYTES = 256 * 2**20
"""Longest line; a record with its images inside may be large."""
MAX_RATIO = 200
"""Largest expansion of a compressed file. JSON text is packed 3 to 15 times; bombs are packed 1000 times."""
_FREE_BYTES = 64 * 2**20
_AGAIN = "download it again"


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers (from 1) and records of `.jsonl`, `.jsonl.gz`, `.jsonl.zip` or `.parquet`.

    columns: of parquet, the only ones to read.
    Raises DataError naming file, row and fault.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield from read_parquet(path, columns)
    elif name.endswith(".zip"):
        yield from _zip_rows(path)
    elif name.endswith(".gz"):
        limit = _free(path.stat().st_size)
        with gzip.open(path, "rb") as stream:
            yield from _json_lines(stream, str(path), limit)
    elif name.endswith((".jsonl", ".ndjson")):
        with path.open("rb") as stream:
            yield from _json_lines(stream, str(path), None)
    else:
        raise DataError(f"{path}: expected .jsonl, .jsonl.gz, .jsonl.zip or .parquet")


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers (from 1) and records of a parquet file, a batch in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as table:
            missing = sorted(set(columns or ()) - set(table.schema_arrow.names))
            if missing:
                raise DataError(
                    f"{path}: no column {', '.join(map(repr, missing))} (it has {', '.join(table.schema_arrow.names)})"
                )
            for batch in table.iter_batches(batch_size=1024, columns=list(columns) if columns else None):
                for record in batch.to_pylist():
                    row += 1
                    yield row, record
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole parquet file ({error}); {_AGAIN}") from error


def parquet_rows(path: Path) -> int:
    """The number of rows of a parquet file, from its footer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole parquet file ({error}); {_AGAIN}") from error


def _zip_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [one for one in archive.infolist() if one.filename.lower().endswith((".jsonl", ".ndjson"))]
            if not members:
                raise DataError(f"{path}: holds no .jsonl file")
            limit = _free(path.stat().st_size)
            row = 0
            for member in sorted(members, key=lambda one: one.filename):
                with archive.open(member) as stream:
                    for _, record in _json_lines(stream, f"{path} ({member.filename})", limit):
                        row += 1
                        yield row, record
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{path}: cannot be unpacked ({error}); {_AGAIN}") from error


def _free(packed_bytes: int) -> int:
    return max(_FREE_BYTES, packed_bytes * MAX_RATIO)


def _json_lines(
    stream: IO[bytes] | gzip.GzipFile, name: str, limit: int | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    read = 0
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline(MAX_LINE_BYTES + 1)
        except (EOFError, OSError, zlib.error) as error:  # gzip and zip that are cut or damaged
            raise DataError(f"{name} line {number}: cannot be unpacked ({error}); {_AGAIN}") from error
        if not line:
            return
        read += len(line)
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{name} line {number}: longer than {MAX_LINE_BYTES:,} bytes; no record is that large")
        if limit is not None and read > limit:
            raise DataError(f"{name}: unpacks to over {limit:,} bytes, {MAX_RATIO} times its size; refused as a bomb")
        if line.strip():
            yield number, _record(line, name, number)


def _record(line: bytes, name: str, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else f"; the file may be cut short, {_AGAIN}"
        raise DataError(f"{name} line {number}: not JSON ({error}){cut}") from error
    if not isinstance(record, dict):
        raise DataError(f"{name} line {number}: {type(record).__name__} where an object was expected")
    return record
