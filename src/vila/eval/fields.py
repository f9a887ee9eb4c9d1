"""Fields of annotation files that hold another kind of value than they should, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WORDS = {str: "text", int: "a whole number", list: "a list", dict: "a mapping", type(None): "nothing"}


def odd_field(row: Mapping[str, Any], /, **kinds: type | tuple[type, ...]) -> str:
    """The first of the fields that `row` has with a value of none of its kinds: "image is 5; expected text"; or ""."""
    for name, kind in kinds.items():
        if name in row and (not isinstance(row[name], kind) or isinstance(row[name], bool)):
            wanted = kind if isinstance(kind, tuple) else (kind,)
            return f"{name} is {str(row[name])[:60]!r}; expected {' or '.join(_WORDS[each] for each in wanted)}"
    return ""


def readable_humans(humans: Any) -> bool:
    """Whether the answers of several humans are there: `[{"answer": "net"}, ...]`."""
    return (
        isinstance(humans, list)
        and bool(humans)
        and all(isinstance(human, dict) and isinstance(human.get("answer"), str) for human in humans)
    )
