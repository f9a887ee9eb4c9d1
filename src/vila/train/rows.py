"""Building the data of a run from its recipe: the mixture, and the rows that steps are made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from vila.config.schema import Recipe
from vila.core.errors import ConfigError
from vila.core.events import SILENT, Events
from vila.data.deal import lanes_of
from vila.data.faults import FaultLog
from vila.data.loader import Entry, SampleReader, open_mixture
from vila.data.mixture import Mixture
from vila.data.pack import LaneSet, LaneState, Policy
from vila.data.workers import WorkerLanes
from vila.model.processor import VilaProcessor

MAX_WORKERS = 4


def build_mixture(recipe: Recipe, events: Events = SILENT) -> Mixture:
    """The data sets of a recipe, opened; `events` are told how files are indexed."""
    return open_mixture([Entry(**entry.model_dump()) for entry in recipe.data.mixture], recipe.seed, events)


def build_reader(recipe: Recipe, processor: VilaProcessor, mixture: Mixture) -> SampleReader:
    """What reads the samples of a mixture for a model."""
    template = recipe.data.template or processor.find_template().name
    return SampleReader(mixture, template, processor.span_tokenizer, processor.spec)


def build_rows(
    recipe: Recipe,
    processor: VilaProcessor,
    mixture: Mixture,
    states: Sequence[LaneState] | None,
    *,
    rank: int = 0,
    world: int = 1,
) -> LaneSet | WorkerLanes:
    """The rows of a run from `states` on; read by `compute.workers` processes. They end with `budget.epochs`.

    Raises ConfigError when the global batch is no multiple of the ranks, or when a data set has an image mode of its
    own and features are cached, since the cache is made with the stage's.
    """
    data, count = recipe.data, recipe.batch.rows or recipe.batch.samples
    lanes_of(rank, world, count)
    own = [entry.path for entry in data.mixture if entry.image_mode not in (None, processor.spec.image_mode)]
    if own and recipe.compute.feature_cache:
        raise ConfigError(f"compute.feature_cache knows one image_mode, but {own[0]} has its own; turn the cache off")
    policy = Policy(
        max_length=data.max_length,
        look_ahead=data.look_ahead,
        packing=data.packing,
        max_images=data.max_images,
        overlong=data.overlong,
        max_faults=data.max_faults,
    )
    reader, end = build_reader(recipe, processor, mixture), end_of(recipe, mixture)
    workers, decode = worker_count(recipe), not recipe.compute.feature_cache
    if workers:
        return WorkerLanes(
            reader, count, policy=policy, workers=workers, rank=rank, world=world, states=states, decode=decode, end=end
        )
    return LaneSet(
        reader, count, policy=policy, rank=rank, world=world, states=states, shorten=reader.shorten,
        decode=reader.pixels if decode else None, place=reader.place, end=end,
    )  # fmt: skip


def end_of(recipe: Recipe, mixture: Mixture) -> int | None:
    """The global position at which `budget.epochs` end, the visits of samples that they have; None for `tokens`."""
    return max(1, round(recipe.budget.epochs * mixture.epoch_length)) if recipe.budget.epochs else None


def fault_log(recipe: Recipe, states: Sequence[LaneState] | None, *, write: bool) -> FaultLog:
    """The list of samples that could not be read up to `states`. write: whether this process is the one that writes."""
    count = recipe.batch.rows or recipe.batch.samples
    path = recipe.output.dir / "faults.jsonl"
    return FaultLog(path, recipe.data.max_faults, seen=_seen_by(states, count), write=write)


def worker_count(recipe: Recipe) -> int:
    """Processes that read ahead; with cached features there are no pixels to decode, so none by default."""
    if recipe.compute.workers >= 0:
        return recipe.compute.workers
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if recipe.compute.feature_cache else min(MAX_WORKERS, processors)


def _seen_by(states: Sequence[LaneState] | None, count: int) -> Callable[[int], bool]:
    """Whether the lanes have left a position behind them."""

    def seen(position: int) -> bool:
        if states is None:
            return False
        state = states[position % count]
        return position < state.next_position and position not in state.waiting

    return seen
