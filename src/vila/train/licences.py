"""Base models of a recipe and their licences: from the table of known models, or from files beside the weights."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vila.config.schema import Recipe
from vila.core.reading import file_errors

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_PART_LICENCE = re.compile(r"\(licence: ([^()]+)\)\.\s*\Z")
"""End of the README that `vila quickstart` writes beside a converted part."""
CARD_KEY = "vila_base_models"
"""Field of our own model cards that holds the base models with their licences."""
_DEEPEST = 10
"""Stages that a chain of recipes is followed through."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A model that weights come from.

    name:    hub id or directory, as the recipe has it.
    hub:     hub id where it is known, else empty.
    licence: in words; "not known" where nothing tells.
    note:    what else holds, or where it is from.
    """

    name: str
    hub: str
    licence: str
    note: str = ""


def base_models(recipe: Recipe) -> list[BaseModel]:
    """The language model and the tower, found through the recipes of the stages before; else the model of `path`.

    A model of ours that was moved away from its recipe is known by its card.
    """
    names = _names(recipe.model.model_dump(), _DEEPEST)
    return [base for name in names for base in _of_card(name) or [_described(name)]]


def _names(source: dict[str, Any], depth: int) -> list[str]:
    if not source.get("path"):
        return [name for name in (source.get("llm"), source.get("vision")) if name]
    before = Path(source["path"]).parent / "recipe.yaml"
    if depth and before.is_file():
        with file_errors(before):
            tree = yaml.safe_load(before.read_text(encoding="utf-8"))
        earlier = tree.get("model") if isinstance(tree, dict) else None
        if isinstance(earlier, dict) and (names := _names(earlier, depth - 1)):
            return names
    return [source["path"]]


def _of_card(name: str) -> list[BaseModel]:
    """The base models that the card of a model of ours lists; none where there is no such card."""
    folder = Path(name).expanduser()
    for readme in (folder / "README.md", folder / "model" / "README.md"):
        rows = _front_matter(readme).get(CARD_KEY)
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
            return [BaseModel(*(str(row.get(key) or "") for key in ("name", "hub", "licence", "note"))) for row in rows]
    return []


def _front_matter(readme: Path) -> dict[str, Any]:
    return read_front_matter(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else {}


def _described(name: str) -> BaseModel:
    folder = Path(name)
    if folder.is_dir():
        found = _beside(folder)
        if found:
            return BaseModel(name, "", found, f"as {folder.name}/README.md says")
        # A copy has the name of what it is a copy of.
        name_of = {hub.rpartition("/")[2].lower(): hub for hub in _table()}
        hub = name_of.get(folder.name.lower(), "")
        if hub:
            return BaseModel(name, hub, _table()[hub]["licence"], _table()[hub]["note"])
        return BaseModel(name, "", "not known", "see its LICENSE file" if (folder / "LICENSE").is_file() else "")
    facts = _table().get(name)
    hub = name if _HUB_ID.fullmatch(name) else ""
    return BaseModel(name, hub, facts["licence"], facts["note"]) if facts else BaseModel(name, hub, "not known")


def _beside(folder: Path) -> str:
    """The licence in the front matter of a README, as the hub's directories have it, or in that of a converted part."""
    readme = folder / "README.md"
    licence = _front_matter(readme).get("license")
    if isinstance(licence, str) and licence != "other":
        return licence
    if (folder / "part.json").is_file() and readme.is_file():
        match = _PART_LICENCE.search(readme.read_text(encoding="utf-8", errors="replace"))
        return match[1] if match else ""
    return ""


def read_front_matter(text: str) -> dict[str, Any]:
    """The YAML between the lines `---` at the head of a README; empty where there is none that can be read."""
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        facts = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return facts if isinstance(facts, dict) else {}


@cache
def _table() -> dict[str, dict[str, str]]:
    text = (resources.files("vila.train") / "model_licences.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, str]] = json.loads(text)
    return table
