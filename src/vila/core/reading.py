"""Read untrusted files: strict JSON, checked fields, and errors with file names for library exceptions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import IO, Any, Final, TypeVar, cast

from vila.core.errors import MISSING, DataError, VilaError

T = TypeVar("T")

MAX_RECORD_BYTES: Final = 256 * 2**20
"""Maximum size of a record: a line of JSON lines, an element of a JSON list, a JSON member of a tar."""

_MAX_REASON = 200
_HALF_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")

# Content that is often found instead of the expected one: (kind, first bytes, problem, hint).
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
    """Return (problem, hint) if a file is a Git LFS pointer, an archive, a web page, ...; None if not.

    head: first bytes of the file; at least 64, or 512 to detect tar.
    kind: expected content: "zip", "gzip", "parquet" or "tar"; empty for text.
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
    """Convert any exception that a library raises while it reads `file` to `error`, with the original as the cause.

    Wrap only the call of the library, so that bugs of our own code keep their traceback. The error names unexpected
    content, see `foreign_content`. A VilaError is not converted.
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
    """Parse JSON. Raises `error` with file and record for invalid JSON.

    unique_keys: reject objects with repeated keys.
    surrogates:  accept strings with unpaired surrogates (text cut inside an emoji), which tokenizers reject.
    Also rejected: text that is not UTF-8 (a byte order mark is skipped), nesting beyond Python's recursion limit, and
    integers with more than 4,300 digits.
    """

    def refuse(problem: str, hint: str | None = None, cause: Exception | None = None) -> VilaError:
        found = error(problem, file=file, record=record, hint=hint)
        found.__cause__ = cause
        return found

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            visited: set[str] = set()
            for key, _ in pairs:
                if key in visited:
                    raise refuse(f"key {key!r} occurs twice in one object", "remove one of them")
                visited.add(key)
        return value

    if isinstance(raw, bytes):
        if raw and (known := foreign_content(raw[:64])):
            raise refuse(*known)
        if b"\0" in raw[:64]:
            raise refuse("contains zero bytes: UTF-16 text, or a damaged file", "save it as UTF-8")
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
        raise refuse("not supported JSON (nested too deeply)", cause=cause) from cause
    except VilaError:
        raise
    except ValueError as cause:  # an integer of more than 4,300 digits
        raise refuse(f"not supported JSON ({cause})", cause=cause) from cause
    if not surrogates and _HALF_ESCAPED.search(raw) and (text := lone_surrogate(value)) is not None:
        raise refuse(
            f"unpaired surrogate in the text {text!r}", "the text was cut inside a character; remove the rest of it"
        )
    return value


def lone_surrogate(value: Any) -> str | None:
    """Return the first string of a JSON value (keys included) with an unpaired surrogate, or None.

    The string is cut to 40 characters around it. Such text cannot be encoded as UTF-8 or tokenized.
    """
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError as error:
                return item[max(0, error.start - 20) : error.start + 20]
        elif isinstance(item, dict):
            stack += item.keys()
            stack += item.values()
        elif isinstance(item, list):
            stack += item
    return None


def read_text(path: Path, error: type[VilaError] = DataError) -> str:
    """Read UTF-8 text without its byte order mark. Raises `error` with the file's name."""
    with file_errors(path, error):
        raw = path.read_bytes()
        if raw and (known := foreign_content(raw[:512])):
            raise error(known[0], file=path, hint=known[1])
        return raw.decode("utf-8-sig")


def read_json(path: Path, error: type[VilaError] = DataError, *, surrogates: bool = False) -> Any:
    """Read a JSON file. Raises `error` with the file's name if it is missing or invalid, see `parse_json`."""
    with file_errors(path, error):
        raw = path.read_bytes()
    return parse_json(raw, file=path, error=error, surrogates=surrogates)


def read_json_object(path: Path, error: type[VilaError] = DataError) -> dict[str, Any]:
    """Read a JSON file that contains an object. Raises `error` as `read_json`, and for any other type."""
    value = read_json(path, error)
    if not isinstance(value, dict):
        raise error("not a JSON object", file=path, value=value, expected="an object ({...})")
    return value


def read_jsonl(
    path: Path, error: type[VilaError] = DataError, *, appended: bool = False, surrogates: bool = False
) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of JSON lines; empty lines are skipped. Raises `error` with file and line.

    appended: whether the file is a log of ours; an incomplete last line (after a kill) is then skipped.
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
    """Yield (line number from 1, line). Raises `error` for lines longer than `MAX_RECORD_BYTES`.

    reading: arguments `kind` and `hint` of `file_errors`.
    """
    number = 0
    while True:
        number += 1
        record = f"line {number}"
        with file_errors(file, error, record=record, **reading):
            line = stream.readline(MAX_RECORD_BYTES + 1)
        if len(line) > MAX_RECORD_BYTES:
            raise error(
                "the line is too long",
                file=file,
                record=record,
                expected=f"at most {MAX_RECORD_BYTES:,} bytes",
                hint="write one record per line",
            )
        if not line:
            return
        yield number, line


class Fields(Mapping[str, Any]):
    """A JSON object of a file, whose accessors check type and range of its values.

    file:  the file.
    name:  dotted name of the object inside the file; empty for the whole file.
    error: class of the errors, which have file, dotted field, value and the accepted values.

    As a mapping, it has the unchecked values. For missing values and null, accessors return `default`, or raise `error`
    if there is none. NaN and infinity are out of range; bools are not numbers. Return types ignore a default of None.
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
        """Read a JSON file that contains an object. Raises `error` as `read_json_object`."""
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
        """Return the error for the value of `key`, or for a missing key."""
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
        expected = f"an integer from {minimum:,} to {maximum:,}"
        return self._checked(int, key, default, expected, lambda value: _is_int(value) and minimum <= value <= maximum)

    def number(self, key: str, default: Any = MISSING, *, minimum: float = 0.0, maximum: float = 1e9) -> float:
        """Return an integer or float from `minimum` to `maximum`."""
        expected = f"a number from {minimum:g} to {maximum:g}"
        return self._checked(float, key, default, expected, lambda value: _in_range(value, minimum, maximum))

    def numbers(
        self, key: str, default: Any = MISSING, *, length: int, minimum: float = 0.0, maximum: float = 1e9
    ) -> tuple[float, ...]:
        """Return a tuple of `length` numbers from `minimum` to `maximum`."""

        def is_accepted(value: Any) -> bool:
            return len(value) == length and all(_in_range(item, minimum, maximum) for item in value)

        expected = f"a list of {length} numbers from {minimum:g} to {maximum:g}"
        value = self._checked(list, key, default, expected, is_accepted)
        return tuple(value) if isinstance(value, list) else value

    def flag(self, key: str, default: Any = MISSING) -> bool:
        """Return true or false."""
        return self._checked(bool, key, default, "true or false")

    def text(self, key: str, default: Any = MISSING, *, choices: Sequence[str] = ()) -> str:
        """Return text, one of `choices` if given."""
        expected = "one of " + ", ".join(choices) if choices else "text"
        return self._checked(str, key, default, expected, lambda value: not choices or value in choices)

    def texts(self, key: str, default: Any = MISSING) -> list[str]:
        """Return a list of texts."""
        return self._checked(
            list, key, default, "a list of texts", lambda value: all(isinstance(item, str) for item in value)
        )

    def section(self, key: str) -> Fields:
        """Return the object at `key`; an empty one if it is missing or null."""
        value = self._checked(dict, key, {}, "an object ({...})")
        return Fields(value, self.file, self.field(key), self._error)

    @contextmanager
    def naming(self, names: Mapping[str, str] | None = None) -> Iterator[None]:
        """Context manager: add file and dotted field to errors without a file.

        names: keys of this object by the field names of those errors, where they differ.
        """
        try:
            yield
        except VilaError as error:
            if error.file is None:
                error.file = str(self.file)
                if error.field:
                    error.field = self.field((names or {}).get(error.field, error.field))
            raise

    def without(self, *keys: str) -> Fields:
        """Return a copy without `keys`."""
        values = {key: value for key, value in self._values.items() if key not in keys}
        return Fields(values, self.file, self.name, self._error)

    def _checked(
        self,
        kind: type[T],
        key: str,
        default: Any,
        expected: str,
        is_accepted: Callable[[Any], bool] = lambda value: True,
    ) -> T:
        """Return a value of the given type. An integer is accepted as a float, if `is_accepted` does."""
        value: Any = self._values.get(key)
        if value is None and default is not MISSING:
            value = default
        elif not isinstance(value, (int, float) if kind is float else kind) or not is_accepted(value):
            raise self.refusal(key, expected=expected)
        return cast(T, value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _in_range(value: Any, minimum: float, maximum: float) -> bool:
    return (_is_int(value) or isinstance(value, float)) and minimum <= value <= maximum
