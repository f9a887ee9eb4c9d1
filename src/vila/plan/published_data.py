"""How much data a stage sees, before the data is there: numbers of the published sets, with where they are from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from vila.config.schema import MixtureEntry, Recipe

_SMALLEST_SAMPLE = 32
"""Bytes that a sample of any published set takes at least."""


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What one epoch of a mixture brings.

    samples:    in all.
    images:     pictures of a sample, on average; `text` and `supervised` are its tokens without those of pictures.
    sources:    where the numbers are from, a line for each data set.
    """

    samples: int
    images: float
    text: float
    supervised: float
    sources: tuple[str, ...]

    def tokens(self, media_tokens: int) -> float:
        """Tokens of a sample when a picture takes `media_tokens`."""
        return self.images * media_tokens + self.text


def expected_data(recipe: Recipe) -> tuple[DataFacts | None, list[str]]:
    """The facts of the recipe's mixture, and the entries that nothing is known of, without which there are no facts.

    A data set is known by the name of its file or directory. One that is here and far too small to be the published
    set has only the name in common with it.
    """
    known = [(entry, _find(entry)) for entry in recipe.data.mixture]
    if unknown := [entry.path for entry, facts in known if facts is None]:
        return None, unknown
    rows = [(_samples(entry, facts), facts) for entry, facts in known if facts]
    total = sum(samples for samples, _ in rows)

    def mean(key: str) -> float:
        return float(sum(samples * facts[key] for samples, facts in rows) / total)

    sources = tuple(f"{entry.path}: {facts['source']}" for entry, facts in known if facts)
    return DataFacts(total, mean("images"), mean("text"), mean("supervised"), sources), []


def _samples(entry: MixtureEntry, facts: dict[str, Any]) -> int:
    return int(min(facts["samples"], entry.max_samples or facts["samples"]) * entry.repeat)


def _find(entry: MixtureEntry) -> dict[str, Any] | None:
    path = Path(entry.path).expanduser()
    facts = _table().get(path.name) or _table().get(path.stem)
    if facts is None or not path.exists():
        return facts
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    return facts if sum(file.stat().st_size for file in files) >= facts["samples"] * _SMALLEST_SAMPLE else None


@cache
def _table() -> dict[str, dict[str, Any]]:
    text = (resources.files("vila.plan") / "known_data.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = json.loads(text)
    return table
