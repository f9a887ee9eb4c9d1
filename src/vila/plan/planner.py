"""A recipe on a machine, before anything runs: parameters, memory, batch, time and disk, and what would fit instead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vila.config.load import recipe_changes
from vila.config.schema import Recipe
from vila.data.packing import fit_micro_batch
from vila.plan.devices import NODE, Machine, Sharding, Traffic, efficiency, step_traffic
from vila.plan.flops import Flops, Learning, count_learning, step_flops
from vila.plan.memory import Holding, Memory, Micro, by_component, peak_memory
from vila.plan.model_shape import ModelShape, config_of, count_parameters, shape_of
from vila.plan.published_data import DataFacts, expected_data

# --- fit
# Whether a recipe fits on a machine, the largest micro-batch that does, and what else would.


_CONTEXT_BYTES = 1.5 * 2**30
"""CUDA's context, the libraries' workspaces and the buffers of NCCL."""
_FOLLOWING = ("stage.tune", "stage.llm_parts")
"""Fields that give way to adapters by themselves."""
_USED = 0.95
"""Share of what is left that tensors can fill; the allocator's gaps take the rest."""


def usable_bytes(machine: Machine) -> float:
    """Bytes of a device that a plan may fill."""
    return (machine.memory - _CONTEXT_BYTES) * _USED


def holding_of(recipe: Recipe, machine: Machine) -> Holding:
    """How the recipe's model is held on the machine."""
    compute = recipe.compute
    ranks = {"full": machine.gpus, "hybrid": machine.per_node, "replicate": 1}[compute.sharding]
    size = recipe.batch.rows or recipe.batch.samples
    return Holding(
        size=4 if compute.dtype == "float32" else 2,
        dealt=ranks,
        reshard=compute.reshard,
        recompute=compute.checkpoint_every if compute.gradient_checkpointing else 0,
        accumulated=size > machine.gpus * recipe.batch.micro,
        cached=compute.feature_cache,
        llm_bits=recipe.stage.lora.bits,
    )


def worst_micro(recipe: Recipe, shape: ModelShape, rows: int) -> Micro:
    """The largest micro-batch that a recipe allows: full rows, full of pictures, every label learnt."""
    length = recipe.data.max_length
    images = length // shape.media_tokens
    images = min(images, recipe.data.max_images or images)
    return Micro(rows, length, rows * images, rows * length)


def largest_micro(recipe: Recipe, machine: Machine, shape: ModelShape, learning: Learning) -> int:
    """The most rows of a micro-batch that fit and that the global batch can be dealt in; 0 when not even one does."""
    share = (recipe.batch.rows or recipe.batch.samples) // machine.gpus
    best = 0
    for rows in (number for number in range(1, share + 1) if share % number == 0):
        if memory_of(with_micro(recipe, rows), machine, shape, learning).total > usable_bytes(machine):
            break
        best = rows
    return best


def memory_of(recipe: Recipe, machine: Machine, shape: ModelShape, learning: Learning) -> Memory:
    """The greatest moment of one device, for the largest micro-batch that the recipe allows."""
    return peak_memory(shape, learning, holding_of(recipe, machine), worst_micro(recipe, shape, recipe.batch.micro))


def remedies(recipe: Recipe, machine: Machine, shape: ModelShape) -> list[str]:
    """What would fit in place of a recipe that does not: options and overrides, the mildest change first."""
    saved = _with(recipe, {"gradient_checkpointing": True, "checkpoint_every": 1})
    dealt = _with(saved, {"sharding": "full"})
    here = [(changed, machine) for changed in (recipe, saved, dealt)]
    found = [_described(recipe, machine, *one) for one in _fitting(here, shape)][:1]
    found += [_described(recipe, machine, *one) for one in _fitting(_larger(dealt, machine), shape)][:1]
    for bits in (16, 4):
        if adapted := _adapted(dealt, bits):
            found += [_described(recipe, machine, *one) for one in _fitting([(adapted, machine)], shape)]
    return found


def _fitting(tried: Iterable[tuple[Recipe, Machine]], shape: ModelShape) -> Iterator[tuple[Recipe, Machine]]:
    """Those that fit, with the largest micro-batch that does and is no larger than asked for."""
    for recipe, machine in tried:
        if micro := largest_micro(recipe, machine, shape, Learning.of(recipe.stage)):
            while micro > recipe.batch.micro:
                micro = max(number for number in range(1, micro) if micro % number == 0)
            yield with_micro(recipe, micro), machine


def _larger(recipe: Recipe, machine: Machine) -> Iterator[tuple[Recipe, Machine]]:
    """The same on two, four, ... times the devices, as far as the global batch reaches."""
    size, gpus = recipe.batch.rows or recipe.batch.samples, machine.gpus * 2
    while gpus <= size and size % gpus == 0:
        yield recipe, Machine(machine.device, gpus, min(gpus, NODE))
        gpus *= 2


def _adapted(recipe: Recipe, bits: Literal[4, 16]) -> Recipe | None:
    """Adapters in place of the LLM's own weights, which lie there in so many bits."""
    if "llm" not in recipe.stage.tune:
        return None
    lora = recipe.stage.lora.model_copy(update={"rank": recipe.stage.lora.rank or 64, "bits": bits})
    tune = tuple(part for part in recipe.stage.tune if part != "vision")
    stage = recipe.stage.model_copy(update={"lora": lora, "llm_parts": (), "tune": tune})
    # Quantized weights cannot be dealt out.
    changed = recipe if bits == 16 else _with(recipe, {"sharding": "replicate"})
    return changed.model_copy(update={"stage": stage})


def _described(before: Recipe, machine: Machine, recipe: Recipe, larger: Machine) -> str:
    """What is different, as one would type it."""
    words = [] if larger == machine else [f"--gpus {larger.text}"]
    for key, _, now in recipe_changes(before, recipe):
        if key not in _FOLLOWING:
            words.append(f"{key}={now.strip(chr(39)).lower()}")
    return " ".join(words)


def _with(recipe: Recipe, compute: Mapping[str, object]) -> Recipe:
    """The recipe with other settings of `compute`."""
    return recipe.model_copy(update={"compute": recipe.compute.model_copy(update=compute)})


def with_micro(recipe: Recipe, micro: int) -> Recipe:
    """The recipe with another micro-batch."""
    return recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro": micro})})


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
    recipe = with_micro(recipe, fit_micro_batch(machine.gpus, size, asked_micro))
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


# --- scaling
# How a stage scales with the number of devices: arithmetic beside traffic, on paper.


COMPUTE_MFU = 0.5
"""Share of the peak that a lone device is taken to reach."""


@dataclass(frozen=True, slots=True)
class Point:
    """One stage on one machine, dealt out in one way.

    rows:        samples or rows of a rank in a step, in `micro_batches` of them.
    tokens:      of a rank in a step.
    compute_s:   seconds of arithmetic in a step at `COMPUTE_MFU`.
    traffic:     what a rank receives in a step.
    memory:      bytes of a device at its greatest moment.
    """

    gpus: int
    sharding: Sharding
    rows: int
    micro_batches: int
    tokens: float
    compute_s: float
    traffic: Traffic
    memory: float

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of a lone device's speed, 0..1: with no traffic hidden behind arithmetic, and with all of it."""
        return efficiency(self.compute_s, self.traffic)

    @property
    def break_even(self) -> float:
        """Tokens of a rank's step whose arithmetic takes as long as the traffic."""
        return self.tokens * self.traffic.total_seconds / self.compute_s

    @property
    def limit(self) -> str:
        """What a step waits for."""
        if self.compute_s >= self.traffic.total_seconds:
            return "arithmetic"
        return "hops" if self.traffic.waiting > self.traffic.seconds else "bytes"


def scaling(recipe: Recipe, machine: Machine, gpus: Sequence[int], sharding: Sequence[Sharding]) -> list[Point]:
    """The points of a recipe whose global batch stays as it is; numbers of devices that it cannot be dealt to are left
    out. A micro-batch is the recipe's, or what a rank has where that is less."""
    shape = shape_of(config_of(recipe.model))
    return [
        _point(recipe, Machine(machine.device, number, min(number, machine.per_node)), how, shape)
        for number in gpus
        for how in sharding
        if (recipe.batch.rows or recipe.batch.samples) % number == 0
    ]


def _point(recipe: Recipe, machine: Machine, sharding: Sharding, shape: ModelShape) -> Point:
    share = (recipe.batch.rows or recipe.batch.samples) // machine.gpus
    compute = recipe.compute.model_copy(update={"sharding": sharding})
    recipe = recipe.model_copy(update={"compute": compute})
    plan = make_plan(recipe, machine, mfu=COMPUTE_MFU, shape=shape)
    assert plan.duration is not None
    return Point(
        gpus=machine.gpus,
        sharding=sharding,
        rows=share,
        micro_batches=plan.batch.accumulation,
        tokens=plan.batch.tokens / machine.gpus,
        compute_s=plan.duration.step_s,
        traffic=plan.traffic,
        memory=plan.memory.total,
    )
