"""Layers of a recipe: the files that it extends, itself, and overrides; where a later layer excludes what an earlier
one says, and which layer each value is from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

COMMAND_LINE = "the command line"
"""Name of the layer of overrides."""

_EXCLUSIVE: tuple[tuple[str, str], ...] = (
    ("model.path", "model.llm"),
    ("model.path", "model.vision"),
    ("batch.rows", "batch.samples"),
    ("budget.epochs", "budget.tokens"),
    ("data.mixture.N.repeat", "data.mixture.N.weight"),
)
"""Fields of which one alone may be given: the later layer's stays."""


def _no_vision(tune: Any) -> Any:
    return [part for part in tune if part != "vision"] if isinstance(tune, (list, tuple)) else tune


_GIVES_WAY: tuple[tuple[str, Callable[[Any], bool], str, Callable[[Any], Any]], ...] = (
    ("stage.lora.rank", bool, "stage.llm_parts", lambda parts: []),
    ("stage.lora.rank", bool, "stage.tune", _no_vision),
    ("stage.tune", lambda tune: _no_vision(tune) != tune, "compute.feature_cache", lambda cache: False),
)
"""A field with a value that has an effect, and an earlier layer's field that gives way to it, changed so. The other way
round is an error: without its adapters, for example, a recipe would train the whole LLM at their rate."""


def give_way(base: dict[str, Any], change: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return `base` without the values that those of the later layer `change` exclude, and their fields.

    In `change` the items of a list may be given by number, as overrides do (`{"mixture": {"0": {"weight": 2}}}`).
    """
    changed: list[str] = []
    for one, other in _EXCLUSIVE:
        for first, second in ((one, other), (other, one)):
            for field, rival in _places(change, first, second):
                if value_at(change, field) and value_at(change, rival) is None and value_at(base, rival):
                    base = _with(base, rival, None)
                    changed.append(rival)
    for field, has_effect, rival, weaken in _GIVES_WAY:
        value, old = value_at(change, field), value_at(base, rival)
        if value is not None and has_effect(value) and value_at(change, rival) is None and old is not None:
            new = weaken(old)
            if new != old:
                base = _with(base, rival, new)
                changed.append(rival)
    return base, changed


def value_at(tree: Any, field: str) -> Any:
    """The value at a dotted field, items of lists by number; None where there is none."""
    for key in field.split("."):
        if isinstance(tree, Mapping):
            tree = tree.get(key)
        elif isinstance(tree, (list, tuple)) and key.isdecimal() and int(key) < len(tree):
            tree = tree[int(key)]
        else:
            return None
    return tree


def fields_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted fields of all values that a layer gives; a list is one value."""
    for key, value in tree.items():
        field = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            yield from fields_of(value, field)
        else:
            yield field


def origin_of(field: str, origins: Mapping[str, str]) -> str | None:
    """The layer that the value of a field is from; of an item of a list, the one that the list is from."""
    keys = field.split(".")
    return next((found for size in range(len(keys), 0, -1) if (found := origins.get(".".join(keys[:size])))), None)


def _places(change: Mapping[str, Any], first: str, second: str) -> Sequence[tuple[str, str]]:
    """The two fields; where they are those of the items of a list, of each item that `change` has by its number."""
    listed, _, _ = first.partition(".N.")
    if listed == first:
        return [(first, second)]
    items = value_at(change, listed)
    numbers = items if isinstance(items, Mapping) else ()
    return [(first.replace(".N.", f".{number}."), second.replace(".N.", f".{number}.")) for number in numbers]


def _with(tree: Any, field: str, value: Any) -> Any:
    """A copy of a tree without the value at a field, or with another one there; None: without."""
    key, _, rest = field.partition(".")
    if isinstance(tree, (list, tuple)):
        return [_with(item, rest, value) if number == int(key) else item for number, item in enumerate(tree)]
    if rest:
        return {**tree, key: _with(tree[key], rest, value)}
    return {**{name: old for name, old in tree.items() if name != key}, **({} if value is None else {key: value})}
