"""What the ranks of a run send to each other, how long that takes, and what is left of their speed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vila.plan.devices import Machine

Sharding = Literal["full", "hybrid", "replicate"]

_FLOAT32 = 4
_HALF = 2
_BUCKET = 2**24
"""Numbers of gradients that travel together where nothing is dealt out."""


@dataclass(frozen=True, slots=True)
class Network:
    """What is assumed of the links.

    reached:      share of a link's rate that collectives reach.
    nic_gb_s:     rate of one device to other nodes, in 1e9 bytes a second: one 200 Gbit/s adapter each.
    hop_s:        seconds that a message takes from one rank to the next, whatever its size.
    """

    reached: float = 0.8
    nic_gb_s: float = 25.0
    hop_s: float = 4e-6


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one rank receives in a step, and the seconds that it takes.

    inside, outside: bytes from its own node, and from other nodes (its share of what the node receives).
    seconds:         of the links; `waiting` is the part of the time that goes to hops and no bytes.
    """

    inside: float
    outside: float
    seconds: float
    waiting: float

    @property
    def total_seconds(self) -> float:
        """Links and hops."""
        return self.seconds + self.waiting


def step_traffic(
    machine: Machine,
    sharding: Sharding,
    *,
    parameters: int,
    learnt: int,
    units: int,
    learning_units: int,
    micro_batches: int,
    reshard: bool = True,
    network: Network | None = None,
) -> Traffic:
    """The traffic of one step.

    full, hybrid: every micro-batch gathers all weights in bfloat16, twice with `reshard`, and sums float32 gradients
    of what learns; `hybrid` does so inside a node, and then sums over nodes the share that each rank holds.
    replicate:    gradients are summed over all ranks once a step.
    units:        modules that are gathered one by one; `learning_units` of them have gradients to sum.
    """
    network = network or Network()
    gathers = micro_batches * (2 if reshard else 1)
    if sharding == "replicate":
        return _collective(machine, machine.gpus, 2 * _FLOAT32 * learnt, 2 * math.ceil(learnt / _BUCKET), network)
    across = machine.gpus if sharding == "full" else machine.per_node
    size = gathers * _HALF * parameters + micro_batches * _FLOAT32 * learnt
    first = _collective(machine, across, size, units * gathers + learning_units * micro_batches, network)
    nodes = machine.gpus // machine.per_node
    if sharding == "full" or nodes == 1:
        return first
    # The ranks of a node sum their own shares with those of other nodes, all at once: together one node's gradients.
    outside = micro_batches * 2 * _FLOAT32 * learnt / machine.per_node * (nodes - 1) / nodes
    seconds = outside / (network.nic_gb_s * 1e9 * network.reached)
    waiting = micro_batches * learning_units * 2 * nodes * network.hop_s
    return Traffic(first.inside, outside, first.seconds + seconds, first.waiting + waiting)


def _collective(machine: Machine, ranks: int, size: float, calls: int, network: Network) -> Traffic:
    """Rings over `ranks` ranks through which `size` bytes reach each of them, in `calls` collectives."""
    if ranks == 1:
        return Traffic(0.0, 0.0, 0.0, 0.0)
    received = size * (ranks - 1) / ranks
    nodes = math.ceil(ranks / machine.per_node)
    # All ranks of a node need the same bytes from outside: they fetch them once, through all adapters together.
    outside = size * (nodes - 1) / nodes / machine.per_node
    rate_in, rate_out = (rate * 1e9 * network.reached for rate in (machine.device.link_gb_s, network.nic_gb_s))
    return Traffic(
        received - outside, outside, max(received / rate_in, outside / rate_out), calls * ranks * network.hop_s
    )


def efficiency(compute_s: float, traffic: Traffic) -> tuple[float, float]:
    """Share of a lone device's speed, 0..1: when no traffic hides behind arithmetic, and when all does."""
    return compute_s / (compute_s + traffic.total_seconds), compute_s / max(compute_s, traffic.total_seconds)
