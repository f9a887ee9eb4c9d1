"""How a stage scales with the number of devices: arithmetic beside traffic, on paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vila.config.schema import Recipe
from vila.plan.devices import Machine
from vila.plan.model_source import config_of
from vila.plan.planner import make_plan
from vila.plan.shape import ModelShape, shape_of
from vila.plan.traffic import Sharding, Traffic, efficiency

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
