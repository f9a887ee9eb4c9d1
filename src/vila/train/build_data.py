"""Training data of a run: mixture, packing streams of this rank, micro-batches, and the data set of every token."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vila.config.schema import Recipe
from vila.core.errors import ConfigError
from vila.data.bad_samples import BadSampleLog
from vila.data.collate import Batch, collate
from vila.data.dataset import SampleReader
from vila.data.mixture import Mixture
from vila.data.packing import (
    PackedSequence,
    PackingPolicy,
    PackingStreams,
    PackingStreamState,
    RankStreams,
    fit_micro_batch,
    streams_of_rank,
)
from vila.data.workers import WorkerStreams
from vila.model.processor import VilaProcessor
from vila.train.fsdp import World

MAX_WORKERS = 4
"""Default limit on worker processes that read ahead."""


@dataclass(frozen=True, slots=True)
class StepData:
    """Data of this rank for one step.

    sequences:     the next packed sequence of every stream; empty ones from streams whose data have ended.
    micro_batches: the same without empty sequences, per micro-batch; every rank has the same number of micro-batches.
    batches:       the collated micro-batches; None where a micro-batch has no sequence.
    """

    sequences: list[PackedSequence]
    micro_batches: list[list[PackedSequence]]
    batches: list[Batch | None]


@dataclass
class DataStream:
    """The packing streams of this rank, read step by step.

    data_sets:    names of all data sets of the mixture.
    bad_samples:  log and budget of samples that cannot be read, over all ranks.
    micro_batch:  packed sequences per forward pass.
    pin_memory:   collate into page-locked memory.
    """

    streams: RankStreams
    data_sets: list[str]
    bad_samples: BadSampleLog
    micro_batch: int
    pin_memory: bool = False

    def __post_init__(self) -> None:
        self._ids = {name: index for index, name in enumerate(self.data_sets)}

    def next_step(self) -> StepData:
        """Read and collate one packed sequence of every stream. Raises VilaError for samples that cannot be read."""
        sequences = self.streams.step()
        starts = range(0, len(sequences), self.micro_batch)
        micro_batches = [[one for one in sequences[start : start + self.micro_batch] if one] for start in starts]
        batches = [collate(some, pin=self.pin_memory) if some else None for some in micro_batches]
        return StepData(sequences, micro_batches, batches)

    def data_set_ids(self, sequences: Sequence[PackedSequence], batch: Batch) -> Tensor:
        """Return the index in `data_sets` of every token of a micro-batch, int64 [B, S]; 0 at padding."""
        ids = torch.zeros_like(batch.ids)
        for row, sequence in enumerate(sequences):
            start = 0
            for sample in sequence:
                ids[row, start : start + len(sample)] = self._ids[sample.dataset]
                start += len(sample)
        return ids

    @property
    def states(self) -> list[PackingStreamState]:
        """States of this rank's streams after the last step, for a checkpoint."""
        return self.streams.states

    def close(self) -> None:
        """Stop worker processes."""
        self.streams.close()


def build_reader(recipe: Recipe, processor: VilaProcessor, mixture: Mixture) -> SampleReader:
    """Return a reader that tokenizes the samples of a mixture for a model."""
    template = recipe.data.template or processor.find_template().name
    return SampleReader(mixture, template, processor.span_tokenizer, processor.spec)


def build_data_stream(
    recipe: Recipe,
    processor: VilaProcessor,
    mixture: Mixture,
    states: Sequence[PackingStreamState] | None,
    world: World,
) -> DataStream:
    """Return the data of this rank, starting at `states` (None: at the beginning).

    Raises ConfigError as `build_streams`.
    """
    rank, world_size = world.process.rank, world.process.world_size
    bad_samples = BadSampleLog(
        recipe.output.dir / "faults.jsonl", recipe.data.max_faults, seen=visited_by(states), write=world.is_main
    )
    return DataStream(
        build_streams(recipe, processor, mixture, states, rank=rank, world_size=world_size),
        [dataset.name for dataset in mixture.datasets],
        bad_samples,
        fit_micro_batch(world_size, global_batch(recipe), recipe.batch.micro),
        pin_memory=world.device.type == "cuda",
    )


def global_batch(recipe: Recipe) -> int:
    """Return the number of packing streams: packed sequences (or samples) per step over all ranks."""
    return recipe.batch.rows or recipe.batch.samples


def build_streams(
    recipe: Recipe,
    processor: VilaProcessor,
    mixture: Mixture,
    states: Sequence[PackingStreamState] | None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> RankStreams:
    """Return the packing streams of a rank, read by `compute.workers` processes. They end with `budget.epochs`.

    Raises ConfigError if the global batch is not a multiple of the ranks, or if features are cached and a data set has
    its own image mode: the cache is computed with the stage's image mode.
    """
    data, compute = recipe.data, recipe.compute
    streams_of_rank(rank, world_size, global_batch(recipe))
    for number, entry in enumerate(data.mixture):
        if compute.feature_cache and entry.image_mode not in (None, processor.spec.image_mode):
            raise ConfigError(
                "the feature cache supports one image mode",
                field=f"data.mixture.{number}.image_mode",
                value=entry.image_mode,
                expected=repr(processor.spec.image_mode),
                hint="set compute.feature_cache=false",
            )
    policy = PackingPolicy(
        max_length=data.max_length,
        look_ahead=data.look_ahead,
        packing=data.packing,
        max_images=data.max_images,
        overlong=data.overlong,
        max_faults=data.max_faults,
    )
    reader, workers, decode = build_reader(recipe, processor, mixture), worker_count(recipe), not compute.feature_cache
    shared = {"policy": policy, "rank": rank, "world": world_size, "states": states}
    end = end_position(recipe, mixture)
    if workers:
        return WorkerStreams(reader, global_batch(recipe), workers=workers, decode=decode, end=end, **shared)  # type: ignore[arg-type]
    return PackingStreams(
        reader, global_batch(recipe), shorten=reader.shorten, decode=reader.pixels if decode else None,
        location=reader.mixture.location, end=end, **shared,  # type: ignore[arg-type]
    )  # fmt: skip


def end_position(recipe: Recipe, mixture: Mixture) -> int | None:
    """Return the number of sample visits in `budget.epochs`; None for a budget of tokens."""
    return max(1, round(recipe.budget.epochs * mixture.epoch_length)) if recipe.budget.epochs else None


def worker_count(recipe: Recipe) -> int:
    """Return the number of worker processes. By default none with cached features, where no pixels are decoded."""
    if recipe.compute.workers >= 0:
        return recipe.compute.workers
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if recipe.compute.feature_cache else min(MAX_WORKERS, cpus)


def visited_by(states: Sequence[PackingStreamState] | None) -> Callable[[int], bool]:
    """Return a function that returns whether the streams in `states` (all of the run) have visited a position."""

    def is_visited(position: int) -> bool:
        if states is None:
            return False
        state = states[position % len(states)]
        return position < state.next_position and position not in state.waiting

    return is_visited
