"""Recipes as text: packaged or own YAML files, `extends`, dotted overrides, saving and comparing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vila.config.check import check_recipe, dotted, quoted, with_item
from vila.config.fields import describe_fields
from vila.config.layers import COMMAND_LINE, fields_of, give_way, origin_of
from vila.config.mixtures import expand_mixtures
from vila.config.schema import Recipe
from vila.core.errors import ConfigError, UnknownNameError
from vila.core.files import portable_path, write_text

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
    (in a file that extends another, or on the command line) stays; see `vila.config.layers`.

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
