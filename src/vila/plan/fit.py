"""Whether a recipe fits on a machine, the largest micro-batch that does, and what else would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from vila.config.load import recipe_changes
from vila.config.schema import Recipe
from vila.plan.devices import NODE, Machine
from vila.plan.learning import Learning
from vila.plan.memory import Holding, Memory, Micro, peak_memory
from vila.plan.shape import ModelShape

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
