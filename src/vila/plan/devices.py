"""Accelerators: peak throughput, memory and link speed, from data sheets; communication time of a training step."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from vila.core.errors import ConfigError, near_names

NODE = 8
"""Devices per node."""


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator.

    tflops:    dense bfloat16 throughput with float32 accumulation, in TFLOP/s.
    memory_gb: nominal memory, in units of 2**30 bytes.
    link_gb_s: bandwidth to the other devices of the node, in 1e9 bytes/s per direction.
    """

    name: str
    tflops: float
    memory_gb: int
    link_gb_s: float


# Longer names first: "H100 PCIe" before "H100". Throughput is dense, half of that "with sparsity"; for GeForce cards
# with float32 accumulation, which halves it again.
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
    """Target of a plan: `gpus` devices in total, up to `per_node` in a node."""

    device: Device
    gpus: int
    per_node: int

    @property
    def memory(self) -> float:
        """Memory of one device in bytes."""
        return self.device.memory_gb * 2.0**30

    @property
    def text(self) -> str:
        """Short form, such as `8xA100-80G`."""
        return f"{self.gpus}x{self.device.name}-{self.device.memory_gb}G"


def find_device(name: str) -> Device | None:
    """Return the device with the driver name `name`, such as `NVIDIA A100-SXM4-80GB`; None if unknown."""
    words = f" {' '.join(re.findall(r'[a-z]+[0-9]+[a-z]*|[a-z]+|[0-9]+', name.lower()))} "
    return next((device for key, device in _TABLE if f" {key} " in words), None)


def peak_tflops(name: str) -> float | None:
    """Return the dense bfloat16 peak of the device with this driver name, in TFLOP/s; None if unknown."""
    device = find_device(name)
    return device.tflops if device else None


def parse_machine(text: str) -> Machine:
    """Parse `8xA100-80G`, `128xH100` or `RTX-4090`: number, device, and memory if there are several sizes.

    More than eight devices are nodes of eight. Raises ConfigError, for unknown devices with all known ones.
    """
    match = re.fullmatch(
        r"(?:(?P<count>\d+)\s*[x*])?\s*(?P<name>[\w .-]*?)(?:[- ](?P<memory>\d+)\s*(?:GiB|GB|G))?", text
    )
    device = find_device(match["name"]) if match else None
    if match is None or device is None:
        known = sorted(device.name for _, device in _TABLE)
        near = near_names(match["name"], known) if match else []
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        hint = f"{hint}known devices: {', '.join(known)}"
        raise ConfigError(field="--gpus", value=text, expected="a number and a device, such as 8xA100-80G", hint=hint)
    gpus = int(match["count"] or 1)
    if gpus < 1:
        raise ConfigError(field="--gpus", value=text, expected="at least one device")
    memory = int(match["memory"] or device.memory_gb)
    if memory < 1:
        raise ConfigError(field="--gpus", value=text, expected="at least 1 GB per device")
    if gpus > NODE and gpus % NODE:
        raise ConfigError(field="--gpus", value=text, expected=f"a multiple of {NODE}, the devices of a node")
    return Machine(Device(device.name, device.tflops, memory, device.link_gb_s), gpus, min(gpus, NODE))


# Communication between ranks

Sharding = Literal["full", "hybrid", "replicate"]

_FLOAT32 = 4
_HALF = 2
_BUCKET = 2**24
"""Gradient elements per all-reduce bucket without sharding."""


@dataclass(frozen=True, slots=True)
class Network:
    """Assumptions about the links.

    efficiency: fraction of the nominal bandwidth that collectives reach.
    nic_gb_s:   bandwidth of one device to other nodes, in 1e9 bytes/s: one 200 Gbit/s adapter per device.
    hop_s:      latency of a message between neighbouring ranks, in seconds.
    """

    efficiency: float = 0.8
    nic_gb_s: float = 25.0
    hop_s: float = 4e-6


@dataclass(frozen=True, slots=True)
class Traffic:
    """Data that one rank receives in a step, and the time it takes.

    intra_node, inter_node: bytes from ranks of the same node, and from other nodes (per rank of the node).
    transfer_s, latency_s:  seconds for the bytes, and for the hops of the messages.
    """

    intra_node: float
    inter_node: float
    transfer_s: float
    latency_s: float

    @property
    def total_seconds(self) -> float:
        """Transfer and latency, in seconds."""
        return self.transfer_s + self.latency_s


def step_traffic(
    machine: Machine,
    sharding: Sharding,
    *,
    parameters: int,
    num_trainable: int,
    units: int,
    trainable_units: int,
    micro_batches: int,
    reshard: bool = True,
    network: Network | None = None,
) -> Traffic:
    """Return the traffic of one step.

    sharding:        `full`: per micro-batch, all-gather of all bfloat16 weights (twice with `reshard`) and
                     reduce-scatter of the float32 gradients; `hybrid`: the same inside a node, then an all-reduce of
                     each rank's shard over nodes; `replicate`: one all-reduce of the gradients over all ranks.
    parameters:      of the model; `num_trainable` of them are trainable.
    units:           modules that are gathered separately; `trainable_units` of them have gradients.
    """
    network = network or Network()
    gathers = micro_batches * (2 if reshard else 1)
    if sharding == "replicate":
        return _collective(
            machine, machine.gpus, 2 * _FLOAT32 * num_trainable, 2 * math.ceil(num_trainable / _BUCKET), network
        )
    across = machine.gpus if sharding == "full" else machine.per_node
    size = gathers * _HALF * parameters + micro_batches * _FLOAT32 * num_trainable
    first = _collective(machine, across, size, units * gathers + trainable_units * micro_batches, network)
    nodes = machine.gpus // machine.per_node
    if sharding == "full" or nodes == 1:
        return first
    # Every rank all-reduces its own shard over nodes, in parallel: per node, one copy of the gradients.
    inter_node = micro_batches * 2 * _FLOAT32 * num_trainable / machine.per_node * (nodes - 1) / nodes
    transfer_s = inter_node / (network.nic_gb_s * 1e9 * network.efficiency)
    latency_s = micro_batches * trainable_units * 2 * nodes * network.hop_s
    return Traffic(first.intra_node, inter_node, first.transfer_s + transfer_s, first.latency_s + latency_s)


def _collective(machine: Machine, ranks: int, size: float, calls: int, network: Network) -> Traffic:
    """Return the traffic of `calls` ring collectives that bring `size` bytes in total to each of `ranks` ranks."""
    if ranks == 1:
        return Traffic(0.0, 0.0, 0.0, 0.0)
    received = size * (ranks - 1) / ranks
    nodes = math.ceil(ranks / machine.per_node)
    # The ranks of a node need the same bytes from other nodes: they are transferred once, over all adapters.
    inter_node = size * (nodes - 1) / nodes / machine.per_node
    rate_in, rate_out = (rate * 1e9 * network.efficiency for rate in (machine.device.link_gb_s, network.nic_gb_s))
    return Traffic(
        received - inter_node, inter_node, max(received / rate_in, inter_node / rate_out), calls * ranks * network.hop_s
    )
