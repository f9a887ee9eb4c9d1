"""Compare the memory predicted by `vila plan` with the measured memory of steps of small models, on the CPU.

    python benchmarks/plan_memory.py
    torchrun --nproc-per-node 2 benchmarks/plan_memory.py     # sharded by FSDP2

Measured is the peak sum of all tensor storages during the second step, updated at every operation that PyTorch
dispatches: exact, and equal on every machine. Prints the table of benchmarks/plan.md; exit code 1 if a prediction is
off by a tenth or more.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig

from vila.config.schema import Lora
from vila.data.collate import Batch
from vila.model.config import VilaConfig
from vila.model.modeling import VilaForConditionalGeneration
from vila.plan.flops import TrainableParts
from vila.plan.memory import Memory, MemoryConfig, MicroBatch, peak_memory
from vila.plan.model_shape import shape_of
from vila.train.fsdp import World, open_world, shard
from vila.train.loss import LossModule
from vila.train.optimizer import MasterAdamW, group_parameters, select_trainable
from vila.train.train_state import enable_gradient_checkpointing

BOUND = 0.1
MASKED = False  # the loss module attends to packed sequences without a mask
TYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True)
class Case:
    """One configuration: trainable parts, memory settings, sequences of a micro-batch, and changes to the model."""

    name: str
    trainable: TrainableParts
    memory: MemoryConfig
    rows: int = 2
    length: int = 384
    images: int = 2
    family: str = "llama"
    tower: str = "clip"
    projector: str = "mlp2x_gelu"
    text: dict[str, Any] = field(default_factory=dict)

    @property
    def micro(self) -> MicroBatch:
        return MicroBatch(self.rows, self.length, self.images, self.rows * self.length // 2)

    def config(self) -> VilaConfig:
        facts = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
        facts |= {"num_key_value_heads": 4, "vocab_size": 2048, "tie_word_embeddings": False, **self.text}
        if self.family == "mistral":
            facts["sliding_window"] = None
        text = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[self.family](**facts)
        kind = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[self.tower]
        small = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
        return VilaConfig(
            vision_config=kind(**small, image_size=112, patch_size=14),
            text_config=text,
            select_feature="cls_patch" if self.tower == "siglip" else "patch",
            image_token_id=text.vocab_size,
            projector_type=self.projector,
        )


def _cases() -> Iterator[Case]:
    align, tune = TrainableParts(projector=True), TrainableParts(projector=True, llm=True)
    everything = TrainableParts(vision=True, projector=True, llm=True)
    adapters = TrainableParts(projector=True, llm=True, rank=16, dropout=0.05)
    half, whole = MemoryConfig(dtype_bytes=2, has_mask=MASKED), MemoryConfig(dtype_bytes=4, has_mask=MASKED)
    again = MemoryConfig(dtype_bytes=2, has_mask=MASKED, recompute=1)
    yield Case("frozen LLM, bf16", align, half)
    yield Case("frozen LLM, fp32", align, whole)
    yield Case("frozen LLM, bf16, gradient checkpointing", align, again)
    yield Case("LLM and projector, bf16", tune, half)
    yield Case("LLM and projector, fp32", tune, whole)
    yield Case("LLM and projector, bf16, gradient checkpointing", tune, again, rows=4)
    yield Case(
        "LLM and projector, every second block gradient checkpointing",
        tune,
        MemoryConfig(2, has_mask=MASKED, recompute=2),
        rows=4,
    )
    yield Case("LLM and projector, accumulated", tune, MemoryConfig(2, has_mask=MASKED, accumulates=True))
    yield Case("LoRA, bf16", adapters, half)
    yield Case("LoRA, bf16, gradient checkpointing", adapters, again, rows=4)
    many = {"images": 40, "projector": "mlp_downsample"}
    yield Case("everything, many images, bf16", everything, half, **many)
    yield Case("everything, many images, bf16, gradient checkpointing", everything, again, **many)
    yield Case("everything, SigLIP, fp32", everything, whole, images=10, tower="siglip")
    yield Case("frozen LLM and tower, many images, gradient checkpointing", align, again, **many)
    yield Case("LLM and projector, bf16, reshard: false", tune, replace(half, reshard=False))
    big = {"vocab_size": 30000, "tie_word_embeddings": True, "num_key_value_heads": 2}
    yield Case("tied head, large vocabulary, bf16", tune, half, family="qwen2", text=big)
    yield Case(
        "grouped-query attention, long packed sequences",
        tune,
        half,
        rows=1,
        length=1024,
        family="mistral",
        text={"num_key_value_heads": 2},
    )


CASES = {case.name: case for case in _cases()}


class LiveBytes(TorchDispatchMode):
    """Sum the bytes of all live storages: registered ones, and those that operations read and write.

    Sizes are read again each time, because FSDP2 frees and refills the storages of gathered weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def see(self, values: Any) -> None:
        for value in tree_iter(values):
            tensor = value.to_local() if isinstance(value, DTensor) else value
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages.setdefault(storage._cdata, weakref.ref(storage, self._forget(storage._cdata)))
        living = (reference() for reference in list(self._storages.values()))
        self.peak = max(self.peak, sum(storage.nbytes() for storage in living if storage is not None))

    def _forget(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self._storages.pop(key, None)

        return forget

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see([args, out])
        return out


def measure(case: Case, world: World | None = None) -> int:
    """Return the peak bytes of tensors in the second step of a case, sharded over the ranks of `world`."""
    torch.manual_seed(0)
    trainable, dtype = case.trainable, TYPES[case.memory.dtype_bytes]
    model = VilaForConditionalGeneration(case.config())
    tune = [name for name in ("vision", "projector", "llm") if getattr(trainable, name)]
    adapters = _add_adapters(model, trainable) if trainable.rank else None
    select_trainable(model, tune, adapters=adapters)
    if case.memory.recompute:
        enable_gradient_checkpointing(model, case.memory.recompute)
    objective = LossModule(model)
    if world is not None:
        shard(objective, model, world, dtype, reshard=case.memory.reshard)
    groups = group_parameters(model, lr=1e-3, lr_projector=None, weight_decay=0.0)
    held = dtype if world is None else torch.float32
    optimizer = MasterAdamW(groups, beta1=0.9, beta2=0.999, max_grad_norm=1.0, dtype=held)
    if world is None:
        model.to(dtype)
    batch = _batch(case, model.config.image_token_id)
    live = LiveBytes()
    live.see([list(model.parameters()), list(model.buffers()), optimizer._masters, batch.pixels])
    with live:
        for _ in range(2):
            live.peak = 0
            for _ in range(1 + case.memory.accumulates):
                loss, _ = objective(
                    batch, pixels=batch.pixels, data_set_ids=torch.zeros_like(batch.ids), num_data_sets=1
                )
                loss.backward()
                del loss
                optimizer.accumulate()
            optimizer.step(1.0, optimizer.grad_norm())
    return live.peak


def predict(case: Case) -> Memory:
    """Return the prediction of the planner for a case."""
    return peak_memory(shape_of(case.config()), case.trainable, case.memory, case.micro)


def _add_adapters(model: VilaForConditionalGeneration, trainable: TrainableParts) -> set[str]:
    from vila.train.lora import adapter_parameters, add_adapters

    add_adapters(model, Lora(rank=trainable.rank, dropout=trainable.dropout), 0)
    return set(adapter_parameters(model))


def _batch(case: Case, placeholder: int) -> Batch:
    shape = shape_of(case.config())
    ids = torch.randint(3, shape.vocabulary, (case.rows, case.length))
    each, left = divmod(case.images, case.rows)
    for row in range(case.rows):
        ids[row, : (each + (row < left)) * shape.media_tokens] = placeholder
    labels = torch.full_like(ids, -100)
    labels[:, case.length // 2 :] = 3
    return Batch(
        ids=ids,
        labels=labels,
        positions=torch.arange(case.length).expand_as(ids),
        segments=torch.zeros_like(ids),
        parents=torch.full_like(ids, -1),
        media=(),
        pixels=torch.randn(case.images, 3, 112, 112),
    )


def sharded(case: Case, ranks: int) -> Case:
    """Return the case with its weights sharded over `ranks` ranks."""
    return replace(case, memory=replace(case.memory, num_shards=ranks))


def main() -> int:
    world = open_world()
    ranks, worst = world.process.world_size, 0.0
    if world.is_main:
        print(
            f"Sharded over {ranks} ranks\n\n| Configuration | Measured MB | Predicted MB | Error |\n|---|---|---|---|"
        )
    for name, one in CASES.items():
        case = sharded(one, ranks)
        measured, predicted = measure(case, None if world.is_single else world), predict(case).total
        error = predicted / measured - 1
        worst = max(worst, abs(error))
        if world.is_main:
            print(f"| {name} | {measured / 1e6:.1f} | {predicted / 1e6:.1f} | {error:+.1%} |", flush=True)
    world.close()
    return int(worst >= BOUND)


if __name__ == "__main__":
    sys.exit(main())
