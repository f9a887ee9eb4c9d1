"""A recipe on a machine, before anything runs: parameters, memory, batch, time and disk, and what would fit instead."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from vila.config.schema import Recipe
from vila.data.deal import fitting_micro
from vila.plan.data_facts import DataFacts, expected_data
from vila.plan.devices import Machine
from vila.plan.fit import holding_of, largest_micro, memory_of, remedies, usable_bytes, with_micro, worst_micro
from vila.plan.flops import Flops, step_flops
from vila.plan.learning import Learning, count_learning
from vila.plan.memory import Memory, by_component
from vila.plan.model_source import config_of
from vila.plan.shape import ModelShape, count_parameters, shape_of
from vila.plan.traffic import Traffic, step_traffic

StageKind = Literal["align", "pretrain", "sft"]

PUBLISHED_BATCH: dict[StageKind, int] = {"align": 256, "pretrain": 1024, "sft": 128}
"""Samples of a step in VILA's three stages (arXiv 2312.07533 and its scripts)."""
DEFAULT_MFU: dict[StageKind, float] = {"align": 0.33, "pretrain": 0.30, "sft": 0.26}
"""Share of the peak that the original's published hours amount to: what to expect when nothing was measured."""
FILL = 0.98
"""Share of real tokens in packed rows; benchmarks/data.md measures 94 to 99.98 %."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A step of the whole machine: `size` rows or samples, in `accumulation` micro-batches of `micro` on each rank.

    asked_micro: the recipe's `batch.micro`; `micro` is less where a rank's share of the batch is no multiple of it.
    """

    unit: Literal["rows", "samples"]
    size: int
    micro: int
    asked_micro: int
    accumulation: int
    samples: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Duration:
    """What a stage takes: `mfu` says how fast, and `steps` how far."""

    steps: int
    tokens: float
    flops: Flops
    mfu: float
    step_s: float
    hours: float
    gpu_hours: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that `vila plan` tells.

    memory:        the greatest moment of one device; `usable` bytes are there.
    parts:         what each component takes of one device, its gradients and kept activations at their fullest.
    largest_micro: rows that fit at a time, 0 for none.
    duration:      None when nothing is known of the data, named in `unknown`.
    is_published:  whether all data sets are published ones, which the original's numbers are for.
    traffic:       what a rank receives from others in a step, on assumed links.
    disk:          bytes of the checkpoints that are kept while one is written, and of the model.
    remedies:      what would fit, when the recipe does not.
    """

    recipe: str
    machine: Machine
    stage: StageKind
    parameters: dict[str, int]
    learning: dict[str, int]
    batch: Batch
    memory: Memory
    parts: dict[str, Memory]
    usable: float
    largest_micro: int
    duration: Duration | None
    data: DataFacts | None
    unknown: tuple[str, ...]
    is_published: bool
    disk: dict[str, float]
    traffic: Traffic
    remedies: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the recipe fits as it is."""
        return self.memory.total <= self.usable


def make_plan(
    recipe: Recipe,
    machine: Machine,
    *,
    mfu: float | None = None,
    data: DataFacts | None = None,
    shape: ModelShape | None = None,
) -> Plan:
    """Plan a recipe on a machine.

    mfu:   share of the peak that steps reach, 0..1; None for the stage's default.
    data:  what an epoch brings, in place of what is known of the recipe's data sets.
    shape: of the recipe's model, where it is known already.
    Raises ConfigError when nothing is known of the model, or the batch cannot be dealt to the devices.
    """
    shape, learning = shape or shape_of(config_of(recipe.model)), Learning.of(recipe.stage)
    unknown: list[str] = []
    is_given = data is not None
    if data is None:
        data, unknown = expected_data(recipe)
    size = recipe.batch.rows or recipe.batch.samples
    asked_micro = recipe.batch.micro
    recipe = with_micro(recipe, fitting_micro(machine.gpus, size, asked_micro))
    accumulation = size // (machine.gpus * recipe.batch.micro)
    memory = memory_of(recipe, machine, shape, learning)
    usable = usable_bytes(machine)
    stage = stage_of(recipe)
    counts = count_parameters(shape)
    learnt = count_learning(shape, learning)
    plan = Plan(
        recipe=recipe.name,
        machine=machine,
        stage=stage,
        parameters=counts,
        learning=learnt,
        batch=Batch(
            "rows" if recipe.batch.rows else "samples",
            size,
            recipe.batch.micro,
            asked_micro,
            accumulation,
            *_step(recipe, shape, data),
        ),
        memory=memory,
        parts=by_component(
            shape, learning, holding_of(recipe, machine), worst_micro(recipe, shape, recipe.batch.micro)
        ),
        usable=usable,
        largest_micro=largest_micro(recipe, machine, shape, learning),
        duration=None,
        data=data,
        unknown=tuple(unknown),
        is_published=not is_given and data is not None,
        disk=_disk(recipe, sum(counts.values()), sum(learnt.values())),
        traffic=step_traffic(
            machine,
            recipe.compute.sharding,
            parameters=sum(counts.values()),
            learnt=sum(learnt.values()),
            units=shape.llm.layers + shape.tower.layers + 2,
            learning_units=1 + (shape.llm.layers + 1) * learning.llm + shape.tower.layers * learning.vision,
            micro_batches=accumulation,
            reshard=recipe.compute.reshard,
        ),
        remedies=(),
    )
    if data is not None:
        plan = replace(plan, duration=_duration(recipe, machine, shape, learning, data, plan.batch, mfu))
    return plan if plan.fits else replace(plan, remedies=tuple(remedies(recipe, machine, shape)))


def stage_of(recipe: Recipe) -> StageKind:
    """Which of VILA's three stages a recipe is most like: by what learns, and by its data."""
    if recipe.stage.tune == ("projector",):
        return "align"
    pages = {"mmc4", "coyo"} & {entry.format for entry in recipe.data.mixture}
    return "pretrain" if recipe.data.template == "page" or pages else "sft"


def _step(recipe: Recipe, shape: ModelShape, data: DataFacts | None) -> tuple[float, float]:
    """Samples and tokens of a step; without facts on the data, those of full rows, and no samples."""
    rows, samples = recipe.batch.rows, recipe.batch.samples
    each = min(data.tokens(shape.media_tokens), recipe.data.max_length) if data else 0.0
    if rows:
        tokens = rows * recipe.data.max_length * FILL
        return (tokens / each if each else 0.0), tokens
    return float(samples), samples * (each or recipe.data.max_length)


def _duration(
    recipe: Recipe,
    machine: Machine,
    shape: ModelShape,
    learning: Learning,
    data: DataFacts,
    batch: Batch,
    mfu: float | None,
) -> Duration:
    mfu = DEFAULT_MFU[stage_of(recipe)] if mfu is None else mfu
    tokens = float(recipe.budget.tokens or batch.tokens / batch.samples * data.samples * recipe.budget.epochs)
    steps = math.ceil(tokens / batch.tokens)
    length = batch.tokens / batch.samples
    flops = step_flops(
        shape,
        learning,
        tokens=batch.tokens,
        pairs=batch.samples * length * (length + 1) / 2,
        supervised=batch.samples * data.supervised,
        images=0 if recipe.compute.feature_cache else batch.samples * data.images,
    )
    step_s = flops.total / (machine.gpus * machine.device.tflops * 1e12 * mfu)
    hours = steps * step_s / 3600
    return Duration(steps, tokens, flops, mfu, step_s, hours, hours * machine.gpus)


def _disk(recipe: Recipe, parameters: int, learnt: int) -> dict[str, float]:
    """Bytes: a checkpoint holds float32 masters and two moments of what learns; the model is bfloat16."""
    one = 12.0 * learnt
    adapter = bool(recipe.stage.lora.rank)
    return {
        "checkpoint": one,
        "checkpoints": one * (recipe.output.keep_last + recipe.output.keep_best + 1),
        "model": 2.0 * (learnt if adapter else parameters),
    }
