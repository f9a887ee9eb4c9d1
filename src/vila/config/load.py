"""Recipes as text: packaged or own YAML files, `extends`, dotted overrides, saving and comparing."""

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

# --- layers
# Layers of a recipe: the files that it extends, itself, and overrides; where a later layer excludes what an earlier
# one says, and which layer each value is from.


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


# --- check
# From plain data to a Recipe; every problem in words, with its dotted path, the value, and what is expected.


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


__all__ = ["describe_fields", "load_recipe", "recipe_differences", "recipe_names", "recipe_to_yaml", "save_recipe"]

_TEXT_TAG, _TIME_TAG, _MERGE_TAG = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "timestamp", "merge"))


class _Absent:
    """Stands for the value of a path that a recipe does not have."""

    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def recipe_names() -> list[str]:
    """Names of the packaged recipes, such as `vila_7b/1_align`."""
    folder = _packaged_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def load_recipe(
    name_or_path: str,
    overrides: Sequence[str] = (),
    *,
    notes: list[str] | None = None,
    origins: dict[str, str] | None = None,
) -> Recipe:
    """Load the recipe of a packaged name or a `.yaml` file, with `extends` resolved and `key=value` overrides applied.

    `extends` names a packaged recipe, or a file relative to the one that says so. A mapping, of a recipe or of an
    override, is merged into what it changes; any other value, a list included, replaces it. An override's value is
    YAML, and nothing after the `=` means empty text. Of settings that exclude each other, the one that is given later
    (in a file that extends another, or on the command line) stays; see `vila.config.load`.

    notes:   receives a line for each setting that gave way to a later one.
    origins: receives the recipe, or "the command line", that each field is from, see `origin_of`.
    Raises UnknownNameError for a name that is not packaged, ConfigError for a file that cannot be read or is not YAML,
    and one ConfigError with all problems of everything else.
    """
    problems: list[str] = []
    tree: dict[str, Any] = {}
    origins = {} if origins is None else origins
    for label, layer in _read_chain(_find(name_or_path), name_or_path, problems, ()):
        tree = _without_excluded(tree, layer, label, origins, notes)
        tree = _merged(tree, layer)
    tree = _overridden(tree, overrides, origins, problems, notes)
    recipe, faults = check_recipe(tree, origins)
    if problems or recipe is None:
        raise ConfigError.collect(name_or_path, problems + faults)
    # The origin of a data set is the file that defines its mixture, not the one that uses the mixture.
    for place, written in expand_mixtures(tree)[1].items():
        if written[1] == "mixtures" and (origin := origin_of(dotted(written), origins)):
            origins[dotted(place)] = origin
    return recipe


def _overridden(
    tree: dict[str, Any],
    overrides: Sequence[str],
    origins: dict[str, str],
    problems: list[str],
    notes: list[str] | None,
) -> dict[str, Any]:
    """The tree with all overrides applied, which together are one layer; bad ones become problems."""
    parsed: list[tuple[list[str], Any]] = []
    layer: dict[str, Any] = {}
    for override in overrides:
        try:
            keys, value = _parsed_override(override)
        except ConfigError as error:
            problems.append(str(error))
            continue
        parsed.append((keys, value))
        layer = _merged(layer, reduce(lambda inner, key: {key: inner}, reversed(keys), value))
    tree = _without_excluded(tree, layer, COMMAND_LINE, origins, notes)
    for keys, value in parsed:
        try:
            tree = _with_value(tree, keys, value, "")
        except ConfigError as error:
            problems.append(str(error))
    return tree


def _without_excluded(
    tree: dict[str, Any], layer: dict[str, Any], label: str, origins: dict[str, str], notes: list[str] | None
) -> dict[str, Any]:
    """The tree without the settings that a later layer excludes; `origins` learns which values are the layer's."""
    tree, changed = give_way(tree, layer)
    for field in changed:
        if notes is not None:
            notes.append(f"{field} of {origin_of(field, origins)} gives way to what {label} says")
        origins[field] = label
    origins |= dict.fromkeys(fields_of(layer), label)
    return tree


_PATH_FIELDS = (
    "model.path", "model.llm", "model.vision", "data.mixture.N.path", "data.mixture.N.image_root",
    "monitor.prompts.N.image", "monitor.eval_data", "output.dir",
)  # fmt: skip


def recipe_to_yaml(recipe: Recipe, base: Path | None = None) -> str:
    """The whole recipe as YAML, defaults included; loading it gives an equal recipe.

    base: directory that absolute paths are written relative to, for a text that others read; see `portable_path`.
    """
    return tree_to_yaml(recipe.model_dump(mode="json"), base)


def tree_to_yaml(tree: Any, base: Path | None = None) -> str:
    """As `recipe_to_yaml`, for the plain data of a recipe."""
    if base is not None:
        tree = _portable(tree, [field.split(".") for field in _PATH_FIELDS], base)
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=False, width=1000))


def _portable(tree: Any, fields: list[list[str]], base: Path) -> Any:
    """A copy of plain data whose absolute paths at the fields are written relative to `base`."""
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


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the whole recipe to a YAML file, atomically."""
    write_text(path, recipe_to_yaml(recipe))


def recipe_differences(old: Recipe, new: Recipe) -> list[str]:
    """Return a line for every value that differs, such as `stage.lr: 0.001 -> 0.002`, in the schema's order."""
    return [f"{path}: {was} -> {now}" for path, was, now in recipe_changes(old, new)]


def recipe_changes(old: Recipe, new: Recipe) -> list[tuple[str, str, str]]:
    """Return field, old and new value (as Python writes them) of every value that differs, in the schema's order."""
    before, after = (dict(_leaves(recipe.model_dump(mode="json"))) for recipe in (old, new))
    pairs = {path: (before.get(path, _ABSENT), after.get(path, _ABSENT)) for path in [*before, *after]}
    return [(path, repr(was), repr(now)) for path, (was, now) in pairs.items() if was != now]


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths and values of plain data; a list without mappings counts as one value."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = list(enumerate(value))
    else:
        yield prefix, value
        return
    for key, item in items:
        yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))


def _packaged_folder() -> Path:
    return Path(str(resources.files("vila.config"))) / "recipes"


def _find(name: str, base: Path = Path(), kind: str = "recipe") -> Path:
    if name.endswith((".yaml", ".yml")):
        return base / name
    known = recipe_names()
    if name not in known:
        file = [f"{name}.yaml"] if (base / f"{name}.yaml").is_file() else []
        raise UnknownNameError(kind, name, [*known, *file])
    return _packaged_folder() / f"{name}.yaml"


def _read_chain(
    path: Path, label: str, problems: list[str], above: tuple[Path, ...]
) -> list[tuple[str, dict[str, Any]]]:
    """The mappings of the recipes that `path` extends and its own, each with the name of its recipe.

    above: the files that led here.
    """
    here = path.resolve()
    if here in above:
        names = " -> ".join(file.name for file in (*above[above.index(here) :], here))
        raise ConfigError(f"{path}: extends goes round in a circle: {names}")
    tree = _read_file(path, problems)
    other = tree.pop("extends", None)
    if other is None:
        return [(label, tree)]
    if not isinstance(other, str):
        problems.append(f"extends: got {quoted(other)}, expected the name of a recipe or a path")
        return [(label, tree)]
    base = _find(other, path.parent, f"recipe that {path} extends:")
    return [*_read_chain(base, other, problems, (*above, here)), (label, tree)]


def _read_file(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        hint = path.with_suffix("").as_posix()
        named = f"; the packaged recipe is called {hint!r}" if hint in recipe_names() else ""
        raise ConfigError(f"{path}: cannot be read ({error.strerror}){named}") from error
    try:
        tree, duplicates = _parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_place(error, text)}: not YAML ({_reason(error)})") from error
    problems += [f"{path} {duplicate}" for duplicate in duplicates]
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {quoted(tree)}, expected a mapping of recipe sections")
    return dict(tree)


def _parse_yaml(text: str) -> tuple[Any, list[str]]:
    """The value of a YAML document, and a line for every key that a mapping gives twice. Raises yaml.YAMLError."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        duplicates: list[str] = []
        _inspect(node, duplicates, set())
        return loader.construct_document(node), duplicates
    except ValueError as error:  # PyYAML takes `0x_` for a number and then fails to read it
        raise yaml.YAMLError(str(error)) from error
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    finally:
        loader.dispose()


def _inspect(node: Any, duplicates: list[str], seen: set[int]) -> None:
    """Note keys given twice; make keys and dates text: no field is a date, and `name: 2024-05-01` is a fair name."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode) and node.tag == _TIME_TAG:
        node.tag = _TEXT_TAG
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _inspect(item, duplicates, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            _inspect(value, duplicates, seen)
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in first:
                duplicates.append(f"line {line}: key {key.value!r} is given twice, first on line {first[key.value]}")
            first.setdefault(key.value, line)
            if key.tag != _MERGE_TAG:
                key.tag = _TEXT_TAG


def _place(error: yaml.YAMLError, text: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        return f" line {before.count(chr(10)) + 1} column {len(before) - before.rfind(chr(10))}"
    mark = getattr(error, "problem_mark", None)
    return f" line {mark.line + 1} column {mark.column + 1}" if mark else ""


def _reason(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)


def _merged(base: Any, change: Any) -> Any:
    """`change` laid over `base`: mappings key by key, anything else replaced."""
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    return {**base, **{key: _merged(base.get(key), value) for key, value in change.items()}}


def _parsed_override(override: str) -> tuple[list[str], Any]:
    """Keys and value of one `dotted.key=value`. Raises ConfigError naming the override."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: expected key=value, such as stage.lr=1e-5")
    try:
        value, duplicates = _parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override {override!r}: the value is not YAML ({_reason(error)}); text may need quotes"
        ) from error
    if duplicates:
        raise ConfigError(f"override {override!r}: {duplicates[0]}")
    return keys, "" if not text.strip() else value


def _with_value(tree: Any, keys: list[str], value: Any, done: str) -> Any:
    if not keys:
        return _merged(tree, value)
    key, *rest = keys
    path = f"{done}.{key}" if done else key
    if isinstance(tree, list):
        if not key.isdecimal() or int(key) >= len(tree):
            raise ConfigError(f"override {path}: {done} is a list of {len(tree)}, expected a number below {len(tree)}")
        return with_item(tree, int(key), _with_value(tree[int(key)], rest, value, path))
    if not isinstance(tree, dict):
        raise ConfigError(f"override {path}: {done} is {quoted(tree)}, which holds no keys")
    return with_item(tree, key, _with_value(tree.get(key, {}), rest, value, path))
