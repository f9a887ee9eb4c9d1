"""What accelerators can do: peak arithmetic, memory and the speed of their links, from their makers' data sheets."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from vila.core.errors import ConfigError, near_names

NODE = 8
"""Devices of a node."""


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of accelerator.

    tflops:    dense bfloat16 products with float32 sums, in 1e12 operations a second.
    memory_gb: as sold, in GB of which one is 2**30 bytes.
    link_gb_s: what one device sends to its neighbours in a node, in 1e9 bytes a second and direction.
    """

    name: str
    tflops: float
    memory_gb: int
    link_gb_s: float


# Most telling words first: "H100 PCIe" before "H100". Rates are the dense ones, half of those printed "with
# sparsity"; GeForce cards are given with float32 accumulation, which halves their rate once more.
_TABLE: tuple[tuple[str, Device], ...] = (
    ("b200", Device("B200", 2250.0, 180, 900.0)),
    ("gh200", Device("GH200", 989.4, 96, 450.0)),
    ("h200", Device("H200", 989.4, 141, 450.0)),
    ("h100 pcie", Device("H100-PCIe", 756.0, 80, 64.0)),
    ("h100 nvl", Device("H100-NVL", 835.0, 94, 300.0)),
    ("h100", Device("H100", 989.4, 80, 450.0)),
    ("h800", Device("H800", 989.4, 80, 200.0)),
    ("h20", Device("H20", 148.0, 96, 450.0)),
    ("a100", Device("A100", 312.0, 80, 300.0)),
    ("a800", Device("A800", 312.0, 80, 200.0)),
    ("l40s", Device("L40S", 362.0, 48, 32.0)),
    ("l40", Device("L40", 181.0, 48, 32.0)),
    ("l4", Device("L4", 121.0, 24, 32.0)),
    ("rtx 6000 ada", Device("RTX-6000-Ada", 364.2, 48, 32.0)),
    ("a6000", Device("A6000", 154.8, 48, 32.0)),
    ("a40", Device("A40", 149.7, 48, 32.0)),
    ("a30", Device("A30", 165.0, 24, 32.0)),
    ("a10g", Device("A10G", 70.0, 24, 32.0)),
    ("a10", Device("A10", 125.0, 24, 32.0)),
    ("5090", Device("RTX-5090", 209.5, 32, 64.0)),
    ("4090", Device("RTX-4090", 165.2, 24, 32.0)),
    ("4080", Device("RTX-4080", 97.5, 16, 32.0)),
    ("3090 ti", Device("RTX-3090-Ti", 80.0, 24, 32.0)),
    ("3090", Device("RTX-3090", 71.0, 24, 32.0)),
)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run is planned for: `gpus` devices in all, at most `per_node` of them in a node."""

    device: Device
    gpus: int
    per_node: int

    @property
    def memory(self) -> float:
        """Bytes of one device."""
        return self.device.memory_gb * 2.0**30

    @property
    def text(self) -> str:
        """Such as `8xA100-80G`."""
        return f"{self.gpus}x{self.device.name}-{self.device.memory_gb}G"


def find_device(name: str) -> Device | None:
    """The device that a driver calls `name`, such as `NVIDIA A100-SXM4-80GB`; None when it is not known."""
    words = f" {' '.join(re.findall(r'[a-z]+[0-9]+[a-z]*|[a-z]+|[0-9]+', name.lower()))} "
    return next((device for key, device in _TABLE if f" {key} " in words), None)


def peak_tflops(name: str) -> float | None:
    """Dense bfloat16 peak of the device that a driver calls `name`, in 1e12 operations a second, None if unknown."""
    device = find_device(name)
    return device.tflops if device else None


def parse_machine(text: str) -> Machine:
    """`8xA100-80G`, `128xH100`, `RTX-4090`: a count, a device, and its memory where it comes in several sizes.

    More than eight devices are taken to be nodes of eight. Raises ConfigError naming what is known.
    """
    match = re.fullmatch(
        r"(?:(?P<count>\d+)\s*[x*])?\s*(?P<name>[\w .-]*?)(?:[- ](?P<memory>\d+)\s*(?:GiB|GB|G))?", text
    )
    device = find_device(match["name"]) if match else None
    if match is None or device is None:
        known = sorted(device.name for _, device in _TABLE)
        near = near_names(match["name"], known) if match else []
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(
            f"--gpus {text!r}: expected something like 8xA100-80G", hint=f"{hint}known devices are {', '.join(known)}"
        )
    gpus = int(match["count"] or 1)
    if gpus < 1:
        raise ConfigError(f"--gpus {text!r}: at least one device is needed")
    memory = int(match["memory"] or device.memory_gb)
    if memory < 1:
        raise ConfigError(f"--gpus {text!r}: a device has more than {memory} GB")
    if gpus > NODE and gpus % NODE:
        raise ConfigError(f"--gpus {text!r}: {gpus} devices do not fill nodes of {NODE}")
    return Machine(Device(device.name, device.tflops, memory, device.link_gb_s), gpus, min(gpus, NODE))


# --- traffic
# What the ranks of a run send to each other, how long that takes, and what is left of their speed.


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
