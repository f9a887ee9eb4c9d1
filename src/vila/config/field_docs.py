"""Describe the fields of a recipe: type, range, default and help, for the documentation and for error messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from vila.config.schema import Config, Recipe

_WORDS = {str: "text", bool: "true or false", int: "an integer", float: "a number", Path: "a path", NoneType: "null"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def describe_fields(model: type[Config] = Recipe) -> list[tuple[str, str, str, str]]:
    """Return (dotted name, accepted values, default, help) of every field below `model`, in schema order.

    Fields of list items are named `data.mixture.N.path`; in an override, N is an index from 0.
    """
    return list(_rows(model, "", None))


def expected_at(loc: Sequence[str | int], model: type[Config] = Recipe) -> str:
    """Return the accepted values of the field at `loc`, such as `a number > 0 and < 1`."""
    annotation: Any = model
    words = "a mapping"
    for key in loc:
        if not _is_section(annotation):
            annotation = _item(annotation)
            words = _type_words(annotation)
        else:
            field = annotation.model_fields[key]
            annotation, words = field.annotation, _field_words(field)
    return words


def choices_at(loc: Sequence[str | int], model: type[Config] = Recipe) -> list[str]:
    """Return the literal values of the field at `loc`; none if it has another type."""
    annotation: Any = model
    for key in loc:
        section = _is_section(annotation)
        annotation = annotation.model_fields[key].annotation if section else _item(annotation)
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [str(name) for part in parts if get_origin(part) is Literal for name in get_args(part)]


def known_keys(loc: Sequence[str | int], model: type[Config] = Recipe) -> list[str]:
    """Return the keys of the section at `loc`."""
    section: Any = model
    for key in loc:
        section = section.model_fields[key].annotation if _is_section(section) else _item(section)
    return list(section.model_fields)


def _rows(model: type[Config], prefix: str, given: Config | None) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        default = field.get_default(call_default_factory=True) if given is None else getattr(given, name)
        if _is_section(field.annotation):
            yield from _rows(field.annotation, f"{path}.", default if isinstance(default, Config) else None)  # type: ignore[arg-type]
            continue
        required = given is None and field.is_required()
        yield (
            path,
            _field_words(field),
            "required" if required else _default_words(default),
            " ".join((field.description or "").split()),
        )
        items = get_args(field.annotation)
        if items and _is_section(items[0]):
            yield from _rows(items[0], f"{path}.N.", None)


def _item(annotation: Any) -> Any:
    """Return the item type of a list or mapping."""
    return get_args(annotation)[1 if get_origin(annotation) is dict else 0]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def _field_words(field: FieldInfo) -> str:
    words = _type_words(field.annotation)
    if any(getattr(rule, "min_length", 0) for rule in field.metadata):
        words += ", at least one"
    bounds = [
        f"{sign} {getattr(rule, bound):g}"
        for rule in field.metadata
        for bound, sign in _BOUNDS.items()
        if hasattr(rule, bound)
    ]
    if not bounds:
        return words
    # "a number > 0 and < 1 or null": the bounds come before "or null".
    number, *rest = words.split(" or null")
    return f"{number} {' and '.join(bounds)}" + " or null" * len(rest)


def _type_words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if _is_section(annotation) or origin is dict:
        return "a mapping"
    if origin is tuple:
        return f"a list of {'mappings' if _is_section(arguments[0]) else _type_words(arguments[0])}"
    if origin is Literal:
        return _either([str(value) for value in arguments])
    if origin in (Union, UnionType):
        return _either([_type_words(part) for part in arguments])
    return _WORDS[annotation]


def _either(names: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _default_words(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value) if value != "" else '""'
