"""The published figures of VILA-7B and VILA-13B on ten benchmarks, and what each of them is a figure of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, slots=True)
class PublishedBenchmark:
    """One column of the published table.

    questions: rows that are asked for it. scores: by model, in `unit` (`%` or `points`).
    figure:    what was published. here: where a local score is of something else, in a sentence; "" where it is not.
    """

    name: str
    title: str
    unit: str
    questions: int
    figure: str
    here: str
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """All columns in their published order."""

    source: str
    models: tuple[str, ...]
    benchmarks: Mapping[str, PublishedBenchmark]


@cache
def published_table() -> PublishedTable:
    """The figures that the VILA project gives for its released models."""
    table = json.loads(resources.files("vila.eval").joinpath("published.json").read_text(encoding="utf-8"))
    models = tuple(table["models"])
    benchmarks = {
        name: PublishedBenchmark(name=name, **{**row, "scores": dict(zip(models, row["scores"], strict=True))})
        for name, row in table["benchmarks"].items()
    }
    return PublishedTable(table["source"], models, benchmarks)


def title_of(name: str) -> str:
    """A benchmark's name as papers write it; others as they are registered."""
    known = published_table().benchmarks.get(name)
    return known.title if known else name
