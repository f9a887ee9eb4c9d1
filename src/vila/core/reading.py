"""Reading files that `vila` did not write: library exceptions become one error with the file's name; strict JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import IO, Any, Final

from vila.core.errors import MISSING, DataError, VilaError

MAX_RECORD_BYTES: Final = 256 * 2**20
"""Longest record (line of JSON lines, element of a JSON list, JSON member of a tar) that is read."""

_MAX_REASON = 200
_HALF_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")

# Content that often lies in the place of other content: kind, first bytes, problem and hint.
_SIGNATURES = (
    ("lfs", b"version https://git-lfs", "is a Git LFS pointer, not the file", "run `git lfs pull`"),
    ("gzip", b"\x1f\x8b", "is gzip", "unpack it with gunzip"),
    ("zstd", b"\x28\xb5\x2f\xfd", "is zstd", "unpack it with unzstd"),
    ("bzip2", b"BZh", "is bzip2", "unpack it with bunzip2"),
    ("xz", b"\xfd7zXZ\x00", "is xz", "unpack it with unxz"),
    ("zip", b"PK\x03\x04", "is a zip archive", "unpack it with unzip"),
    ("parquet", b"PAR1", "is parquet", "rename it to .parquet, where parquet is read"),
    ("html", b"<!DOCTYPE html", "is a web page", "download the file itself"),
    ("html", b"<!doctype html", "is a web page", "download the file itself"),
    ("html", b"<html", "is a web page", "download the file itself"),
    ("utf-32", b"\xff\xfe\x00\x00", "is UTF-32 text", "save it as UTF-8"),
    ("utf-16", b"\xff\xfe", "is UTF-16 text", "save it as UTF-8"),
    ("utf-16", b"\xfe\xff", "is UTF-16 text", "save it as UTF-8"),
)
_TAR_MAGIC = slice(257, 262)


def foreign_content(head: bytes, kind: str = "") -> tuple[str, str] | None:
    """Return (problem, hint) if the first bytes of a file are those of a Git LFS pointer, an archive, a web page, ...

    head: the first bytes of the file; 64 suffice, 512 also find tar.
    kind: expected content, one of "zip", "gzip", "parquet", "tar"; it is not foreign. None: no known signature.
    """
    if not head:
        return "is empty", "copy or download it again"
    for name, signature, problem, hint in _SIGNATURES:
        if head.startswith(signature) and name != kind:
            return problem, hint
    if head[_TAR_MAGIC] == b"ustar" and kind != "tar":
        return "is a tar archive", "rename it to .tar, where tar is read"
    if not head.strip(b"\0"):
        return "begins with zero bytes", "copy or download it again"
    return None


def read_head(file: Path, size: int = 512) -> bytes:
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
    kind: str = "",
) -> Iterator[None]:
    """Raise `error` with the file's name in place of whatever a library raises while it reads `file`.

    Wrap the call into the library and nothing else, so that faults of our own code keep their traceback. A file whose
    first bytes show another kind of content than `kind` (see `foreign_content`) is named as such. VilaError passes
    through. The original exception is the cause.
    """
    try:
        yield
    except VilaError:
        raise
    except FileNotFoundError as cause:
        raise error("no such file", file=cause.filename or file, record=record, hint=hint) from cause
    except Exception as cause:
        problem, remedy = _diagnosis(Path(file), cause, kind)
        raise error(problem, file=file, record=record, hint=remedy or hint) from cause


def _diagnosis(file: Path, cause: Exception, kind: str) -> tuple[str, str | None]:
    try:
        known = foreign_content(read_head(file), kind) if file.is_file() else None
    except OSError:
        known = None
    if known:
        return known
    if isinstance(cause, UnicodeDecodeError):
        return f"not UTF-8 text (byte {cause.start})", "save it as UTF-8"
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
        if b"\0" in raw[:64]:
            raise refuse("holds zero bytes; it may be UTF-16 text, or a damaged file", "save it as UTF-8")
        try:
            raw = raw.decode("utf-8-sig")
        except UnicodeDecodeError as cause:
            raise refuse(f"not UTF-8 text (byte {cause.start})", "save it as UTF-8", cause) from cause
    try:
        value = json.loads(raw, object_pairs_hook=unique if unique_keys else None)
    except json.JSONDecodeError as cause:
        line = f"line {cause.lineno} column {cause.colno}" if record is None else f"character {cause.pos}"
        unfinished = cause.pos >= len(raw.rstrip()) or cause.msg.startswith("Unterminated")
        hint = "it ends inside a value: the file was cut, or a record spans several lines" if unfinished else None
        raise refuse(f"not JSON ({cause.msg} at {line})", hint, cause) from cause
    except RecursionError as cause:
        raise refuse("not JSON that can be read (nested too deeply)", cause=cause) from cause
    except VilaError:
        raise
    except ValueError as cause:  # an integer of more than 4,300 digits
        raise refuse(f"not JSON that can be read ({cause})", cause=cause) from cause
    if not surrogates and _HALF_ESCAPED.search(raw) and (text := lone_surrogate(value)) is not None:
        raise refuse(
            f"half a surrogate pair in the text {text!r}", "the text was cut inside a character; remove the rest"
        )
    return value


def lone_surrogate(value: Any) -> str | None:
    """Return the first string of a JSON value (keys included) with half a surrogate pair, or None.

    The string is cut to 40 characters around it. No file can hold such text, and no tokenizer takes it.
    """
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


def read_text(path: Path, error: type[VilaError] = DataError) -> str:
    """Read UTF-8 text, without its byte order mark. Raises `error` with the file's name for anything else."""
    with file_errors(path, error):
        raw = path.read_bytes()
        if raw and (known := foreign_content(raw[:512])):
            raise error(known[0], file=path, hint=known[1])
        return raw.decode("utf-8-sig")


def read_json(path: Path, error: type[VilaError] = DataError, *, surrogates: bool = False) -> Any:
    """Read a JSON file. Raises `error` with the file's name if it is absent or `parse_json` refuses it."""
    with file_errors(path, error):
        raw = path.read_bytes()
    return parse_json(raw, file=path, error=error, surrogates=surrogates)


def read_json_object(path: Path, error: type[VilaError] = DataError) -> dict[str, Any]:
    """Read a JSON file that holds one object. Raises `error` as `read_json` does, and for any other type."""
    value = read_json(path, error)
    if not isinstance(value, dict):
        raise error("not a JSON object", file=path, value=value, expected="an object ({...})")
    return value


def read_jsonl(
    path: Path, error: type[VilaError] = DataError, *, appended: bool = False, surrogates: bool = False
) -> Iterator[tuple[int, Any]]:
    """Yield line numbers (from 1) and values; empty lines are skipped. Raises `error` with file and line.

    appended: the file is a log of ours; a last line without its newline was cut by a kill and is left out.
    """
    with file_errors(path, error):
        stream = path.open("rb")
    with stream:
        for number, line in bounded_lines(stream, path, error):
            if appended and not line.endswith(b"\n"):
                return
            if line.strip(b" \t\r\n"):
                record = f"line {number}"
                yield number, parse_json(line, file=path, record=record, error=error, surrogates=surrogates)


def bounded_lines(
    stream: IO[bytes], file: str | PathLike[str], error: type[VilaError] = DataError, **reading: Any
) -> Iterator[tuple[int, bytes]]:
    """Yield line numbers (from 1) and lines. Raises `error` for a line over `MAX_RECORD_BYTES`.

    reading: `kind` and `hint` for the errors of the stream itself, see `file_errors`.
    """
    number = 0
    while True:
        number += 1
        record = f"line {number}"
        with file_errors(file, error, record=record, **reading):
            line = stream.readline(MAX_RECORD_BYTES + 1)
        if len(line) > MAX_RECORD_BYTES:
            raise error(
                "the line is longer than a record may be",
                file=file,
                record=record,
                expected=f"at most {MAX_RECORD_BYTES:,} bytes",
                hint="write one record per line",
            )
        if not line:
            return
        yield number, line


# --- fields
# Values of JSON objects, read with a check of their type and range.


class Fields(Mapping[str, Any]):
    """The JSON object of a file, or an object inside it, whose values are read with a check of type and range.

    file:  the file that holds it.
    name:  dotted name of the object inside the file; empty for the whole file.
    error: type of the errors; they carry file, dotted field, value and the accepted values.

    As a mapping it holds the values unchecked. The accessors treat null as absent: they return `default` then, and
    raise `error` where there is no default. NaN and infinity are out of every range, and a bool is no number.
    The return types do not mention a default of None.
    """

    def __init__(
        self, values: Mapping[str, Any], file: str | PathLike[str], name: str = "", error: type[VilaError] = DataError
    ) -> None:
        self._values = values
        self.file = Path(file)
        self.name = name
        self._error = error

    @staticmethod
    def of_file(path: Path, error: type[VilaError] = DataError) -> Fields:
        """Read a JSON file that holds one object. Raises `error` as `read_json_object` does."""
        return Fields(read_json_object(path, error), path, error=error)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def field(self, key: str) -> str:
        """Return the dotted name of `key` inside the file."""
        return f"{self.name}.{key}" if self.name else key

    def refusal(
        self, key: str, problem: str = "", *, expected: str | None = None, hint: str | None = None
    ) -> VilaError:
        """Return the error for the value of `key`, or for its absence."""
        value = self._values.get(key, MISSING)
        return self._error(
            problem or ("missing" if value is MISSING else ""),
            file=self.file,
            field=self.field(key),
            value=value,
            expected=expected,
            hint=hint,
        )

    def integer(self, key: str, default: Any = MISSING, *, minimum: int = 0, maximum: int = 2**31 - 1) -> int:
        """Return an integer from `minimum` to `maximum`."""
        value: int = self._checked(
            key,
            default,
            lambda value: _is_int(value) and minimum <= value <= maximum,
            f"an integer from {minimum:,} to {maximum:,}",
        )
        return value

    def number(self, key: str, default: Any = MISSING, *, minimum: float = 0.0, maximum: float = 1e9) -> float:
        """Return an integer or float from `minimum` to `maximum`."""
        value: float = self._checked(
            key, default, lambda value: _in_range(value, minimum, maximum), f"a number from {minimum:g} to {maximum:g}"
        )
        return value

    def numbers(
        self, key: str, default: Any = MISSING, *, length: int, minimum: float = 0.0, maximum: float = 1e9
    ) -> tuple[float, ...]:
        """Return a list of `length` numbers from `minimum` to `maximum`, as a tuple."""
        value = self._checked(
            key,
            default,
            lambda value: _is_list(value, length) and all(_in_range(item, minimum, maximum) for item in value),
            f"a list of {length} numbers from {minimum:g} to {maximum:g}",
        )
        return tuple(value) if isinstance(value, list) else value

    def flag(self, key: str, default: Any = MISSING) -> bool:
        """Return true or false."""
        value: bool = self._checked(key, default, lambda value: isinstance(value, bool), "true or false")
        return value

    def text(self, key: str, default: Any = MISSING, *, choices: Sequence[str] = ()) -> str:
        """Return text; one of `choices` if there are any."""
        value: str = self._checked(
            key,
            default,
            lambda value: isinstance(value, str) and (not choices or value in choices),
            "one of " + ", ".join(choices) if choices else "text",
        )
        return value

    def texts(self, key: str, default: Any = MISSING) -> list[str]:
        """Return a list of texts."""
        value: list[str] = self._checked(
            key,
            default,
            lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
            "a list of texts",
        )
        return value

    def section(self, key: str) -> Fields:
        """Return the object at `key`; an empty one if it is absent or null."""
        value = self._checked(key, {}, lambda value: isinstance(value, dict), "an object ({...})")
        return Fields(value, self.file, self.field(key), self._error)

    @contextmanager
    def naming(self, names: Mapping[str, str] | None = None) -> Iterator[None]:
        """Add the file to errors raised inside that name none.

        names: keys of this object by the field names of those errors, where they differ.
        """
        try:
            yield
        except VilaError as fault:
            if fault.file is None:
                fault.file = str(self.file)
                if fault.field:
                    fault.field = self.field((names or {}).get(fault.field, fault.field))
            raise

    def without(self, *keys: str) -> Fields:
        """Return these fields without some keys."""
        values = {key: value for key, value in self._values.items() if key not in keys}
        return Fields(values, self.file, self.name, self._error)

    def _checked(self, key: str, default: Any, is_accepted: Callable[[Any], bool], expected: str) -> Any:
        value = self._values.get(key)
        if value is None and default is not MISSING:
            return default
        if not is_accepted(value):
            raise self.refusal(key, expected=expected)
        return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _in_range(value: Any, minimum: float, maximum: float) -> bool:
    return (_is_int(value) or isinstance(value, float)) and minimum <= value <= maximum


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length
