"""Plan a recipe on a machine: parameters, memory, batch, time, disk space, and configurations that fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from vila.config.load import recipe_changes
from vila.config.schema import Recipe
from vila.data.packing import fit_micro_batch
from vila.plan.devices import NODE, Machine, Traffic, step_traffic
from vila.plan.flops import Flops, TrainableParts, count_trainable, step_flops
from vila.plan.memory import Memory, MemoryConfig, MicroBatch, memory_by_component, peak_memory
from vila.plan.model_shape import ModelShape, config_of, count_parameters, shape_of
from vila.plan.published_data import DataStats, published_stats

_CONTEXT_BYTES = 1.5 * 2**30
"""CUDA context, workspaces of libraries, and NCCL buffers, in bytes."""
_FOLLOWING = ("stage.tune", "stage.llm_parts")
"""Fields that adapters exclude, see `vila.config.load`."""
_USED = 0.95
"""Fraction of the remaining memory that tensors can use; the rest is lost to fragmentation."""


def usable_bytes(machine: Machine) -> float:
    """Return the bytes of a device that tensors can use."""
    return (machine.memory - _CONTEXT_BYTES) * _USED


def memory_config(recipe: Recipe, machine: Machine) -> MemoryConfig:
    """Return the memory settings of a recipe on a machine."""
    compute = recipe.compute
    ranks = {"full": machine.gpus, "hybrid": machine.per_node, "replicate": 1}[compute.sharding]
    size = recipe.batch.rows or recipe.batch.samples
    return MemoryConfig(
        dtype_bytes=4 if compute.dtype == "float32" else 2,
        num_shards=ranks,
        reshard=compute.reshard,
        recompute=compute.checkpoint_every if compute.gradient_checkpointing else 0,
        accumulates=size > machine.gpus * recipe.batch.micro,
        has_feature_cache=compute.feature_cache,
        llm_bits=recipe.stage.lora.bits,
    )


def worst_micro_batch(recipe: Recipe, shape: ModelShape, rows: int) -> MicroBatch:
    """Return the largest micro-batch of a recipe: full sequences, full of images, all tokens supervised."""
    length = recipe.data.max_length
    images = length // shape.media_tokens
    images = min(images, recipe.data.max_images or images)
    return MicroBatch(rows, length, rows * images, rows * length)


def largest_micro_batch(recipe: Recipe, machine: Machine, shape: ModelShape, trainable: TrainableParts) -> int:
    """Return the largest micro-batch, in sequences, that fits and divides the batch of a rank; 0 if none fits."""
    share = (recipe.batch.rows or recipe.batch.samples) // machine.gpus
    best = 0
    for rows in (number for number in range(1, share + 1) if share % number == 0):
        if recipe_memory(with_micro_batch(recipe, rows), machine, shape, trainable).total > usable_bytes(machine):
            break
        best = rows
    return best


def recipe_memory(recipe: Recipe, machine: Machine, shape: ModelShape, trainable: TrainableParts) -> Memory:
    """Return the peak memory of one device, for the largest micro-batch of the recipe."""
    return peak_memory(
        shape, trainable, memory_config(recipe, machine), worst_micro_batch(recipe, shape, recipe.batch.micro)
    )


def remedies(recipe: Recipe, machine: Machine, shape: ModelShape) -> list[str]:
    """Return command-line changes with which a recipe fits, the smallest change first."""
    saved = _with(recipe, {"gradient_checkpointing": True, "checkpoint_every": 1})
    sharded = _with(saved, {"sharding": "full"})
    here = [(changed, machine) for changed in (recipe, saved, sharded)]
    found = [_described(recipe, machine, *one) for one in _fitting(here, shape)][:1]
    found += [_described(recipe, machine, *one) for one in _fitting(_larger(sharded, machine), shape)][:1]
    for bits in (16, 4):
        if adapted := _adapted(sharded, bits):
            found += [_described(recipe, machine, *one) for one in _fitting([(adapted, machine)], shape)]
    return found


def _fitting(tried: Iterable[tuple[Recipe, Machine]], shape: ModelShape) -> Iterator[tuple[Recipe, Machine]]:
    """Yield the candidates that fit, with the largest micro-batch that fits and is at most that of the recipe."""
    for recipe, machine in tried:
        if micro := largest_micro_batch(recipe, machine, shape, TrainableParts.of(recipe.stage)):
            while micro > recipe.batch.micro:
                micro = max(number for number in range(1, micro) if micro % number == 0)
            yield with_micro_batch(recipe, micro), machine


def _larger(recipe: Recipe, machine: Machine) -> Iterator[tuple[Recipe, Machine]]:
    """Yield the recipe on 2, 4, ... times as many devices, while the global batch is divisible."""
    size, gpus = recipe.batch.rows or recipe.batch.samples, machine.gpus * 2
    while gpus <= size and size % gpus == 0:
        yield recipe, Machine(machine.device, gpus, min(gpus, NODE))
        gpus *= 2


def _adapted(recipe: Recipe, bits: Literal[4, 16]) -> Recipe | None:
    """Return the recipe with LoRA adapters and an LLM of `bits` bits; None if it does not train the LLM."""
    if "llm" not in recipe.stage.tune:
        return None
    lora = recipe.stage.lora.model_copy(update={"rank": recipe.stage.lora.rank or 64, "bits": bits})
    tune = tuple(part for part in recipe.stage.tune if part != "vision")
    stage = recipe.stage.model_copy(update={"lora": lora, "llm_parts": (), "tune": tune})
    # Quantized weights cannot be sharded.
    changed = recipe if bits == 16 else _with(recipe, {"sharding": "replicate"})
    return changed.model_copy(update={"stage": stage})


def _described(before: Recipe, machine: Machine, recipe: Recipe, larger: Machine) -> str:
    """Return the differences as command-line arguments."""
    words = [] if larger == machine else [f"--gpus {larger.text}"]
    for key, _, now in recipe_changes(before, recipe):
        if key not in _FOLLOWING:
            words.append(f"{key}={now.strip(chr(39)).lower()}")
    return " ".join(words)


def _with(recipe: Recipe, compute: Mapping[str, object]) -> Recipe:
    """Return the recipe with other settings of `compute`."""
    return recipe.model_copy(update={"compute": recipe.compute.model_copy(update=compute)})


def with_micro_batch(recipe: Recipe, micro: int) -> Recipe:
    """Return the recipe with another micro-batch."""
    return recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro": micro})})


StageKind = Literal["align", "pretrain", "sft"]

PUBLISHED_BATCH: dict[StageKind, int] = {"align": 256, "pretrain": 1024, "sft": 128}
"""Samples per step in VILA's three stages (arXiv 2312.07533 and its scripts)."""
DEFAULT_MFU: dict[StageKind, float] = {"align": 0.33, "pretrain": 0.30, "sft": 0.26}
"""Model FLOPs utilisation that follows from upstream's published training hours."""
PACKING_EFFICIENCY = 0.98
"""Fraction of non-padding tokens in packed sequences; benchmarks/data.md measures 94 to 99.98 %."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Batch of one step: `size` sequences or samples, in `accumulation` micro-batches of `micro` on each rank.

    asked_micro: `batch.micro` of the recipe; `micro` is smaller if the batch of a rank is not a multiple of it.
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
    """Duration of a stage at a model FLOPs utilisation of `mfu` (0..1)."""

    steps: int
    tokens: float
    flops: Flops
    mfu: float
    step_s: float
    hours: float
    gpu_hours: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Result of `vila plan`.

    parameters, trainable: number of parameters by component.
    memory:                peak memory of one device, of `usable` bytes.
    parts:                 memory by component, with all gradients and saved activations.
    largest_micro_batch:   largest micro-batch that fits, in sequences; 0: none.
    duration:              None if the size of the data is unknown; `unknown` are the paths.
    is_published:          whether all data sets are published ones.
    disk:                  bytes of a checkpoint, of all checkpoints while one is written, and of the model.
    traffic:               communication of a rank per step.
    remedies:              command-line changes with which the recipe fits, if it does not.
    """

    recipe: str
    machine: Machine
    stage: StageKind
    parameters: dict[str, int]
    trainable: dict[str, int]
    batch: Batch
    memory: Memory
    parts: dict[str, Memory]
    usable: float
    largest_micro_batch: int
    duration: Duration | None
    data: DataStats | None
    unknown: tuple[str, ...]
    is_published: bool
    disk: dict[str, float]
    traffic: Traffic
    remedies: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the recipe fits unchanged."""
        return self.memory.total <= self.usable


def make_plan(
    recipe: Recipe,
    machine: Machine,
    *,
    mfu: float | None = None,
    data: DataStats | None = None,
    shape: ModelShape | None = None,
) -> Plan:
    """Plan a recipe on a machine.

    mfu:   model FLOPs utilisation, 0..1; None: default of the stage.
    data:  size of an epoch; None: from the published sizes of the recipe's data sets.
    shape: sizes of the model; None: from its config.
    Raises ConfigError if the model is unknown, or the batch cannot be divided by the number of devices.
    """
    shape, trainable = shape or shape_of(config_of(recipe.model)), TrainableParts.of(recipe.stage)
    unknown: list[str] = []
    is_given = data is not None
    if data is None:
        data, unknown = published_stats(recipe)
    size = recipe.batch.rows or recipe.batch.samples
    asked_micro = recipe.batch.micro
    recipe = with_micro_batch(recipe, fit_micro_batch(machine.gpus, size, asked_micro))
    accumulation = size // (machine.gpus * recipe.batch.micro)
    memory = recipe_memory(recipe, machine, shape, trainable)
    usable = usable_bytes(machine)
    stage = stage_of(recipe)
    counts = count_parameters(shape)
    num_trainable = count_trainable(shape, trainable)
    plan = Plan(
        recipe=recipe.name,
        machine=machine,
        stage=stage,
        parameters=counts,
        trainable=num_trainable,
        batch=Batch(
            "rows" if recipe.batch.rows else "samples",
            size,
            recipe.batch.micro,
            asked_micro,
            accumulation,
            *_step(recipe, shape, data),
        ),
        memory=memory,
        parts=memory_by_component(
            shape, trainable, memory_config(recipe, machine), worst_micro_batch(recipe, shape, recipe.batch.micro)
        ),
        usable=usable,
        largest_micro_batch=largest_micro_batch(recipe, machine, shape, trainable),
        duration=None,
        data=data,
        unknown=tuple(unknown),
        is_published=not is_given and data is not None,
        disk=_disk(recipe, sum(counts.values()), sum(num_trainable.values())),
        traffic=step_traffic(
            machine,
            recipe.compute.sharding,
            parameters=sum(counts.values()),
            num_trainable=sum(num_trainable.values()),
            units=shape.llm.layers + shape.tower.layers + 2,
            trainable_units=1 + (shape.llm.layers + 1) * trainable.llm + shape.tower.layers * trainable.vision,
            micro_batches=accumulation,
            reshard=recipe.compute.reshard,
        ),
        remedies=(),
    )
    if data is not None:
        plan = replace(plan, duration=_duration(recipe, machine, shape, trainable, data, plan.batch, mfu))
    return plan if plan.fits else replace(plan, remedies=tuple(remedies(recipe, machine, shape)))


def stage_of(recipe: Recipe) -> StageKind:
    """Return which of VILA's three stages a recipe resembles, by trainable modules and data."""
    if recipe.stage.tune == ("projector",):
        return "align"
    pages = {"mmc4", "coyo"} & {entry.format for entry in recipe.data.mixture}
    return "pretrain" if recipe.data.template == "page" or pages else "sft"


def _step(recipe: Recipe, shape: ModelShape, data: DataStats | None) -> tuple[float, float]:
    """Return samples and tokens per step; if the data is unknown, 0 samples and the tokens of full sequences."""
    rows, samples = recipe.batch.rows, recipe.batch.samples
    each = min(data.tokens(shape.media_tokens), recipe.data.max_length) if data else 0.0
    if rows:
        tokens = rows * recipe.data.max_length * PACKING_EFFICIENCY
        return (tokens / each if each else 0.0), tokens
    return float(samples), samples * (each or recipe.data.max_length)


def _duration(
    recipe: Recipe,
    machine: Machine,
    shape: ModelShape,
    trainable: TrainableParts,
    data: DataStats,
    batch: Batch,
    mfu: float | None,
) -> Duration:
    mfu = DEFAULT_MFU[stage_of(recipe)] if mfu is None else mfu
    tokens = float(recipe.budget.tokens or batch.tokens / batch.samples * data.samples * recipe.budget.epochs)
    steps = math.ceil(tokens / batch.tokens)
    length = batch.tokens / batch.samples
    flops = step_flops(
        shape,
        trainable,
        tokens=batch.tokens,
        pairs=batch.samples * length * (length + 1) / 2,
        supervised=batch.samples * data.supervised,
        images=0 if recipe.compute.feature_cache else batch.samples * data.images,
    )
    step_s = flops.total / (machine.gpus * machine.device.tflops * 1e12 * mfu)
    hours = steps * step_s / 3600
    return Duration(steps, tokens, flops, mfu, step_s, hours, hours * machine.gpus)


def _disk(recipe: Recipe, parameters: int, num_trainable: int) -> dict[str, float]:
    """Return bytes: a checkpoint has float32 masters and two moments of trainable weights; the model is bfloat16."""
    one = 12.0 * num_trainable
    adapter = bool(recipe.stage.lora.rank)
    return {
        "checkpoint": one,
        "checkpoints": one * (recipe.output.keep_last + recipe.output.keep_best + 1),
        "model": 2.0 * (num_trainable if adapter else parameters),
    }
