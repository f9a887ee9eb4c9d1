"""Tables of docs/scaling.md: estimated computation and communication of VILA-7B's stages on 8 to 1,024 GPUs.

PYTHONPATH=. python benchmarks/scaling.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.data_packing import draw, stage_3
from vila.config.load import load_recipe
from vila.config.schema import Recipe
from vila.plan.devices import NODE, Machine, Network, Sharding, Traffic, parse_machine
from vila.plan.model_shape import config_of, shape_of
from vila.plan.planner import make_plan, usable_bytes

GPUS = (8, 32, 128, 256, 1024)
SHARES = (1, 4, 16)
STAGES = {
    "Stage 1, 256 samples per step": ("vila_7b/1_align", []),
    "Stage 2, 1,024 samples per step": ("vila_7b/2_pretrain", []),
    "Stage 3, 128 samples per step": ("vila_7b/3_sft", []),
    "Stage 3, packed, 128 rows of 4,096 tokens": (
        "vila_7b/3_sft",
        ["data.packing=rows", "batch.rows=128", "batch.samples=0", "batch.micro=4"],
    ),
}
WAYS: tuple[Sharding, ...] = ("full", "hybrid", "replicate")
COMPUTE_MFU = 0.5
"""Assumed model FLOPs utilisation of a single device."""
HEADER = ("GPUs", "Sharding", "Micro-batches", "Compute s", "Intra-node GB", "Inter-node GB", "Traffic s", "Latency s")
HEADER += ("Efficiency", "Bound by", "Peak GiB")


@dataclass(frozen=True, slots=True)
class ScalingPoint:
    """One stage on one machine with one way of sharding. All figures are per rank and step.

    rows:      samples or sequences, in `micro_batches` micro-batches.
    compute_s: seconds of computation at `COMPUTE_MFU`.
    memory:    peak memory in bytes.
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
        """Fraction (0..1) of the speed of a single device: without and with full overlap of communication."""
        communication_s = self.traffic.total_seconds
        return self.compute_s / (self.compute_s + communication_s), self.compute_s / max(
            self.compute_s, communication_s
        )

    @property
    def break_even(self) -> float:
        """Tokens per rank and step for which computation takes as long as communication."""
        return self.tokens * self.traffic.total_seconds / self.compute_s

    @property
    def limit(self) -> str:
        """Bottleneck of a step: compute, bandwidth or latency."""
        if self.compute_s >= self.traffic.total_seconds:
            return "compute"
        return "latency" if self.traffic.latency_s > self.traffic.transfer_s else "bandwidth"


def scaling(recipe: Recipe, machine: Machine, gpus: Sequence[int], ways: Sequence[Sharding]) -> list[ScalingPoint]:
    """Return a point per sharding and number of devices, if that divides the global batch, which is constant."""
    shape, batch = shape_of(config_of(recipe.model)), recipe.batch.rows or recipe.batch.samples
    points = []
    for number in (number for number in gpus if batch % number == 0):
        for way in ways:
            changed = recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"sharding": way})})
            target = Machine(machine.device, number, min(number, machine.per_node))
            plan = make_plan(changed, target, mfu=COMPUTE_MFU, shape=shape)
            assert plan.duration is not None
            points.append(
                ScalingPoint(
                    gpus=number,
                    sharding=way,
                    rows=batch // number,
                    micro_batches=plan.batch.accumulation,
                    tokens=plan.batch.tokens / number,
                    compute_s=plan.duration.step_s,
                    traffic=plan.traffic,
                    memory=plan.memory.total,
                )
            )
    return points


def table(title: str) -> str:
    """Return the Markdown table of a stage on A100-80G: configurations that fit; `hybrid` only with several nodes."""
    name, overrides = STAGES[title]
    machine = parse_machine("8xA100-80G")
    points = scaling(load_recipe(name, overrides), machine, GPUS, WAYS)
    shown = [
        point
        for point in points
        if point.memory <= usable_bytes(machine) and not (point.sharding == "hybrid" and point.gpus <= NODE)
    ]
    rows = [HEADER, ("---",) * len(HEADER), *(_cells(point) for point in shown)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(point: ScalingPoint) -> tuple[str, ...]:
    traffic, (least, most) = point.traffic, point.efficiency
    return (
        f"{point.gpus:,}",
        point.sharding,
        f"{point.micro_batches} of {point.rows // point.micro_batches}",
        f"{point.compute_s:.2f}",
        f"{traffic.intra_node / 1e9:.1f}",
        f"{traffic.inter_node / 1e9:.1f}",
        f"{traffic.total_seconds:.2f}",
        f"{traffic.latency_s:.2f}",
        f"{least:.0%} to {most:.0%}",
        point.limit,
        f"{point.memory / 2**30:.0f}",
    )


def break_even() -> str:
    """Return the table of tokens per GPU and micro-batch of stage 2 at which computation equals communication time."""
    machine = parse_machine("8xA100-80G")
    recipe = load_recipe("vila_7b/2_pretrain")
    rows = [("GPUs", *(f"{gpus:,}" for gpus in GPUS)), ("---",) * (len(GPUS) + 1)]
    for way in WAYS[:2]:
        points = scaling(recipe, machine, GPUS, [way])
        rows.append((way, *(f"{point.break_even / point.micro_batches:,.0f}" for point in points)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def load_balance() -> str:
    """Return the table of load balance: mean over maximum tokens per rank, for sampled lengths of stage 3."""
    lengths = np.array(draw(stage_3, 576, 128 * 200))
    rows = [("Samples per GPU", *(f"{each}" for each in SHARES)), ("---",) * (len(SHARES) + 1)]
    cells = []
    for each in SHARES:
        steps = lengths.reshape(-1, 128 // each, each).sum(axis=2)
        cells.append(f"{steps.mean() / steps.max(axis=1).mean():.0%}")
    return "\n".join(f"| {' | '.join(row)} |" for row in [*rows, ("Work / time", *cells)])


def main() -> int:
    print(Network())
    for title in STAGES:
        print(f"\n## {title}\n\n{table(title)}")
    print(f"\n## Break-even\n\n{break_even()}")
    print(f"\n## Load balance\n\n{load_balance()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
