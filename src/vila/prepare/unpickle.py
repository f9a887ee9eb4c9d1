"""Reading a pickle from elsewhere without running anything: plain values only, checked before they are built.

Pickles are programs. Two fences: the instructions are read first, and only those that make plain values are let
through; then the reader itself finds no name, whatever the file asks for.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, NoReturn

from vila.core.errors import DataError

_MAX_DEPTH = 100
_MAX_VALUES = 50_000_000
_CONTROL = ("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP")
_MEMORY = ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET")
_NUMBERS = ("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT")
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING")
_BYTES = ("BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_LISTS = ("EMPTY_LIST", "APPEND", "APPENDS", "LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_DICTS = ("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS")
_PLAIN = frozenset(_CONTROL + _MEMORY + _NUMBERS + _TEXTS + _BYTES + _LISTS + _DICTS)
_NAMING = ("GLOBAL", "STACK_GLOBAL", "INST")
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


class _PlainReader(pickle.Unpickler):
    """Finds nothing by name and keeps nothing by reference."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("asks for a persistent object")


def read_plain_pickle(path: Path) -> Any:
    """The value in a pickle made of None, bool, int, float, str, bytes, bytearray, list, tuple and dict.

    Raises DataError naming the file and the first other thing that it asks for; nothing of it is run. Also for files
    that are cut short. A file is read whole: a shard of the original fits in memory.
    """
    content = path.read_bytes()
    _check(content, path)
    try:
        value = _PlainReader(io.BytesIO(content)).load()
    except MemoryError:
        raise
    except Exception as error:  # a program that is broken on purpose may fail in any way
        raise DataError(f"{path}: not a plain pickle ({error}); get the file from its source again") from error
    _check_depth(value, path)
    return value


def _check(content: bytes, path: Path) -> None:
    strings: list[str] = []
    puts = 0
    try:
        for opcode, argument, position in pickletools.genops(content):
            if opcode.name in _PUTS:
                # An index far beyond the number of values would make the reader set aside that much memory.
                if not isinstance(argument, int) or argument > puts + 256:
                    raise DataError(f"{path}: byte {position} stores a value under number {argument}; refused")
                puts += 1
            elif opcode.name in _NAMING:
                name = argument if isinstance(argument, str) else " ".join(strings[-2:])
                raise DataError(
                    f"{path}: asks for {name.replace(' ', '.')!r}; only plain values are read, nothing runs"
                )
            elif opcode.name not in _PLAIN:
                raise DataError(f"{path}: instruction {opcode.name} at byte {position}; only plain values are read")
            if isinstance(argument, str) and "UNICODE" in opcode.name:
                strings = [*strings[-1:], argument[:100]]
    except (ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a whole pickle ({error}); get the file from its source again") from error


def _check_depth(value: Any, path: Path) -> None:
    """Refuse what contains itself, is nested so deep that others would fail on it, or is endless when written out."""
    level = {id(value): (value, 1)}
    seen = 0
    for _ in range(_MAX_DEPTH):
        following: dict[int, tuple[Any, int]] = {}
        for one, times in level.values():
            inner = one.values() if isinstance(one, dict) else one if isinstance(one, (list, tuple)) else ()
            # A list of twice the same list, and so on, is small here and endless as JSON.
            seen += len(inner) * times
            for part in inner:
                if isinstance(part, (dict, list, tuple)):
                    following[id(part)] = (part, following.get(id(part), (part, 0))[1] + times)
        if seen > _MAX_VALUES:
            raise DataError(f"{path}: over {_MAX_VALUES:,} values; refused")
        if not following:
            return
        level = following
    raise DataError(f"{path}: nested over {_MAX_DEPTH} levels, or without end; refused")
