"""Registry of named objects, each imported on first use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Generic, TypeVar, cast

from vila.core.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Mapping from names to `"module:attribute"` strings; a lookup imports the module. `kind` names it in errors."""

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> T:
        """Import and return the object registered as `name`. Raises UnknownNameError with near matches."""
        if name not in self._entries:
            raise UnknownNameError(self.kind, name, self._entries)
        return cast(T, getattr(import_module(self.module(name)), self._entries[name].partition(":")[2]))

    def module(self, name: str) -> str:
        """Return the name of the module with a registered object."""
        return self._entries[name].partition(":")[0]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
