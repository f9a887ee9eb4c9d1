"""Weights into .safetensors files, one tensor at a time: memory holds no more than the one that is being written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.model.safetensors_file import SHARD_BYTES, Declared, plan_file, plan_shards
from vila.model.weights import Shape


@dataclass(frozen=True)
class Made:
    """A tensor that is computed when its turn to be written comes, and forgotten afterwards."""

    shape: Shape
    dtype: torch.dtype
    make: Callable[[], Tensor]


Writable = Tensor | Made


def write_weights(tensors: Mapping[str, Writable], folder: Path, shard_size: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of at most `shard_size` bytes and their index, into an existing directory."""
    for file, names in plan_shards(_declared(tensors), folder, shard_size).items():
        write_file({name: tensors[name] for name in names}, folder / file)


def write_file(tensors: Mapping[str, Writable], path: Path) -> None:
    """Write one .safetensors file. Raises LayoutError for a type of number that such files do not know."""
    plan = plan_file(_declared(tensors), path)
    with path.open("wb") as stream:
        stream.write(plan.head)
        for name in plan.starts:
            made = finished(tensors[name])
            stream.write(made.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            del made


def finished(tensor: Writable) -> Tensor:
    """The tensor itself, computed now if need be. Raises RuntimeError when it is not what was announced."""
    if isinstance(tensor, Tensor):
        return tensor.detach()
    made = tensor.make().detach()
    if tuple(made.shape) != tuple(tensor.shape) or made.dtype != tensor.dtype:
        found, wanted = f"{made.dtype} {list(made.shape)}", f"{tensor.dtype} {list(tensor.shape)}"
        raise RuntimeError(f"{found} was made where {wanted} was announced")
    return made


def in_half(tensors: Mapping[str, Writable]) -> dict[str, Writable]:
    """Floating tensors in float16, cast when they are written; the others as they are.

    Writing raises LayoutError naming a tensor with values that float16 does not hold.
    """
    return {name: _half(name, tensor) if tensor.dtype.is_floating_point else tensor for name, tensor in tensors.items()}


def _half(name: str, tensor: Writable) -> Writable:
    if tensor.dtype == torch.float16:
        return tensor

    def make() -> Tensor:
        half = finished(tensor).to(torch.float16)
        if not bool(half.isfinite().all()):
            raise LayoutError(
                f"{name} has values past 65504, the largest that float16 holds, which this layout stores; "
                "keep this model in the native layout"
            )
        return half

    return Made(tuple(tensor.shape), torch.float16, make)


def _declared(tensors: Mapping[str, Writable]) -> Declared:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
