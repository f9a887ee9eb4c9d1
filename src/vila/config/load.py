"""Load recipes: packaged or own YAML files, `extends`, overrides and validation; save and compare recipes.

The files that a recipe extends, the recipe itself and the overrides are layers. A later layer replaces values of an
earlier one; of fields that exclude each other, the one of the later layer is used (`exclude`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vila.config.field_docs import choices_at, describe_fields, expected_at, known_keys
from vila.config.mixtures import Loc, expand_mixtures
from vila.config.schema import Conflict, Recipe
from vila.core.errors import ConfigError, UnknownNameError, near_names
from vila.core.files import portable_path, write_text

COMMAND_LINE = "the command line"
"""Name of the layer of overrides."""

_EXCLUSIVE: tuple[tuple[str, str], ...] = (
    ("model.path", "model.llm"),
    ("model.path", "model.vision"),
    ("batch.rows", "batch.samples"),
    ("budget.epochs", "budget.tokens"),
    ("data.mixture.N.repeat", "data.mixture.N.weight"),
)
"""Pairs of fields that exclude each other."""


def _without_vision(tune: Any) -> Any:
    return [module for module in tune if module != "vision"] if isinstance(tune, (list, tuple)) else tune


_OVERRULES: tuple[tuple[str, Callable[[Any], bool], str, Callable[[Any], Any]], ...] = (
    ("stage.lora.rank", bool, "stage.llm_parts", lambda parts: []),
    ("stage.lora.rank", bool, "stage.tune", _without_vision),
    ("stage.tune", lambda tune: _without_vision(tune) != tune, "compute.feature_cache", lambda cache: False),
)
"""(field, condition on its value, field of an earlier layer, how that is changed). The reverse is an error: a recipe
that loses its adapters, for example, would train the whole LLM with their learning rate."""

_PATH_FIELDS = (
    "model.path", "model.llm", "model.vision", "data.mixture.N.path", "data.mixture.N.image_root",
    "monitor.prompts.N.image", "monitor.eval_data", "output.dir",
)  # fmt: skip
_TEXT_TAG, _TIME_TAG, _MERGE_TAG = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "timestamp", "merge"))


class _Absent:
    """Type of `_ABSENT`."""

    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()
"""Value of a field that a recipe does not have."""


def recipe_names() -> list[str]:
    """Return the names of the packaged recipes, such as `vila_7b/1_align`."""
    folder = _packaged_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def load_recipe(
    name_or_path: str,
    overrides: Sequence[str] = (),
    *,
    notes: list[str] | None = None,
    origins: dict[str, str] | None = None,
) -> Recipe:
    """Load a packaged recipe or a `.yaml` file, resolve `extends`, and apply overrides `KEY=VALUE`.

    `extends` names a packaged recipe or a file relative to the extending one. Mappings are merged; other values, lists
    included, are replaced. The value of an override is YAML; an empty value is empty text.

    notes:   receives a line for each field that a later layer excluded.
    origins: receives the layer of each field, see `origin_of`.
    Raises UnknownNameError for an unknown name, ConfigError for a file that cannot be read or parsed, and one
    ConfigError with all problems otherwise.
    """
    problems: list[ConfigError] = []
    tree: dict[str, Any] = {}
    origins = {} if origins is None else origins
    for label, layer in _read_chain(_find(name_or_path), name_or_path, problems, ()):
        tree = _without_excluded(tree, layer, label, origins, notes)
        tree = _merged(tree, layer)
    tree = _overridden(tree, overrides, origins, problems, notes)
    recipe, invalid = check_recipe(tree, origins)
    if problems or recipe is None:
        raise ConfigError.collect(name_or_path, problems + invalid)
    # The origin of a data set is the file that defines its mixture, not the one that uses the mixture.
    for loc, written in expand_mixtures(tree)[1].items():
        if written[1] == "mixtures" and (origin := origin_of(_dotted(written), origins)):
            origins[_dotted(loc)] = origin
    return recipe


def origin_of(field: str, origins: Mapping[str, str]) -> str | None:
    """Return the layer of a field; for a list item without a layer of its own, the layer of the list."""
    keys = field.split(".")
    return next((found for size in range(len(keys), 0, -1) if (found := origins.get(".".join(keys[:size])))), None)


def recipe_to_yaml(recipe: Recipe, base: Path | None = None) -> str:
    """Return the whole recipe as YAML, defaults included; loading it gives an equal recipe.

    base: directory that absolute paths are written relative to, see `portable_path`.
    """
    return tree_to_yaml(recipe.model_dump(mode="json"), base)


def tree_to_yaml(tree: Any, base: Path | None = None) -> str:
    """Return the YAML text of the plain data of a recipe, in the form of `recipe_to_yaml`."""
    if base is not None:
        tree = _portable(tree, [field.split(".") for field in _PATH_FIELDS], base)
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=False, width=1000))


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the whole recipe to a YAML file, atomically."""
    write_text(path, recipe_to_yaml(recipe))


def recipe_changes(old: Recipe, new: Recipe) -> list[tuple[str, str, str]]:
    """Return (field, old value, new value) of every difference, values as Python literals, in schema order."""
    before, after = (dict(_leaves(recipe.model_dump(mode="json"))) for recipe in (old, new))
    pairs = {path: (before.get(path, _ABSENT), after.get(path, _ABSENT)) for path in [*before, *after]}
    return [(path, repr(was), repr(now)) for path, (was, now) in pairs.items() if was != now]


# Layers


def _find(name: str, base: Path = Path(), kind: str = "recipe") -> Path:
    if name.endswith((".yaml", ".yml")):
        return base / name
    known = recipe_names()
    if name not in known:
        file = [f"{name}.yaml"] if (base / f"{name}.yaml").is_file() else []
        raise UnknownNameError(kind, name, [*known, *file])
    return _packaged_folder() / f"{name}.yaml"


def _packaged_folder() -> Path:
    return Path(str(resources.files("vila.config"))) / "recipes"


def _read_chain(
    path: Path, label: str, problems: list[ConfigError], above: tuple[Path, ...]
) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, content) of the recipes that `path` extends and of itself. above: the files that extend it."""
    resolved = path.resolve()
    if resolved in above:
        names = " -> ".join(file.name for file in (*above[above.index(resolved) :], resolved))
        raise ConfigError(f"circular extends ({names})", file=path, field="extends")
    tree = _read_file(path, problems)
    extended = tree.pop("extends", None)
    if extended is None:
        return [(label, tree)]
    if not isinstance(extended, str):
        problems.append(ConfigError(field="extends", value=extended, expected="the name of a recipe or a path"))
        return [(label, tree)]
    base = _find(extended, path.parent, f"recipe that {path} extends:")
    return [*_read_chain(base, extended, problems, (*above, resolved)), (label, tree)]


def _read_file(path: Path, problems: list[ConfigError]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text (byte {error.start})", file=path) from error
    except OSError as error:
        name = path.with_suffix("").as_posix()
        hint = f"the packaged recipe is named {name!r}" if name in recipe_names() else None
        raise ConfigError(f"cannot be read ({error.strerror})", file=path, hint=hint) from error
    try:
        tree, duplicates = _parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML ({_reason(error)})", file=path, record=_position(error, text)) from error
    problems += [ConfigError(problem, file=path, record=f"line {line}") for line, problem in duplicates]
    if not isinstance(tree, dict):
        raise ConfigError(file=path, value=tree, expected="a mapping of recipe sections")
    return dict(tree)


def _parse_yaml(text: str) -> tuple[Any, list[tuple[int, str]]]:
    """Return the value of a YAML document, and (line, problem) of every repeated key. Raises yaml.YAMLError."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        duplicates: list[tuple[int, str]] = []
        _inspect(node, duplicates, set())
        return loader.construct_document(node), duplicates
    except ValueError as error:  # PyYAML parses `0x_` as a number and then fails to convert it
        raise yaml.YAMLError(str(error)) from error
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    finally:
        loader.dispose()


def _inspect(node: Any, duplicates: list[tuple[int, str]], visited: set[int]) -> None:
    """Find repeated keys; make keys and dates text (no field is a date, and `name: 2024-05-01` is a valid name)."""
    if id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, yaml.ScalarNode) and node.tag == _TIME_TAG:
        node.tag = _TEXT_TAG
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _inspect(item, duplicates, visited)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            _inspect(value, duplicates, visited)
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in first:
                duplicates.append((line, f"key {key.value!r} is given twice, first on line {first[key.value]}"))
            first.setdefault(key.value, line)
            if key.tag != _MERGE_TAG:
                key.tag = _TEXT_TAG


def _position(error: yaml.YAMLError, text: str) -> str | None:
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        return f"line {before.count(chr(10)) + 1} column {len(before) - before.rfind(chr(10))}"
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1} column {mark.column + 1}" if mark else None


def _reason(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)


def _merged(base: Any, change: Any) -> Any:
    """Merge `change` into `base`: mappings key by key, other values replaced."""
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    return {**base, **{key: _merged(base.get(key), value) for key, value in change.items()}}


def _overridden(
    tree: dict[str, Any],
    overrides: Sequence[str],
    origins: dict[str, str],
    problems: list[ConfigError],
    notes: list[str] | None,
) -> dict[str, Any]:
    """Apply all overrides, which are one layer together."""
    parsed: list[tuple[list[str], Any]] = []
    layer: dict[str, Any] = {}
    for override in overrides:
        try:
            keys, value = _parse_override(override)
        except ConfigError as error:
            problems.append(error)
            continue
        parsed.append((keys, value))
        layer = _merged(layer, reduce(lambda inner, key: {key: inner}, reversed(keys), value))
    tree = _without_excluded(tree, layer, COMMAND_LINE, origins, notes)
    for keys, value in parsed:
        try:
            tree = _with_override(tree, keys, value, "")
        except ConfigError as error:
            problems.append(error)
    return tree


def _parse_override(override: str) -> tuple[list[str], Any]:
    """Return keys and value of `DOTTED.KEY=VALUE`. Raises ConfigError."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(field="override", value=override, expected="KEY=VALUE, such as stage.lr=1e-5")
    try:
        value, duplicates = _parse_yaml(text)
    except yaml.YAMLError as error:
        problem = f"the value is not YAML ({_reason(error)})"
        raise ConfigError(problem, field="override", value=override, hint="text may need quotes") from error
    if duplicates:
        raise ConfigError(duplicates[0][1], field="override", value=override)
    return keys, "" if not text.strip() else value


def _with_override(tree: Any, keys: list[str], value: Any, parent: str) -> Any:
    if not keys:
        return _merged(tree, value)
    key, *rest = keys
    path = f"{parent}.{key}" if parent else key
    if isinstance(tree, list):
        if not key.isdecimal() or int(key) >= len(tree):
            raise ConfigError(field=path, value=key, expected=f"an index below {len(tree)}, the length of {parent}")
        return _with_item(tree, int(key), _with_override(tree[int(key)], rest, value, path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{parent} has no keys", field=path, hint=f"its value is {tree!r}")
    return _with_item(tree, key, _with_override(tree.get(key, {}), rest, value, path))


def _without_excluded(
    tree: dict[str, Any], layer: dict[str, Any], label: str, origins: dict[str, str], notes: list[str] | None
) -> dict[str, Any]:
    """Remove what a later layer excludes, and add the fields of that layer to `origins`."""
    tree, changed = exclude(tree, layer)
    for field in changed:
        if notes is not None:
            notes.append(f"{field} of {origin_of(field, origins)} is excluded by {label}")
        origins[field] = label
    origins |= dict.fromkeys(_fields_of(layer), label)
    return tree


def exclude(base: dict[str, Any], change: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return `base` without the values that the later layer `change` excludes, and their fields.

    In `change`, list items may be given by index, as in overrides (`{"mixture": {"0": {"weight": 2}}}`).
    """
    changed: list[str] = []
    for one, other in _EXCLUSIVE:
        for first, second in ((one, other), (other, one)):
            for field, rival in _by_item(change, first, second):
                if _value_at(change, field) and _value_at(change, rival) is None and _value_at(base, rival):
                    base = _with_field(base, rival, None)
                    changed.append(rival)
    for field, applies, rival, weaken in _OVERRULES:
        value, old = _value_at(change, field), _value_at(base, rival)
        if value is not None and applies(value) and _value_at(change, rival) is None and old is not None:
            new = weaken(old)
            if new != old:
                base = _with_field(base, rival, new)
                changed.append(rival)
    return base, changed


def _by_item(change: Mapping[str, Any], first: str, second: str) -> Sequence[tuple[str, str]]:
    """Return the two fields; if they are in list items (`.N.`), once for each item that `change` gives by index."""
    listed, _, _ = first.partition(".N.")
    if listed == first:
        return [(first, second)]
    items = _value_at(change, listed)
    numbers = items if isinstance(items, Mapping) else ()
    return [(first.replace(".N.", f".{number}."), second.replace(".N.", f".{number}.")) for number in numbers]


def _value_at(tree: Any, field: str) -> Any:
    """Return the value at a dotted field, list items by index; None if there is none."""
    for key in field.split("."):
        if isinstance(tree, Mapping):
            tree = tree.get(key)
        elif isinstance(tree, (list, tuple)) and key.isdecimal() and int(key) < len(tree):
            tree = tree[int(key)]
        else:
            return None
    return tree


def _fields_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted fields of all values; a list is one value."""
    for key, value in tree.items():
        field = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            yield from _fields_of(value, field)
        else:
            yield field


def _with_field(tree: Any, field: str, value: Any) -> Any:
    """Return a copy with another value at a dotted field, or without the field if `value` is None."""
    key, _, rest = field.partition(".")
    if isinstance(tree, (list, tuple)):
        return [_with_field(item, rest, value) if index == int(key) else item for index, item in enumerate(tree)]
    if rest:
        return {**tree, key: _with_field(tree[key], rest, value)}
    others = {name: old for name, old in tree.items() if name != key}
    return others if value is None else {**others, key: value}


def _with_item(tree: Any, key: str | int, value: Any) -> Any:
    """Return a copy of a list or mapping with one item set. A copy, because YAML aliases share objects."""
    if isinstance(tree, list):
        return [value if index == key else item for index, item in enumerate(tree)]
    return {**tree, key: value}


# Validation


def check_recipe(
    tree: Mapping[str, Any], origins: Mapping[str, str] | None = None
) -> tuple[Recipe | None, list[ConfigError]]:
    """Validate the plain data of a recipe; return the recipe and no problems, or None and all problems.

    A misspelt key is reported and then read as the key that it resembles: it neither hides other problems nor is
    reported again as a missing field.

    origins: layer of each field, for problems between several fields.
    """
    tree, written_at, problems = expand_mixtures(tree)
    if problems:
        return None, problems
    while True:
        try:
            recipe = Recipe.model_validate(tree)
        except ValidationError as error:
            found = error.errors(include_url=False)
        else:
            return (None, problems) if problems else (_without_mixtures(recipe), [])
        unknown = [one["loc"] for one in found if one["type"] == "extra_forbidden"]
        if not unknown:
            # pydantic also reports a list with invalid items as too short: only the innermost problem of a path counts.
            inner = {one["loc"][:depth] for one in found for depth in range(len(one["loc"]))}
            problems += [_problem(one, written_at, origins or {}) for one in found if one["loc"] not in inner - {()}]
            return None, list({str(problem): problem for problem in problems}.values())
        for loc in unknown:
            near = near_names(str(loc[-1]), known_keys(loc[:-1]), 1)
            problems.append(ConfigError("unknown key", field=_dotted(_written(loc, written_at)), hint=_hint(loc, near)))
            tree = _renamed(tree, loc, near)


def _problem(found: Mapping[str, Any], written_at: Mapping[Loc, Loc], origins: Mapping[str, str]) -> ConfigError:
    """Convert an error of pydantic."""
    loc, value = found["loc"], found["input"]
    field = _dotted(_written(loc, written_at))
    if found["type"] == "value_error":
        error = found["ctx"]["error"]
        return ConfigError(f"{error}{_sources(error, field, origins)}", field=field or None)
    expected = expected_at(loc)
    if found["type"] == "missing":
        return ConfigError("missing", field=field, expected=expected)
    near = near_names(value, choices_at(loc), 1) if isinstance(value, str) else []
    hint = f"did you mean {near[0]!r}?" if near else None
    if expected in ("text", "a path") and isinstance(value, bool | int | float):
        hint = "put it in quotes"
    return ConfigError(field=field, value=value, expected=expected, hint=hint)


def _dotted(loc: Sequence[str | int]) -> str:
    return ".".join(map(str, loc))


def _written(loc: Loc, written_at: Mapping[Loc, Loc]) -> Loc:
    """Return where the user wrote the value at `loc`, before mixtures were expanded."""
    for length in (3, 4):
        if loc[:length] in written_at:
            return (*written_at[loc[:length]], *loc[length:])
    return loc


def _hint(loc: Sequence[str | int], near: list[str]) -> str:
    """Suggest a similar key of the section, else the same key of other sections, else all keys of the section."""
    elsewhere = [path for path, *_ in describe_fields() if path.rsplit(".", 1)[-1] == loc[-1]]
    if near or elsewhere:
        return f"did you mean {' or '.join(map(repr, near or elsewhere))}?"
    return f"known keys: {', '.join(known_keys(loc[:-1]))}"


def _sources(error: Exception, section: str, origins: Mapping[str, str]) -> str:
    """Return the layers of conflicting values, as ` (stage.tune is from my.yaml)`; empty if there is only one layer."""
    if not isinstance(error, Conflict):
        return ""
    fields = [f"{section}.{field}" if section else field for field in error.fields]
    found = {field: layer for field in fields if (layer := origin_of(field, origins))}
    if len(set(origins.values())) < 2 or set(found.values()) <= {COMMAND_LINE}:
        return ""
    return f" ({', '.join(f'{field} is from {layer}' for field, layer in found.items())})"


def _renamed(tree: Any, loc: Sequence[str | int], near: list[str]) -> Any:
    """Return a copy without the key at `loc`; its value moves to the near key unless that is present."""
    key, *rest = loc
    if rest:
        return _with_item(tree, key, _renamed(tree[key], rest, near))
    others = {name: value for name, value in tree.items() if name != key}
    return {**{name: tree[key] for name in near}, **others}


def _without_mixtures(recipe: Recipe) -> Recipe:
    """Remove the named mixtures, which are expanded in `data.mixture`."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"mixtures": {}})})


# Saving


def _portable(tree: Any, fields: list[list[str]], base: Path) -> Any:
    """Return a copy whose absolute paths at `fields` are relative to `base`."""
    if isinstance(tree, str) and [] in fields:
        return portable_path(tree, base) if Path(tree).is_absolute() else tree
    if isinstance(tree, list):
        inside = [rest for key, *rest in filter(None, fields) if key == "N"]
        return [_portable(item, inside, base) for item in tree]
    if isinstance(tree, dict):
        return {
            name: _portable(value, [rest for key, *rest in filter(None, fields) if key == name], base)
            for name, value in tree.items()
        }
    return tree


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted fields and values of plain data; a list without mappings is one value."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = list(enumerate(value))
    else:
        yield prefix, value
        return
    for key, item in items:
        yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
