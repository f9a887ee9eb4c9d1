"""Runs on the mini datasets of `scripts/make_eval_data.py` with a fake model."""

from collections.abc import Callable
from pathlib import Path

from scripts.make_eval_data import LAYOUTS, make_eval_data
from tests.eval.fake_models import FakeModel
from vila.core.errors import MediaError
from vila.core.files import write_json
from vila.eval.benchmark import BENCHMARKS, Benchmark, Item
from vila.eval.runner import run_benchmark

TEN = tuple(LAYOUTS)
"""The published benchmarks in the order of their table."""


def write_mini_datasets(folder: Path) -> Path:
    """Write a `playground/data/eval` with all ten layouts and 100 questions; takes a second."""
    make_eval_data(folder)
    return folder


def truly(number: int, item: Item) -> str:
    """The true answer, or "unanswerable" where only a server knows it."""
    return item.truth or "unanswerable"


class Answers(FakeModel):
    """Answers each question of a benchmark with `answer(index, item)`; fails on those in `fails`.

    Like any engine it gives equal conversations equal answers: what the last of them gets.
    """

    def __init__(self, benchmark: Benchmark, answer: Callable[[int, Item], str] = truly, fails: set[str] = frozenset()):
        self._texts = {item.messages: (answer(n, item), item.id) for n, item in enumerate(benchmark.items())}
        self._fails = fails

    def generate(self, conversations, sampling):
        found = [self._texts[tuple(messages)] for messages in conversations]
        for _, name in found:
            if name in self._fails:
                raise MediaError(f"{name}: not an image")
        return [text for text, _ in found]


def write_mini_run(
    data: Path,
    out: Path,
    names: tuple[str, ...] = TEN,
    answer: Callable[[int, Item], str] = truly,
    fails: set[str] = frozenset(),
    **facts,
) -> dict[str, Benchmark]:
    """Write a run folder as `vila eval` does, without report; return its benchmarks by name."""
    opened = {}
    for name in names:
        benchmark = BENCHMARKS[name](data, 0)
        opened[benchmark.name] = benchmark
        run_benchmark(Answers(benchmark, answer, fails), benchmark, out / benchmark.name, model_id="abc")
    seen = {"model": "models/tiny", "data": str(data), "rules": "upstream", "template": ""}
    write_json(out / "eval.json", {**seen, "hash": "abc", **facts, "benchmarks": {name: name for name in opened}})
    return opened
