"""Distributed setup: process groups, all-gather of Python objects, gradient all-reduce, FSDP2 sharding."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vila.core.errors import ConfigError, TrainingError, VilaError
from vila.core.system import ProcessInfo, current_process
from vila.families import find_family
from vila.model.modeling import VilaForConditionalGeneration

T = TypeVar("T")
Sharding = Literal["full", "hybrid", "replicate"]

_BUCKET_NUMEL = 2**24
"""Maximum number of elements that one all-reduce of many tensors combines."""


@dataclass(frozen=True)
class World:
    """The processes (ranks) of a run, as known to one of them.

    device:   device of this process.
    sharding: how weights are sharded; no effect with a single process.
    mesh:     devices that weights are sharded over; None if every rank holds all weights.
    control:  gloo group for Python objects.
    saving:   gloo group for the thread that writes checkpoints.
    """

    process: ProcessInfo
    device: torch.device
    sharding: Sharding = "full"
    mesh: DeviceMesh | None = None
    control: Any = None
    saving: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes shared files."""
        return self.process.is_main

    @property
    def is_single(self) -> bool:
        """Whether the run has one process."""
        return self.process.world_size == 1

    def all_gather_object(self, value: T, group: Any = None) -> list[T]:
        """Return the values of all ranks, in order. Raises TrainingError if a rank is lost.

        group: None is `control`; the thread that writes checkpoints uses `saving`.
        """
        if self.is_single:
            return [value]
        values: list[Any] = [None] * self.process.world_size
        with raise_on_lost_rank():
            dist.all_gather_object(values, value, group=group or self.control)
        return values

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Call `work` on rank 0; every rank returns its result or raises its VilaError."""
        value: T | None = None
        problem: VilaError | None = None
        if self.is_main:
            try:
                value = work()
            except VilaError as error:
                problem = error
        value, problem = self.all_gather_object((value, problem))[0]
        if problem is not None:
            problem.is_repeated = not self.is_main
            raise problem
        return value  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.all_gather_object(None)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over all ranks, in place."""
        if not self.is_single:
            dist.all_reduce(tensor)

    def all_reduce_many(self, tensors: Sequence[Tensor]) -> None:
        """Sum many tensors over all ranks, in place, combined into buckets."""
        if self.is_single:
            return
        for bucket in _buckets(tensors):
            joined = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(joined)
            parts = joined.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the body on rank 0 first, so that the other ranks find what it downloaded or wrote.

        A VilaError of rank 0 is raised on all ranks.
        """
        if not self.is_main:
            problem = self.all_gather_object(None)[0]
            if isinstance(problem, VilaError):
                problem.is_repeated = True
                raise problem
            yield
            return
        try:
            yield
        except VilaError as error:
            self.all_gather_object(error)
            raise
        self.all_gather_object(None)

    def close(self) -> None:
        """Leave the process groups."""
        if not self.is_single and dist.is_initialized():
            dist.destroy_process_group()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group consecutive tensors of one dtype, up to _BUCKET_NUMEL elements or one larger tensor per bucket."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (
            tensor.dtype != bucket[0].dtype or sum(one.numel() for one in [*bucket, tensor]) > _BUCKET_NUMEL
        ):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def raise_on_lost_rank() -> Iterator[None]:
    """Raise TrainingError for the errors of gloo and NCCL that mean that another rank is lost."""
    try:
        yield
    except VilaError:
        raise
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, dist.DistError) or "gloo" in text or "Connection" in text or "NCCL" in text:
            raise TrainingError(
                f"another rank of the run ended or cannot be reached ({text.splitlines()[0][:200]})",
                hint="its own output has the reason; run again to resume from the last checkpoint",
            ) from error
        raise


def open_world(sharding: Sharding = "full", timeout_s: float = 600.0) -> World:
    """Join the process groups of the run; without `torchrun` the run has one process.

    timeout_s: limit on waiting for other ranks.
    Raises ConfigError if a machine has more processes than GPUs, or if variables of torchrun are missing.
    """
    process = current_process()
    cuda = torch.cuda.is_available()
    if cuda and process.local_world_size > torch.cuda.device_count():
        raise ConfigError(
            f"{process.local_world_size} processes on a machine with {torch.cuda.device_count()} GPUs",
            hint="start one process per GPU",
        )
    device = torch.device("cuda", process.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if process.world_size == 1:
        return World(process, device, sharding)
    limit = timedelta(seconds=timeout_s)
    if absent := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ConfigError("not set", field=", ".join(absent), hint="start the run with torchrun, which sets them")
    with raise_on_lost_rank():
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit)
        control, saving = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))
        return World(process, device, sharding, _mesh(process, device.type, sharding), control, saving)


def _mesh(process: ProcessInfo, device: str, sharding: Sharding) -> DeviceMesh | None:
    if sharding == "replicate":
        return None
    if sharding == "hybrid" and process.local_world_size < process.world_size:
        if process.world_size % process.local_world_size:
            raise ConfigError(
                f"{process.world_size} processes cannot be divided into machines of {process.local_world_size}",
                field="compute.sharding",
                value=sharding,
            )
        nodes = process.world_size // process.local_world_size
        return init_device_mesh(device, (nodes, process.local_world_size), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device, (process.world_size,), mesh_dim_names=("shard",))


def shard(
    loss_module: nn.Module, model: VilaForConditionalGeneration, world: World, dtype: torch.dtype, *, reshard: bool
) -> None:
    """Shard the weights of `loss_module` over `world.mesh` with FSDP2.

    Units are the decoder blocks, the tower's blocks, the projector, and one unit for the rest. Trainable weights are
    stored in float32 (the master weights), gathered in `dtype`, and their gradients are summed in float32; frozen
    weights are stored in `dtype`.

    reshard: free a unit's gathered weights after its forward pass.
    """
    assert world.mesh is not None
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    for unit in [*sharding_units(model), model.projector]:
        if next(unit.parameters(), None) is not None:
            _convert(unit, dtype)
            fully_shard(unit, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard)
    _convert(loss_module, dtype)
    fully_shard(loss_module, mesh=world.mesh, mp_policy=policy, reshard_after_forward=False)
    for module in loss_module.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the tokens of all ranks, so gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction


def sharding_units(model: VilaForConditionalGeneration) -> list[nn.Module]:
    """Return the transformer blocks of LLM and tower, the units of FSDP2."""
    return [*decoder_blocks(model), *tower_blocks(model)]


def decoder_blocks(model: VilaForConditionalGeneration) -> list[nn.Module]:
    """Return the decoder blocks of the LLM, located by its `Family`."""
    name = find_family(model.config.text_config.model_type).decoder_block
    return [module for module in model.language_model.modules() if type(module).__name__ == name]


def tower_blocks(model: VilaForConditionalGeneration) -> list[nn.Module]:
    """Return the tower's transformer blocks: the items of its module lists."""
    lists = [module for module in model.vision_tower.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in lists if len(blocks) > 1 for block in blocks]


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            # Trainable weights are always copied: they may be memory-mapped.
            target = torch.float32 if parameter.requires_grad else dtype
            parameter.data = parameter.data.to(target, copy=parameter.requires_grad)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered on every rank; other tensors unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
