"""Published scores of VILA-7B and VILA-13B on ten benchmarks, with the metric and split of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, slots=True)
class PublishedBenchmark:
    """One column of the published table.

    unit:       `%` or `points`.
    questions:  size of the split.
    metric:     what was published: metric and split.
    difference: how a score computed here differs from it, as a sentence; "" if it does not.
    scores:     by model.
    """

    name: str
    title: str
    unit: str
    questions: int
    metric: str
    difference: str
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """The published table, columns in its order."""

    source: str
    models: tuple[str, ...]
    benchmarks: Mapping[str, PublishedBenchmark]


@cache
def published_table() -> PublishedTable:
    """Load the packaged table."""
    table = json.loads(resources.files("vila.eval").joinpath("published.json").read_text(encoding="utf-8"))
    models = tuple(table["models"])
    benchmarks = {
        name: PublishedBenchmark(name=name, **{**row, "scores": dict(zip(models, row["scores"], strict=True))})
        for name, row in table["benchmarks"].items()
    }
    return PublishedTable(table["source"], models, benchmarks)


def benchmark_title(name: str) -> str:
    """Return the title of a benchmark as papers write it, or its registered name."""
    known = published_table().benchmarks.get(name)
    return known.title if known else name
