"""Restricted unpickling: plain values, and calls of listed names only.

A pickle is a program. No name in a file is imported or called unless it is listed, and memory is bounded by a multiple
of the file size.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from os import PathLike
from typing import Any, BinaryIO, ClassVar, Final, NoReturn

from vila.core.errors import VilaError
from vila.core.reading import file_errors

_REFUSED: Final = (
    *("INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"),
    *("EMPTY_SET", "ADDITEMS", "FROZENSET"),
)
_COUNTED: Final = ("EMPTY_LIST", "EMPTY_DICT", "LIST", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "REDUCE", "NEWOBJ")
MAX_OBJECTS: Final = 10_000_000
"""Maximum number of containers, calls and memo entries; each needs one byte in the file and 50 to 150 in memory."""
_MAX_NESTED_MARKS: Final = 10_000
_PLAIN_KEYS: Final = (str, int, float, bool, bytes, type(None))
_HINT: Final = "no code of it was run; get the file from a source that you trust"


class ForbiddenPickleError(pickle.UnpicklingError):
    """A pickle contains something that its reader does not allow. request: the instruction, class or function."""

    def __init__(self, request: str) -> None:
        super().__init__(f"asks for {request}")
        self.request = request


# The unpickler in Python, because that in C does not allow to replace instructions. Its memo is a dictionary, so an
# index of 4 billion takes no memory, unlike in C.
_Unpickler: Any = pickle._Unpickler


class RestrictedUnpickler(_Unpickler):  # type: ignore[misc] # typed without its bases
    """Unpickler for None, bool, int, float, str, bytes, bytearray, list, tuple and dict; raises for everything else.

    names: (module, name) -> object, for the names that the file may use (GLOBAL).
    Subclasses may override `persistent_load`, `build` and `is_key`.
    """

    dispatch: ClassVar = dict(_Unpickler.dispatch)

    def __init__(self, stream: BinaryIO, names: Mapping[tuple[str, str], Any] | None = None) -> None:
        super().__init__(stream)
        self._names = names or {}
        self._objects = 0

    def find_class(self, module: str, name: str) -> Any:
        """Return the listed object; never imports."""
        if (module, name) not in self._names:
            raise ForbiddenPickleError(f"{module}.{name}")
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Reject references to objects outside of the pickle."""
        raise ForbiddenPickleError("a persistent object")

    def build(self, instance: Any, state: Any) -> None:
        """Reject setting attributes of `instance`."""
        raise ForbiddenPickleError(f"attributes of {_name_of(instance)}")

    def is_key(self, value: Any) -> bool:
        """Return whether a dictionary may have this key. Hashing a deeply nested tuple would crash the process."""
        return type(value) in _PLAIN_KEYS

    def _count(self) -> None:
        self._objects += 1
        if self._objects > MAX_OBJECTS:
            raise ForbiddenPickleError(f"more than {MAX_OBJECTS:,} objects")

    def _load_mark(self) -> None:
        if len(self.metastack) > _MAX_NESTED_MARKS:
            raise ForbiddenPickleError(f"more than {_MAX_NESTED_MARKS:,} levels")
        super().load_mark()

    def _load_build(self) -> None:
        state = self.stack.pop()
        self.build(self.stack[-1], state)

    def _load_setitem(self) -> None:
        value = self.stack.pop()
        self._fill([self.stack.pop(), value])

    def _load_setitems(self) -> None:
        self._fill(self.pop_mark())

    def _load_dict(self) -> None:
        self._count()
        items = self.pop_mark()
        self.append({})
        self._fill(items)

    def _fill(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise ForbiddenPickleError(f"items of {_name_of(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not self.is_key(key):
                raise ForbiddenPickleError(f"a {type(key).__name__} as key")
            target[key] = value

    def _load_bytearray(self) -> None:
        # The inherited method allocates the given size before it reads.
        size = int.from_bytes(self.read(8), "little")
        content = self.read(size)
        if len(content) < size:
            raise EOFError
        self.append(bytearray(content))

    dispatch[pickle.MARK[0]] = _load_mark
    dispatch[pickle.BUILD[0]] = _load_build
    dispatch[pickle.SETITEM[0]] = _load_setitem
    dispatch[pickle.SETITEMS[0]] = _load_setitems
    dispatch[pickle.DICT[0]] = _load_dict
    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray


def _counted(load: Any) -> Any:
    def counted(self: RestrictedUnpickler) -> None:
        self._count()
        load(self)

    return counted


def _refusal(name: str) -> Any:
    def refuse(self: RestrictedUnpickler) -> NoReturn:
        raise ForbiddenPickleError(f"instruction {name}")

    return refuse


for _name in _REFUSED:
    RestrictedUnpickler.dispatch[getattr(pickle, _name)[0]] = _refusal(_name)
for _name in _COUNTED:
    _code = getattr(pickle, _name)[0]
    RestrictedUnpickler.dispatch[_code] = _counted(_Unpickler.dispatch[_code])


def _name_of(value: Any) -> str:
    """Return the name of a class, or of the class of a value, whose repr may be huge."""
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def load_restricted(
    reader: RestrictedUnpickler,
    *,
    file: str | PathLike[str],
    error: type[VilaError],
    expected: str = "plain values",
    hint: str | None = None,
    kind: str = "",
) -> Any:
    """Return the value of a pickle. Raises `error` with the file's name if it contains anything else.

    expected: the allowed values, for the error, whose `value` is the rejected name.
    kind:     expected content of the file, see `foreign_content`.
    """
    with file_errors(file, error, hint=hint or "it is damaged or cut short; copy or download it again", kind=kind):
        try:
            return reader.load()
        except ForbiddenPickleError as cause:
            raise error(
                "not unpickled, because that can run code",
                file=file,
                value=cause.request,
                expected=expected,
                hint=hint or _HINT,
            ) from cause


def parse_plain_pickle(content: bytes, *, file: str | PathLike[str], error: type[VilaError]) -> Any:
    """Return the plain value of a pickle. Raises `error` as `load_restricted`, and for bytes after its end."""
    stream = io.BytesIO(content)
    value = load_restricted(RestrictedUnpickler(stream), file=file, error=error)
    if surplus := len(content) - stream.tell():
        raise error(f"{surplus} bytes after the end of the pickle", file=file, hint="copy or download it again")
    return value
