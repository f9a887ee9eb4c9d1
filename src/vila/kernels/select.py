"""Selection of the INT4 backend (torch, aten, triton), once for all 4-bit layers of a model, and logged."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn

from vila.core.errors import ConfigError, UnknownNameError
from vila.core.progress import SILENT, Events
from vila.core.registry import Registry
from vila.kernels.int4 import BACKEND as REFERENCE
from vila.kernels.int4 import Int4Backend, Int4Linear

BACKENDS: Registry[Int4Backend] = Registry(
    "int4 backend",
    {
        "torch": "vila.kernels.int4:BACKEND",
        "aten": "vila.kernels.aten:BACKEND",
        "triton": "vila.kernels.triton:BACKEND",
    },
)
AUTO = "auto"
_PREFERRED = {"cuda": ("triton", "aten", "torch"), "cpu": ("aten", "torch")}


@dataclass(frozen=True)
class BackendChoice:
    """The backend selected for a model.

    skipped:   backends that "auto" tried before, and why they were not selected.
    fallbacks: layers that use the reference backend because of their shape, and why.
    """

    name: str
    device: str
    dtype: torch.dtype
    num_layers: int
    skipped: tuple[tuple[str, str], ...] = ()
    fallbacks: tuple[tuple[str, str], ...] = ()

    def describe(self) -> str:
        """Return one line for the log, plus one per skipped backend and fallback layer."""
        kind = str(self.dtype).removeprefix("torch.")
        lines = [f"int4: {self.name} on {self.device}, {kind} activations, {self.num_layers} layers"]
        lines += [f"int4: not {name}: {why}" for name, why in self.skipped]
        lines += [f"int4: {layer} uses the reference: {why}" for layer, why in self.fallbacks]
        return "\n".join(lines)


def unavailable_reason(name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Return why backend `name` cannot run on a device with an activation dtype; empty if it can.

    Raises UnknownNameError.
    """
    if name not in BACKENDS:
        raise UnknownNameError("int4 backend", name, [AUTO, *BACKENDS])
    if name == "triton" and find_spec("triton") is None:
        return "Triton is not installed (it comes with PyTorch's CUDA builds)"
    return BACKENDS[name].unavailable(torch.device(device), dtype)


def use_backend(
    model: nn.Module, name: str = AUTO, *, dtype: torch.dtype, events: Events = SILENT
) -> BackendChoice | None:
    """Select one backend for every Int4Linear of `model`, for activations of `dtype`; None if there are no such layers.

    "auto" selects the first that can run: triton, aten, torch on CUDA; aten, torch on a CPU. Layers whose shape the
    selected backend does not support then use the reference backend. The choice is logged to `events`.
    Raises UnknownNameError; ConfigError if a backend requested by name cannot run or does not support a layer, or if
    the layers are on several device types.
    """
    layers = {where: layer for where, layer in model.named_modules() if isinstance(layer, Int4Linear)}
    if not layers:
        return None
    kinds = {layer.codes.device.type for layer in layers.values()}
    if len(kinds) > 1:
        raise ConfigError(
            "int4 layers on several device types", value=sorted(kinds), hint="move the model to one device"
        )
    device = next(iter(layers.values())).codes.device
    chosen, passed = _choose(name, device, dtype)
    product = BACKENDS[chosen]
    refused = {
        where: why
        for where, layer in layers.items()
        if (why := product.unsupported(layer.in_features, layer.out_features, layer.group_size))
    }
    if refused and name != AUTO:
        raise ConfigError.collect(
            f"int4 backend {name!r}", (f"{where or 'layer'}: {why}" for where, why in refused.items())
        )
    for where, layer in layers.items():
        layer.use_backend(REFERENCE if where in refused else product, dtype)
    choice = BackendChoice(chosen, _device_name(device), dtype, len(layers), passed, tuple(refused.items()))
    events.log(choice.describe())
    return choice


def _choose(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return the backend's name, and the skipped backends with reasons."""
    if name != AUTO:
        if why := unavailable_reason(name, device, dtype):
            raise ConfigError(why, field="int4 backend", value=name, hint="choose another backend, or 'auto'")
        return name, ()
    passed: list[tuple[str, str]] = []
    for candidate in _PREFERRED.get(device.type, ("torch",)):
        why = unavailable_reason(candidate, device, dtype)
        if not why:
            return candidate, tuple(passed)
        passed.append((candidate, why))
    raise AssertionError("the reference runs everywhere")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
