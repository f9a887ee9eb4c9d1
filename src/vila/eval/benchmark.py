"""What a benchmark is, and the table of those that exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vila.core.registry import Registry
from vila.core.types import Message


@dataclass(frozen=True, slots=True)
class Item:
    """One question: its id, the conversation that asks it, the true answer, and what it is about.

    group: items of equal group share a picture and are asked together.
    """

    id: str
    messages: tuple[Message, ...]
    truth: str
    group: str
    kind: str = ""


class Benchmark(Protocol):
    """Questions and how their answers are scored."""

    name: str
    max_new_tokens: int

    def items(self) -> Sequence[Item]:
        """All questions, in a fixed order; items of one group stand together."""

    def score(self, predictions: Mapping[str, str]) -> dict[str, Any]:
        """Scores of answers by item id; `accuracy` is the headline, 0..1. DataError for missing or unknown ids."""


class OpenBenchmark(Protocol):
    """Opens a benchmark whose data lie in a directory."""

    def __call__(self, folder: Path, limit: int) -> Benchmark:
        """limit: about how many questions; 0 for all."""


BENCHMARKS: Registry[OpenBenchmark] = Registry("benchmark", {"easy_vqa": "vila.eval.benchmarks.easy_vqa:EasyVqa"})
