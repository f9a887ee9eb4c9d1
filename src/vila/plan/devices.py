"""What accelerators can do: peak arithmetic, memory and the speed of their links, from their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

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
