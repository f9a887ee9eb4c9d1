"""From plain data to a Recipe; every problem in words, with its dotted path, the value, and what is expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from vila.config.fields import choices_at, describe_fields, expected_at, known_keys
from vila.config.layers import COMMAND_LINE, origin_of
from vila.config.mixtures import Loc, expand_mixtures
from vila.config.schema import Conflict, Recipe
from vila.core.errors import near_names

_LONGEST_VALUE = 80


def check_recipe(tree: Mapping[str, Any], layers: Mapping[str, str] | None = None) -> tuple[Recipe | None, list[str]]:
    """The recipe that `tree` states and no problems, or None and every problem found.

    layers: the name of the recipe or file that each field is from, for problems between several fields.

    A misspelt key is reported and then read as the key it resembles, so that one typing error neither hides
    the problems behind it nor shows up a second time as a missing field.
    """
    tree, origins, problems = expand_mixtures(tree)
    if problems:
        return None, problems
    while True:
        try:
            recipe = Recipe.model_validate(tree)
        except ValidationError as error:
            faults = error.errors(include_url=False)
        else:
            return (None, problems) if problems else (_without_mixtures(recipe), [])
        unknown = [fault["loc"] for fault in faults if fault["type"] == "extra_forbidden"]
        if not unknown:
            # To pydantic a list with wrong items is "too short" as well: of problems on one path the deepest counts.
            inner = {fault["loc"][:depth] for fault in faults for depth in range(len(fault["loc"]))}
            problems += [_problem(fault, origins, layers or {}) for fault in faults if fault["loc"] not in inner - {()}]
            return None, list(dict.fromkeys(problems))
        for loc in unknown:
            near = near_names(str(loc[-1]), known_keys(loc[:-1]), 1)
            problems.append(f"{dotted(_written(loc, origins))}: unknown key; {_hint(loc, near)}")
            tree = _renamed(tree, loc, near)


def dotted(loc: Sequence[str | int]) -> str:
    """`data.mixture.0.path`."""
    return ".".join(map(str, loc))


def quoted(value: Any) -> str:
    """The value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _hint(loc: Sequence[str | int], near: list[str]) -> str:
    """Near key of the same section, else the same key of other sections, else the keys that the section has."""
    elsewhere = [path for path, *_ in describe_fields() if path.rsplit(".", 1)[-1] == loc[-1]]
    if near or elsewhere:
        return f"did you mean {' or '.join(map(repr, near or elsewhere))}?"
    return f"known here: {', '.join(known_keys(loc[:-1]))}"


def _written(loc: Loc, origins: Mapping[Loc, Loc]) -> Loc:
    """Where the user wrote what stands at `loc` after mixtures were put in their places."""
    for length in (3, 4):
        if loc[:length] in origins:
            return (*origins[loc[:length]], *loc[length:])
    return loc


def _without_mixtures(recipe: Recipe) -> Recipe:
    """The recipe without the named mixtures: those in use are part of `data.mixture` by now."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"mixtures": {}})})


def _problem(fault: Mapping[str, Any], origins: Mapping[Loc, Loc], layers: Mapping[str, str]) -> str:
    loc, value = fault["loc"], fault["input"]
    shown = dotted(_written(loc, origins))
    if fault["type"] == "value_error":
        error = fault["ctx"]["error"]
        text = f"{error}{_sources(error, shown, layers)}"
        return f"{shown}: {text}" if loc else text
    expected = expected_at(loc)
    if fault["type"] == "missing":
        return f"{shown}: missing; expected {expected}"
    if expected in ("text", "a path") and isinstance(value, bool | int | float):
        expected += "; put it in quotes"
    near = near_names(value, choices_at(loc), 1) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{shown}: got {quoted(value)}, expected {expected}{hint}"


def _sources(error: Exception, shown: str, layers: Mapping[str, str]) -> str:
    """The recipes that the values of a conflict are from, ` (stage.tune is from my.yaml)`; empty if that is plain."""
    if not isinstance(error, Conflict):
        return ""
    fields = [f"{shown}.{field}" if shown else field for field in error.fields]
    found = {field: layer for field in fields if (layer := origin_of(field, layers))}
    if len(set(layers.values())) < 2 or set(found.values()) <= {COMMAND_LINE}:
        return ""
    return f" ({', '.join(f'{field} is from {layer}' for field, layer in found.items())})"


def _renamed(tree: Any, loc: Sequence[str | int], near: list[str]) -> Any:
    """A copy of `tree` without the key at `loc`, its value moved to the near key unless that is there already."""
    key, *rest = loc
    if rest:
        return with_item(tree, key, _renamed(tree[key], rest, near))
    kept = {name: value for name, value in tree.items() if name != key}
    return {**{name: tree[key] for name in near}, **kept}


def with_item(tree: Any, key: str | int, value: Any) -> Any:
    """A copy of a list or mapping with one item set; copies, because YAML aliases may share a part between places."""
    if isinstance(tree, list):
        return [value if index == key else item for index, item in enumerate(tree)]
    return {**tree, key: value}
