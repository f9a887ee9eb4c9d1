"""Reading files that `vila` did not write: library exceptions become one error with the file's name; strict JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from vila.core.errors import DataError, VilaError

_MAX_REASON = 200

# First bytes of files that often lie in the place of another, and the reason and remedy to report.
_SIGNATURES = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file", "run `git lfs pull`"),
    (b"\x1f\x8b", "is gzip", "unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "is zstd", "unpack it with unzstd"),
    (b"BZh", "is bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "is xz", "unpack it with unxz"),
    (b"PK\x03\x04", "is a zip archive", "unpack it with unzip"),
    (b"<!DOCTYPE html", "is a web page", "download the file itself"),
    (b"<html", "is a web page", "download the file itself"),
    (b"\xff\xfe\x00\x00", "is UTF-32 text", "save it as UTF-8"),
    (b"\xff\xfe", "is UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16 text", "save it as UTF-8"),
)


def foreign_content(head: bytes) -> tuple[str, str] | None:
    """Return (problem, hint) if the first bytes of a file are those of a Git LFS pointer, an archive, a web page, ...

    head: the first bytes of the file; 64 suffice. None: no known signature, or the file is of a kind that may have it.
    """
    if not head:
        return "is empty", "copy or download it again"
    for signature, problem, hint in _SIGNATURES:
        if head.startswith(signature):
            return problem, hint
    if not head.strip(b"\0"):
        return "begins with zero bytes", "copy or download it again"
    return None


def read_head(file: Path, size: int = 64) -> bytes:
    """Return the first `size` bytes of a file."""
    with file.open("rb") as stream:
        return stream.read(size)


@contextmanager
def file_errors(
    file: str | PathLike[str],
    error: type[VilaError] = DataError,
    *,
    record: int | str | None = None,
    hint: str | None = None,
) -> Iterator[None]:
    """Raise `error` with the file's name in place of whatever a library raises while it reads `file`.

    Wrap the call into the library and nothing else, so that faults of our own code keep their traceback. A file whose
    first bytes show another kind of content (see `foreign_content`) is named as such. VilaError passes through.
    The original exception is the cause.
    """
    try:
        yield
    except VilaError:
        raise
    except FileNotFoundError as cause:
        raise error("no such file", file=cause.filename or file, record=record, hint=hint) from cause
    except Exception as cause:
        problem, remedy = _diagnosis(Path(file), cause)
        raise error(problem, file=file, record=record, hint=remedy or hint) from cause


def _diagnosis(file: Path, cause: Exception) -> tuple[str, str | None]:
    try:
        known = foreign_content(read_head(file)) if file.is_file() else None
    except OSError:
        known = None
    if known:
        return known
    text = " ".join(str(cause).split())
    if len(text) > _MAX_REASON:
        text = f"{text[:_MAX_REASON]}..."
    return (
        f"cannot be read ({type(cause).__name__}: {text})" if text else f"cannot be read ({type(cause).__name__})",
        None,
    )


def parse_json(
    raw: bytes | str,
    *,
    file: str | PathLike[str] | None,
    record: int | str | None = None,
    error: type[VilaError] = DataError,
    unique_keys: bool = False,
    surrogates: bool = False,
) -> Any:
    """Parse JSON text and raise `error` with file and record for everything that is not sound JSON.

    unique_keys: refuse an object that holds one key twice.
    surrogates:  accept strings with half a surrogate pair (text cut inside an emoji), which no tokenizer takes.
    Also refused: text that is not UTF-8 (a byte order mark is skipped), nesting beyond Python's recursion limit,
    integers of more than 4,300 digits.
    """

    def refuse(problem: str, hint: str | None = None, cause: Exception | None = None) -> VilaError:
        fault = error(problem, file=file, record=record, hint=hint)
        fault.__cause__ = cause
        return fault

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            visited: set[str] = set()
            for key, _ in pairs:
                if key in visited:
                    raise refuse(f"key {key!r} occurs twice in one object", "keep one of them")
                visited.add(key)
        return value

    if isinstance(raw, bytes):
        if raw and (known := foreign_content(raw[:64])):
            raise refuse(*known)
        try:
            raw = raw.decode("utf-8-sig")
        except UnicodeDecodeError as cause:
            raise refuse(f"not UTF-8 text (byte {cause.start})", "save it as UTF-8", cause) from cause
    try:
        value = json.loads(raw, object_pairs_hook=unique if unique_keys else None)
    except json.JSONDecodeError as cause:
        line = f"line {cause.lineno} column {cause.colno}" if record is None else f"character {cause.pos}"
        raise refuse(f"not JSON ({cause.msg} at {line})", cause=cause) from cause
    except RecursionError as cause:
        raise refuse("not JSON that can be read (nested too deeply)", cause=cause) from cause
    except VilaError:
        raise
    except ValueError as cause:  # an integer of more than 4,300 digits
        raise refuse(f"not JSON that can be read ({cause})", cause=cause) from cause
    if not surrogates and "\\u" in raw and (text := _half_pair(value)) is not None:
        raise refuse(
            f"half a surrogate pair in the text {text!r}", "the text was cut inside a character; remove the rest"
        )
    return value


def _half_pair(value: Any) -> str | None:
    """Return a string (keys included) with a lone surrogate, cut to 40 characters around it, or None."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError as fault:
                return item[max(0, fault.start - 20) : fault.start + 20]
        elif isinstance(item, dict):
            stack += item.keys()
            stack += item.values()
        elif isinstance(item, list):
            stack += item
    return None


def read_json(path: Path, error: type[VilaError] = DataError) -> Any:
    """Read a JSON file. Raises `error` with the file's name if it is absent or `parse_json` refuses it."""
    with file_errors(path, error):
        raw = path.read_bytes()
    return parse_json(raw, file=path, error=error)


def read_json_object(path: Path, error: type[VilaError] = DataError) -> dict[str, Any]:
    """Read a JSON file that holds one object. Raises `error` as `read_json` does, and for any other type."""
    value = read_json(path, error)
    if not isinstance(value, dict):
        raise error("not a JSON object", file=path, value=value, expected="an object ({...})")
    return value


def read_jsonl(path: Path, error: type[VilaError] = DataError) -> Iterator[tuple[int, Any]]:
    """Yield line numbers (from 1) and values; empty lines are skipped. Raises `error` with file and line."""
    with file_errors(path, error):
        stream = path.open("rb")
    with stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, parse_json(line, file=path, record=f"line {number}", error=error)
