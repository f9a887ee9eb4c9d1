"""Values of JSON objects, read with a check of their type and range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from vila.core.errors import MISSING, DataError, VilaError
from vila.core.reading import read_json_object


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
