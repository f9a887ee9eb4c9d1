"""Named mixtures: `{mixture: name}` and `a+b*2` become the data sets that they stand for; then a recipe is checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vila.core.errors import near_names

Loc = tuple[str | int, ...]
_KEYS = {"mixture", "repeat", "weight"}


class _Problem(Exception):
    """One line about a mixture that cannot be put in its place."""


def expand_mixtures(tree: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[Loc, Loc], list[str]]:
    """A recipe's plain data with `data.mixture` as a flat list, where the user wrote its items, and all problems.

    `{mixture: name, repeat: r}` multiplies the repeats of what it stands for by r; `{mixture: name, weight: w}` divides
    w among them by their own weights. Of `data.mixtures` only the data sets that are not in use are left, so that they
    are checked too. Anything of the wrong type is left for the check of the schema.
    """
    data = tree.get("data")
    known = data.get("mixtures", {}) if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(known, Mapping):
        return tree, {}, []
    mixture: Any = data.get("mixture")
    if isinstance(mixture, str) and known:
        try:
            mixture = _parse_sum(mixture)
        except _Problem as problem:
            return tree, {}, [f"data.mixture: {problem}"]
    problems: list[str] = []
    used: set[str] = set()
    changed = dict(data)
    origins: dict[Loc, Loc] = {}
    if isinstance(mixture, (list, tuple)):
        flat = _flat(mixture, ("data", "mixture"), known, (), used, problems)
        changed["mixture"] = [entry for _, entry in flat]
        origins |= {("data", "mixture", number): loc for number, (loc, _) in enumerate(flat)}
    rest = {}
    for name in (name for name in known if name not in used):
        loc: Loc = ("data", "mixtures", name)
        flat = _flat(known[name], loc, known, (name,), set(), problems)
        own = [(place, entry) for place, entry in flat if place[:3] == loc]
        # What is no list stays what it is.
        rest[name] = [entry for _, entry in own] if isinstance(known[name], (list, tuple)) else known[name]
        origins |= {(*loc, number): place for number, (place, _) in enumerate(own) if len(place) > 3}
    if known:
        changed["mixtures"] = rest
    return {**tree, "data": changed}, origins, list(dict.fromkeys(problems))


def _parse_sum(text: str) -> list[dict[str, Any]]:
    """`a+b*2` as entries."""
    entries: list[dict[str, Any]] = []
    for term in text.split("+"):
        name, star, factor = (part.strip() for part in term.partition("*"))
        try:
            entries.append({"mixture": name, "repeat": float(factor)} if star else {"mixture": name})
        except ValueError:
            raise _Problem(f"{term.strip()!r}: {factor!r} is not a number; write name*2") from None
    return entries


def _flat(
    entries: Any, loc: Loc, known: Mapping[str, Any], above: tuple[str, ...], used: set[str], problems: list[str]
) -> list[tuple[Loc, Any]]:
    """Every data set below `entries`, with the place where it is written."""
    out: list[tuple[Loc, Any]] = []
    if not isinstance(entries, (list, tuple)):
        return [(loc, entries)]
    for number, entry in enumerate(entries):
        here = (*loc, number)
        if not (isinstance(entry, Mapping) and "mixture" in entry):
            out.append((here, entry))
            continue
        try:
            name = _name(entry, known, above)
            inner = _flat(known[name], ("data", "mixtures", name), known, (*above, name), used, problems)
            out += _scaled(inner, entry)
            used.add(name)
        except _Problem as problem:
            problems.append(f"{'.'.join(map(str, here))}: {problem}")
    return out


def _name(entry: Mapping[str, Any], known: Mapping[str, Any], above: tuple[str, ...]) -> str:
    name = entry["mixture"]
    if unknown := sorted(map(str, entry.keys() - _KEYS)):
        raise _Problem(f"beside mixture only repeat or weight may stand, not {', '.join(unknown)}")
    if name not in known:
        near = near_names(str(name), map(str, known), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
        raise _Problem(f"no mixture {name!r} in data.mixtures; {hint}")
    if name in above:
        raise _Problem(f"mixtures go round in a circle: {' -> '.join((*above[above.index(name) :], name))}")
    if "repeat" in entry and "weight" in entry:
        raise _Problem("give repeat or weight, not both")
    for key in ("repeat", "weight"):
        value = entry.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise _Problem(f"{key}: got {value!r}, expected a number > 0")
    return str(name)


def _scaled(inner: list[tuple[Loc, Any]], entry: Mapping[str, Any]) -> list[tuple[Loc, Any]]:
    weights: list[Any] = [data_set.get("weight") for _, data_set in inner if isinstance(data_set, Mapping)]
    if "repeat" not in entry and "weight" not in entry:
        return inner
    if "repeat" in entry:
        if any(weights):
            raise _Problem(f"the data sets of {entry['mixture']!r} have weights, which repeat cannot multiply")
        return [(loc, _times(data_set, "repeat", entry["repeat"])) for loc, data_set in inner]
    if not all(isinstance(weight, (int, float)) for weight in weights):
        raise _Problem(f"weight needs a weight on every data set of {entry['mixture']!r}")
    return [(loc, _times(data_set, "weight", entry["weight"] / sum(weights))) for loc, data_set in inner]


def _times(data_set: Any, key: str, factor: float) -> Any:
    own = data_set.get(key, 1.0) if isinstance(data_set, Mapping) else None
    return {**data_set, key: own * factor} if isinstance(own, (int, float)) else data_set
