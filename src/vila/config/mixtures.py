"""Expand named mixtures: `{mixture: NAME}` and `a+b*2` in `data.mixture` are replaced by the data sets they name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vila.core.errors import ConfigError, near_names

Loc = tuple[str | int, ...]
_KEYS = {"mixture", "repeat", "weight"}


def expand_mixtures(tree: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[Loc, Loc], list[ConfigError]]:
    """Return a recipe's plain data with `data.mixture` as a flat list, where its items were written, and all problems.

    `{mixture: NAME, repeat: r}` multiplies the repeats of the named data sets by r; `{mixture: NAME, weight: w}`
    distributes w over them in proportion to their own weights. Unused data sets of `data.mixtures` stay, so that they
    are validated too. Values of a wrong type stay as they are, for the validation of the schema.
    """
    data = tree.get("data")
    known = data.get("mixtures", {}) if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(known, Mapping):
        return tree, {}, []
    mixture: Any = data.get("mixture")
    if isinstance(mixture, str) and known:
        try:
            mixture = _parse_sum(mixture)
        except ConfigError as problem:
            return tree, {}, [problem]
    problems: list[ConfigError] = []
    used: set[str] = set()
    changed = dict(data)
    written_at: dict[Loc, Loc] = {}
    if isinstance(mixture, (list, tuple)):
        flat = _flat(mixture, ("data", "mixture"), known, (), used, problems)
        changed["mixture"] = [entry for _, entry in flat]
        written_at |= {("data", "mixture", index): loc for index, (loc, _) in enumerate(flat)}
    rest = {}
    for name in (name for name in known if name not in used):
        loc: Loc = ("data", "mixtures", name)
        flat = _flat(known[name], loc, known, (name,), set(), problems)
        own = [(entry_loc, entry) for entry_loc, entry in flat if entry_loc[:3] == loc]
        rest[name] = [entry for _, entry in own] if isinstance(known[name], (list, tuple)) else known[name]
        written_at |= {(*loc, index): entry_loc for index, (entry_loc, _) in enumerate(own) if len(entry_loc) > 3}
    if known:
        changed["mixtures"] = rest
    return {**tree, "data": changed}, written_at, list({str(problem): problem for problem in problems}.values())


def _parse_sum(text: str) -> list[dict[str, Any]]:
    """Parse `a+b*2` into mixture entries."""
    entries: list[dict[str, Any]] = []
    for term in text.split("+"):
        name, star, factor = (part.strip() for part in term.partition("*"))
        try:
            entries.append({"mixture": name, "repeat": float(factor)} if star else {"mixture": name})
        except ValueError:
            raise ConfigError(field="data.mixture", value=term.strip(), expected="NAME*NUMBER") from None
    return entries


def _flat(
    entries: Any,
    loc: Loc,
    known: Mapping[str, Any],
    above: tuple[str, ...],
    used: set[str],
    problems: list[ConfigError],
) -> list[tuple[Loc, Any]]:
    """Return every data set below `entries` with its location. above: names of the enclosing mixtures."""
    if not isinstance(entries, (list, tuple)):
        return [(loc, entries)]
    out: list[tuple[Loc, Any]] = []
    for index, entry in enumerate(entries):
        entry_loc = (*loc, index)
        if not (isinstance(entry, Mapping) and "mixture" in entry):
            out.append((entry_loc, entry))
            continue
        field = ".".join(map(str, entry_loc))
        try:
            name = _name(entry, known, above, field)
            inner = _flat(known[name], ("data", "mixtures", name), known, (*above, name), used, problems)
            out += _scaled(inner, entry, field)
            used.add(name)
        except ConfigError as problem:
            problems.append(problem)
    return out


def _name(entry: Mapping[str, Any], known: Mapping[str, Any], above: tuple[str, ...], field: str) -> str:
    """Return the name of a mixture entry after checking its keys and values."""
    name = entry["mixture"]
    if unknown := sorted(map(str, entry.keys() - _KEYS)):
        raise ConfigError("unknown key", field=f"{field}.{unknown[0]}", hint=f"known keys: {', '.join(sorted(_KEYS))}")
    if name not in known:
        near = near_names(str(name), map(str, known), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
        raise ConfigError("unknown mixture", field=field, value=name, hint=hint)
    if name in above:
        raise ConfigError(f"circular mixtures ({' -> '.join((*above[above.index(name) :], name))})", field=field)
    if "repeat" in entry and "weight" in entry:
        raise ConfigError("give repeat or weight, not both", field=field)
    for key in ("repeat", "weight"):
        value = entry.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ConfigError(field=f"{field}.{key}", value=value, expected="a number > 0")
    return str(name)


def _scaled(inner: list[tuple[Loc, Any]], entry: Mapping[str, Any], field: str) -> list[tuple[Loc, Any]]:
    """Apply `repeat` or `weight` of a mixture entry to its data sets."""
    weights: list[Any] = [data_set.get("weight") for _, data_set in inner if isinstance(data_set, Mapping)]
    if "repeat" not in entry and "weight" not in entry:
        return inner
    if "repeat" in entry:
        if any(weights):
            raise ConfigError(f"the data sets of {entry['mixture']!r} have weights", field=field, hint="give a weight")
        return [(loc, _times(data_set, "repeat", entry["repeat"])) for loc, data_set in inner]
    if not all(isinstance(weight, (int, float)) for weight in weights):
        raise ConfigError(f"not all data sets of {entry['mixture']!r} have a weight", field=field, hint="give a repeat")
    return [(loc, _times(data_set, "weight", entry["weight"] / sum(weights))) for loc, data_set in inner]


def _times(data_set: Any, key: str, factor: float) -> Any:
    own = data_set.get(key, 1.0) if isinstance(data_set, Mapping) else None
    return {**data_set, key: own * factor} if isinstance(own, (int, float)) else data_set
