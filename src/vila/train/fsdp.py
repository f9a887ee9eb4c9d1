"""The processes of a run: what they tell each other, and how a model is dealt to them (FSDP2)."""

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

from vila.core.distributed import ProcessInfo, current_process
from vila.core.errors import ConfigError, TrainingError, VilaError
from vila.families import find_family
from vila.model.modeling import VilaForConditionalGeneration

T = TypeVar("T")
Sharding = Literal["full", "hybrid", "replicate"]

_BUCKET = 2**24


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    device:   what this process computes on.
    sharding: how weights are dealt; without effect in a process that is alone.
    mesh:     of the devices that weights are dealt to; None when every process holds all of them.
    control:  the group that Python objects travel through, over the network of the processors.
    saving:   the same for checkpoints that are written while training goes on.
    """

    process: ProcessInfo
    device: torch.device
    sharding: Sharding = "full"
    mesh: DeviceMesh | None = None
    control: Any = None
    saving: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.process.is_main

    @property
    def is_single(self) -> bool:
        """Whether there are no others."""
        return self.process.world_size == 1

    def all_gather_object(self, value: T, group: Any = None) -> list[T]:
        """The values of all processes, by rank. Raises TrainingError when one of them is gone.

        group: `saving` in the thread that saves; None is `control`.
        """
        if self.is_single:
            return [value]
        values: list[Any] = [None] * self.process.world_size
        with raise_on_lost_rank():
            dist.all_gather_object(values, value, group=group or self.control)
        return values

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Run `work` in the main process; every process returns its result, or raises its VilaError."""
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
        """Wait for all processes."""
        self.all_gather_object(None)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if not self.is_single:
            dist.all_reduce(tensor)

    def all_reduce_many(self, tensors: Sequence[Tensor]) -> None:
        """Sum many tensors over all processes, in place, a few at a time as one."""
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
        """The main process runs the body before the others do: what it fetched or wrote is there for them.

        A VilaError of the main process is raised in all of them.
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
        """Part from the others."""
        if not self.is_single and dist.is_initialized():
            dist.destroy_process_group()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type, together no larger than _BUCKET numbers unless one is."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def raise_on_lost_rank() -> Iterator[None]:
    """Turn what the network libraries say of a process that is gone into a TrainingError."""
    try:
        yield
    except VilaError:
        raise
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, dist.DistError) or "gloo" in text or "Connection" in text or "NCCL" in text:
            raise TrainingError(
                "another process of the run ended or cannot be reached; its own output says why. Run again to go on "
                f"from the last checkpoint ({text.splitlines()[0][:200]})"
            ) from error
        raise


def open_world(sharding: Sharding = "full", timeout_s: float = 600.0) -> World:
    """Join the other processes of the run, if there are any.

    timeout_s: how long one waits for the others.
    Raises ConfigError when there are more processes on a machine than devices, or torchrun's variables are missing.
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
        raise ConfigError(f"{', '.join(absent)} not set; start the run with torchrun, which sets them")
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
    objective: nn.Module, model: VilaForConditionalGeneration, world: World, dtype: torch.dtype, *, reshard: bool
) -> None:
    """Deal the weights of `objective`, the module whose forward pass is a step, to the processes of `world.mesh`.

    Units are the decoder blocks of the family's card, the blocks of the tower, and the projector; the rest stays
    together. What learns is held in float32, which are the master weights, gathered in `dtype`, and its gradients are
    summed in float32; frozen weights are held in `dtype`. One unit at a time is on the device whole.
    """
    assert world.mesh is not None
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    for unit in [*sharding_units(model), model.projector]:
        if next(unit.parameters(), None) is not None:
            _convert(unit, dtype)
            fully_shard(unit, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard)
    _convert(objective, dtype)
    fully_shard(objective, mesh=world.mesh, mp_policy=policy, reshard_after_forward=False)
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the tokens of all processes already: gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # the only reduction that gloo has


def sharding_units(model: VilaForConditionalGeneration) -> list[nn.Module]:
    """The decoder blocks and the blocks of the tower, the units of sharding, recomputing and compiling."""
    return [*decoder_blocks(model), *tower_blocks(model)]


def decoder_blocks(model: VilaForConditionalGeneration) -> list[nn.Module]:
    """The LLM's blocks, as its family's card names them."""
    name = find_family(model.config.text_config.model_type).decoder_block
    return [module for module in model.language_model.modules() if type(module).__name__ == name]


def tower_blocks(model: VilaForConditionalGeneration) -> list[nn.Module]:
    """The tower's blocks: the items of its lists of modules."""
    lists = [module for module in model.vision_tower.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in lists if len(blocks) > 1 for block in blocks]


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            # A copy in any case: weights may be pages of a file.
            kind = torch.float32 if parameter.requires_grad else dtype
            parameter.data = parameter.data.to(kind, copy=parameter.requires_grad)


def full_tensor(tensor: Tensor) -> Tensor:
    """A dealt tensor put together, on every process; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
