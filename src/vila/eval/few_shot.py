"""Learning in context: questions asked after k worked examples, with their answers or with wrong ones.

An example is a turn of the user, picture and question, and the assistant's answer. If shuffled answers score as well as
true ones, the examples teach the form of an answer and not the task.
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
"""Where examples for a benchmark come from: never from what is scored."""


class FewShotBenchmark:
    """A benchmark whose questions follow examples. Ids, groups, truths and scores are the benchmark's own."""

    def __init__(self, inner: Benchmark, shots: int, pool: Sequence[Item], seed: int, shuffled: bool) -> None:
        self.inner = inner
        self.name = f"{inner.name}_{shots}shot{'_shuffled' if shuffled else ''}"
        self.max_new_tokens = inner.max_new_tokens
        self._shots, self._pool, self._seed, self._shuffled = shots, pool, seed, shuffled

    def items(self) -> Sequence[Item]:
        """The benchmark's questions in its order; those about one picture follow the same examples."""
        return self._items

    @cached_property
    def _items(self) -> list[Item]:
        items = self.inner.items()
        pictures: dict[str, list[Item]] = defaultdict(list)
        for item in items:
            pictures[item.group or item.id].append(item)
        shots = {group: self._choose(group, asked) for group, asked in pictures.items()}
        return [
            replace(
                item,
                messages=_before(shots[item.group or item.id], item.messages),
                prompt=item.prompt or item.messages[-1].text,
            )
            for item in items
        ]

    def _choose(self, group: str, asked: Sequence[Item]) -> tuple[Message, ...]:
        """The examples of one group: other pictures, each once, drawn by the seed and the group's name alone."""
        rng = random.Random(f"{self._seed}/{group}")
        # Items that ask about the same picture are equal here; one of them is compared.
        seen = list({_media(item): item for item in asked})
        chosen: list[tuple[Message, ...]] = []
        left = list(self._by_picture)
        while len(chosen) < self._shots:
            if not left:
                raise DataError(
                    f"{self.name}: the pool has only {len(chosen)} pictures besides those of {group!r}; "
                    f"{self._shots} examples are wanted"
                )
            place = rng.randrange(len(left))
            left[place], left[-1] = left[-1], left[place]
            example = self._pool[rng.choice(self._by_picture[left.pop()])]
            media = _media(example)
            if not any(shares_media(media, other) for other in seen):
                seen.append(media)
                chosen.append((*example.messages, Message.of("assistant", self._answers[example.id])))
        return tuple(message for example in chosen for message in example)

    @cached_property
    def _by_picture(self) -> dict[str, list[int]]:
        places: dict[str, list[int]] = defaultdict(list)
        for place, item in enumerate(self._pool):
            if item.truth.strip():
                places[item.group or item.id].append(place)
        return dict(places)

    @cached_property
    def _answers(self) -> dict[str, str]:
        return wrong_answers(self._pool) if self._shuffled else {item.id: item.truth for item in self._pool}

    def score(self, answers: Sequence[Answer], protocol: ScoringProtocol = "upstream") -> BenchmarkResult:
        """The benchmark's score, with what the questions followed among the figures."""
        result = self.inner.score(answers, protocol)
        facts = {"shots": self._shots, "shot_seed": self._seed, "shot_answers": "wrong" if self._shuffled else "true"}
        return replace(result, metrics={**result.metrics, **facts})


def few_shot(benchmark: Benchmark, k: int, pool: Sequence[Item], seed: int = 0, shuffled: bool = False) -> Benchmark:
    """`benchmark` asked after `k` examples out of `pool`, which a seed chooses; with none it is `benchmark` itself.

    pool:     questions with answers; a picture that an item asks about is never among its examples.
    shuffled: the examples have each other's answers (those of the pool, permuted), all of them wrong.
    Raises ConfigError for a negative k, DataError for a pool without answers or, later, with too few pictures.
    """
    if k < 0:
        raise ConfigError(f"shots: {k} examples; expected 0 or more")
    if not k:
        return benchmark
    if not any(item.truth.strip() for item in pool):
        raise DataError(f"{benchmark.name}: no question of the pool has an answer to show")
    return FewShotBenchmark(benchmark, k, pool, seed, shuffled)


def few_shot_variants(
    benchmark: Benchmark, name: str, folder: Path, counts: Sequence[int], seed: int = 0
) -> list[Benchmark]:
    """A registered benchmark after each number of examples from its own pool, with true answers and with wrong ones.

    Raises DataError when examples are wanted of a benchmark that has no pool.
    """
    if not any(counts):
        return [benchmark for _ in counts]
    if name not in EXAMPLE_POOLS:
        raise DataError(
            f"{name}: has no pool of examples (those that have one: {', '.join(EXAMPLE_POOLS)}); take --num-fewshot 0"
        )
    pool = EXAMPLE_POOLS[name](folder)
    return [
        few_shot(benchmark, count, pool, seed, shuffled)
        for count in counts
        for shuffled in ((False, True) if count else (False,))
    ]


def wrong_answers(pool: Sequence[Item]) -> dict[str, str]:
    """For each question of the pool, by id, the true answer to another one of its kind, which is wrong here.

    The answers of a kind are permuted; where more than half of them are equal, permuting leaves some right, and these
    get the commonest other answer. Raises DataError for a kind with one answer only.
    """
    categories: dict[str, list[Item]] = defaultdict(list)
    for item in pool:
        if item.truth.strip():
            categories[item.category].append(item)
    return {id: answer for items in categories.values() for id, answer in _permuted(items).items()}


def _permuted(items: Sequence[Item]) -> dict[str, str]:
    counts = Counter(item.truth.strip() for item in items)
    if len(counts) == 1:
        raise DataError(f"every answer of kind {items[0].category!r} in the pool is {items[0].truth!r}: none is wrong")
    # In order of their answers, moved on by the largest class, no answer meets its own class unless that is over half.
    ordered = sorted(items, key=lambda item: (item.truth.strip(), item.id))
    step = max(counts.values())
    out: dict[str, str] = {}
    for place, item in enumerate(ordered):
        answer = ordered[(place + step) % len(ordered)].truth
        if answer.strip() == item.truth.strip():
            answer = next(other for other, _ in counts.most_common() if other != item.truth.strip())
        out[item.id] = answer
    return out


def shares_media(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether two questions show a common picture: one source, or files of equal content. Nothing is decoded."""
    return any(_same(one, other) for one in first for other in second)


def _same(one: Image | Video, other: Image | Video) -> bool:
    if one.source == other.source:
        return True
    if not (isinstance(one.source, Path) and isinstance(other.source, Path)):
        return False
    try:
        equal_size = one.source.stat().st_size == other.source.stat().st_size
        return equal_size and one.source.read_bytes() == other.source.read_bytes()
    except OSError:  # a picture that is not there is the runner's to report
        return False


def _media(item: Item) -> tuple[Image | Video, ...]:
    return tuple(part for message in item.messages for part in message.parts if isinstance(part, Image | Video))


def _before(examples: tuple[Message, ...], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    system = int(messages[0].role == "system")
    return (*messages[:system], *examples, *messages[system:])


def _easy_vqa_pool(folder: Path) -> Sequence[Item]:
    from vila.eval.benchmarks.easy_vqa import EasyVqa

    return EasyVqa(folder, split="train").items()
