"""Sizes of published data sets, with sources: lets a stage be planned before its data is downloaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from vila.config.schema import MixtureEntry, Recipe

_SMALLEST_SAMPLE = 32
"""Lower bound of the bytes per sample of any published data set."""


@dataclass(frozen=True, slots=True)
class DataStats:
    """Size of one epoch of a mixture.

    samples:          number of samples.
    images:           mean number of images per sample.
    text, supervised: mean number of text tokens, and of supervised tokens, per sample; without image tokens.
    sources:          source of the numbers, one line per data set.
    """

    samples: int
    images: float
    text: float
    supervised: float
    sources: tuple[str, ...]

    def tokens(self, media_tokens: int) -> float:
        """Return the mean tokens per sample with `media_tokens` tokens per image."""
        return self.images * media_tokens + self.text


def published_stats(recipe: Recipe) -> tuple[DataStats | None, list[str]]:
    """Return the size of the recipe's mixture and no paths, or None and the paths of unknown data sets.

    A data set is known by the name of its file or directory. An existing one that is much smaller than the published
    data set is unknown.
    """
    known = [(entry, _find(entry)) for entry in recipe.data.mixture]
    if unknown := [entry.path for entry, facts in known if facts is None]:
        return None, unknown
    rows = [(_samples(entry, facts), facts) for entry, facts in known if facts]
    total = sum(samples for samples, _ in rows)

    def mean(key: str) -> float:
        return float(sum(samples * facts[key] for samples, facts in rows) / total)

    sources = tuple(f"{entry.path}: {facts['source']}" for entry, facts in known if facts)
    return DataStats(total, mean("images"), mean("text"), mean("supervised"), sources), []


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
