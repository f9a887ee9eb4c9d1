"""Few-shot evaluation: questions after k examples, with correct or with wrong answers.

An example is a user turn with image and question, and an assistant turn with the answer. If examples with wrong answers
score as well as correct ones, the model takes only the answer format from them.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vila.core.errors import ConfigError, DataError
from vila.core.types import Image, Message, Video
from vila.eval.benchmark import Answer, Benchmark, BenchmarkResult, Item, ScoringProtocol

EXAMPLE_POOLS: Mapping[str, Callable[[Path], Sequence[Item]]] = {"easy_vqa": lambda folder: _easy_vqa_pool(folder)}
"""Example pools by benchmark; a pool has no question of the scored split."""


class FewShotBenchmark(Benchmark):
    """A benchmark with few-shot examples before each question; ids, groups and scoring are those of `inner`."""

    def __init__(self, inner: Benchmark, shots: int, pool: Sequence[Item], seed: int, shuffled: bool) -> None:
        self.inner = inner
        self.name = f"{inner.name}_{shots}shot{'_shuffled' if shuffled else ''}"
        self.max_new_tokens, self.sampling = inner.max_new_tokens, inner.sampling
        self.skips_bad_lines = inner.skips_bad_lines
        self._shots, self._pool, self._seed, self._shuffled = shots, pool, seed, shuffled

    def load_items(self) -> list[Item]:
        """Return the questions in the order of the benchmark; those of a group have the same examples."""
        items = self.inner.items()
        by_group: dict[str, list[Item]] = defaultdict(list)
        for item in items:
            by_group[item.group or item.id].append(item)
        examples = {group: self._choose(group, own) for group, own in by_group.items()}
        return [replace(item, messages=_prepend(examples[item.group or item.id], item.messages)) for item in items]

    def _choose(self, group: str, questions: Sequence[Item]) -> tuple[Message, ...]:
        """Draw the examples of a group, with other images, each once; depends only on the seed and the group."""
        rng = random.Random(f"{self._seed}/{group}")
        # One item per distinct media suffices.
        used = list({_media(item): item for item in questions})
        chosen: list[tuple[Message, ...]] = []
        left = list(self._by_image)
        while len(chosen) < self._shots:
            if not left:
                raise DataError(
                    f"the pool has only {len(chosen)} other images for group {group!r}",
                    field=self.name,
                    expected=f"{self._shots} examples",
                )
            index = rng.randrange(len(left))
            left[index], left[-1] = left[-1], left[index]
            example = self._pool[rng.choice(self._by_image[left.pop()])]
            media = _media(example)
            if not any(shares_media(media, other) for other in used):
                used.append(media)
                chosen.append((*example.messages, Message.of("assistant", self._answers[example.id])))
        return tuple(message for example in chosen for message in example)

    @cached_property
    def _by_image(self) -> dict[str, list[int]]:
        indexes: dict[str, list[int]] = defaultdict(list)
        for index, item in enumerate(self._pool):
            if item.truth.strip():
                indexes[item.group or item.id].append(index)
        return dict(indexes)

    @cached_property
    def _answers(self) -> dict[str, str]:
        return wrong_answers(self._pool) if self._shuffled else {item.id: item.truth for item in self._pool}

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """Score as the benchmark does; the metrics also have the few-shot settings."""
        result = self.inner.score(answers, protocol)
        settings = {
            "shots": self._shots,
            "shot_seed": self._seed,
            "shot_answers": "wrong" if self._shuffled else "true",
        }
        return replace(result, metrics={**result.metrics, **settings})


def few_shot(benchmark: Benchmark, k: int, pool: Sequence[Item], seed: int = 0, shuffled: bool = False) -> Benchmark:
    """Return `benchmark` with `k` examples from `pool` before each question; `benchmark` itself for k = 0.

    pool:     questions with answers; the image of a question is never among its examples.
    shuffled: use wrong answers, permuted within the pool.
    Raises ConfigError for a negative k, DataError for a pool without answers or (on `items`) with too few images.
    """
    if k < 0:
        raise ConfigError(field="k", value=k, expected="at least 0")
    if not k:
        return benchmark
    if not any(item.truth.strip() for item in pool):
        raise DataError("no question of the example pool has an answer", field=benchmark.name)
    return FewShotBenchmark(benchmark, k, pool, seed, shuffled)


def few_shot_variants(benchmark: Benchmark, name: str, folder: Path, counts: Sequence[int]) -> list[Benchmark]:
    """Return a registered benchmark with each number of examples, with correct and with wrong answers.

    Raises DataError if the benchmark has no example pool.
    """
    if not any(counts):
        return [benchmark for _ in counts]
    if name not in EXAMPLE_POOLS:
        raise DataError(
            f"no few-shot examples (available for: {', '.join(EXAMPLE_POOLS)})", field=name, hint="use --num-fewshot 0"
        )
    pool = EXAMPLE_POOLS[name](folder)
    return [
        few_shot(benchmark, count, pool, shuffled=shuffled)
        for count in counts
        for shuffled in ((False, True) if count else (False,))
    ]


def wrong_answers(pool: Sequence[Item]) -> dict[str, str]:
    """Return a wrong answer per question id of the pool: the answer to another question of its category.

    The answers of a category are permuted. If one of them has a majority, some stay correct; these are replaced by the
    most frequent other answer. Raises DataError for a category with only one answer.
    """
    categories: dict[str, list[Item]] = defaultdict(list)
    for item in pool:
        if item.truth.strip():
            categories[item.category].append(item)
    return {id: answer for items in categories.values() for id, answer in _permuted(items).items()}


def _permuted(items: Sequence[Item]) -> dict[str, str]:
    counts = Counter(item.truth.strip() for item in items)
    if len(counts) == 1:
        raise DataError(
            f"all answers of category {items[0].category!r} are equal, so there is no wrong one", value=items[0].truth
        )
    # Sorted by answer and shifted by the size of the largest class, every item gets another answer unless one has a
    # majority.
    ordered = sorted(items, key=lambda item: (item.truth.strip(), item.id))
    step = max(counts.values())
    out: dict[str, str] = {}
    for index, item in enumerate(ordered):
        answer = ordered[(index + step) % len(ordered)].truth
        if answer.strip() == item.truth.strip():
            answer = next(other for other, _ in counts.most_common() if other != item.truth.strip())
        out[item.id] = answer
    return out


def shares_media(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Return whether two questions share an image or video: the same source, or files with equal bytes."""
    return any(_same(one, other) for one in first for other in second)


def _same(one: Image | Video, other: Image | Video) -> bool:
    if one.source == other.source:
        return True
    if not (isinstance(one.source, Path) and isinstance(other.source, Path)):
        return False
    try:
        equal_size = one.source.stat().st_size == other.source.stat().st_size
        return equal_size and one.source.read_bytes() == other.source.read_bytes()
    except OSError:  # missing files are reported by the runner
        return False


def _media(item: Item) -> tuple[Image | Video, ...]:
    return tuple(part for message in item.messages for part in message.parts if isinstance(part, Image | Video))


def _prepend(examples: tuple[Message, ...], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    system = int(messages[0].role == "system")
    return (*messages[:system], *examples, *messages[system:])


def _easy_vqa_pool(folder: Path) -> Sequence[Item]:
    from vila.eval.benchmarks.easy_vqa import EasyVqa

    return EasyVqa(folder, split="train").items()
