"""From a recipe to a model that is ready to learn: loaded, its projector drawn, frozen in parts, and dealt out."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vila.config.schema import Recipe
from vila.core.errors import ConfigError
from vila.core.files import cache_dir
from vila.core.progress import SILENT, Events
from vila.core.types import Image
from vila.core.vision_spec import VisionSpec
from vila.data.bad_samples import BadSampleLog
from vila.data.collate import Batch
from vila.data.dataset import DatasetEntry, SampleReader, mixture_images, open_mixture
from vila.data.mixture import Mixture
from vila.data.packing import PackingPolicy, PackingStreams, PackingStreamState, streams_of_rank
from vila.data.workers import WorkerStreams
from vila.model.feature_cache import FeatureCache
from vila.model.layouts.base import Checkpoint
from vila.model.loading import (
    build_components,
    build_model,
    check_templates,
    choose_dtype,
    open_checkpoint,
    open_components,
)
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor
from vila.model.projector import calibrate_projector
from vila.train.fsdp import World, decoder_blocks, full_tensor, shard, tower_blocks
from vila.train.loss import LossModule
from vila.train.optimizer import MasterAdamW
from vila.train.parameter_groups import ParameterGroup, group_parameters, select_trainable

_CALIBRATION_PICTURES = 256

Seen = Callable[[Batch], dict[str, Tensor]]


@dataclass(frozen=True)
class TrainState:
    """A model on its device, with what makes it learn.

    objective: its loss, dealt over the processes of the run where there are some.
    seen:      what `objective` is given of a batch's pictures; of a stand-in, when the batch has none.
    """

    model: VilaForConditionalGeneration
    objective: LossModule
    optimizer: MasterAdamW
    groups: Sequence[ParameterGroup]
    seen: Seen


NEW_TEMPLATE = "vicuna_v1"
"""Template of a new model whose recipe names none."""


def open_initial_model(recipe: Recipe) -> Checkpoint:
    """Open the model that a stage starts from, without reading weights: `model.path`, or an LLM and a tower.

    Raises TemplateError for a template of the recipe whose special tokens the tokenizer lacks, LayoutError for a model
    that cannot be read, or a tower that has no such features.
    """
    source, data = recipe.model, recipe.data
    checkpoint = (
        open_checkpoint(source.path)
        if source.path
        else open_components(
            llm=source.llm,
            vision=source.vision,
            projector=source.projector,
            select_layer=source.select_layer,
            select_feature=source.select_feature,
            image_size=source.image_size,
            image_mode=source.image_mode or "pad",
            exif_orientation=source.exif_orientation is not False,
            template=source.template or NEW_TEMPLATE,
        )
    )
    if source.template:
        checkpoint.config.template = checkpoint.processor.template = source.template
    own = checkpoint.processor.find_template().name
    stage = data.template or own
    check_templates(checkpoint, *dict.fromkeys([own, *(entry.template or stage for entry in data.mixture)]))
    return checkpoint


def load_initial_model(recipe: Recipe, checkpoint: Checkpoint) -> tuple[VilaForConditionalGeneration, VilaProcessor]:
    """Load the model that a stage starts from onto the CPU, its weights in the dtype of the files.

    checkpoint: what `open_initial_model` returned.
    """
    source = recipe.model
    if not source.path:
        return build_components(checkpoint, recipe.seed), checkpoint.processor
    model, processor = build_model(checkpoint), checkpoint.processor
    # A stage may show images in another way than the one before it did, if its recipe says so.
    spec = VisionSpec.from_dict(processor.vision_spec)
    if source.image_mode is not None:
        spec = replace(spec, image_mode=source.image_mode)
    if source.exif_orientation is not None:
        spec = replace(spec, exif_orientation=source.exif_orientation)
    model.config.vision_spec = processor.vision_spec = spec.to_dict()
    return model, processor


def make_train_state(
    recipe: Recipe,
    model: VilaForConditionalGeneration,
    processor: VilaProcessor,
    mixture: Mixture,
    world: World,
    events: Events = SILENT,
) -> TrainState:
    """Make the model of `load_initial_model` ready to learn what the recipe's stage says, in the type that it says.

    Raises ConfigError or TrainingError when the stage cannot be trained so.
    """
    dtype = choose_dtype(recipe.compute.dtype, world.device)
    model.vision_tower.to(world.device, dtype)
    images, seen = _pictures(recipe, model, processor, mixture, world, events)
    if recipe.model.projector_init == "calibrated" and not recipe.model.path:
        some = mixture_images(mixture, processor.spec.num_video_frames)[:_CALIBRATION_PICTURES]
        rms = next(model.get_input_embeddings().parameters()).float().square().mean().sqrt().item()
        calibrate_projector(model.projector, images(some).float().to(model.device), rms)
    stage = recipe.stage
    adapters = None
    if stage.lora.rank:
        from vila.train.lora import adapter_parameters, add_adapters

        if stage.lora.bits < 16 and world.mesh is not None:
            raise ConfigError(f"stage.lora.bits={stage.lora.bits} cannot be dealt out; set compute.sharding=replicate")
        add_adapters(model, stage.lora, recipe.seed)
        adapters = set(adapter_parameters(model))
    parts = {"tune_embeddings": stage.tune_embeddings, "llm_parts": stage.llm_parts}
    select_trainable(model, stage.tune, adapters=adapters, **parts)  # type: ignore[arg-type]
    if recipe.compute.gradient_checkpointing:
        enable_gradient_checkpointing(model, recipe.compute.checkpoint_every)
    if recipe.compute.compile:
        for block in decoder_blocks(model):
            block.compile(dynamic=True)
    objective = LossModule(model)
    if world.mesh is not None:
        shard(objective, model, world, dtype, reshard=recipe.compute.reshard)
    else:
        _place(model, world.device, dtype)
    rates = {"lr": stage.lr, "lr_projector": stage.lr_projector, "weight_decay": recipe.optim.weight_decay}
    groups = group_parameters(model, **rates)  # type: ignore[arg-type]
    optimizer = MasterAdamW(
        groups,
        beta1=recipe.optim.beta1,
        beta2=recipe.optim.beta2,
        max_grad_norm=recipe.optim.max_grad_norm,
        dtype=torch.float32 if world.mesh is not None else dtype,
    )
    if world.mesh is None:
        model.to(dtype)
    return TrainState(model, objective, optimizer, groups, seen)


def enable_gradient_checkpointing(model: VilaForConditionalGeneration, every: int = 1) -> None:
    """Recompute every nth block in the backward pass instead of keeping its activations."""
    # transformers 5.23 gave it another name.
    enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    learns = any(parameter.requires_grad for parameter in model.vision_tower.parameters())
    for blocks in (decoder_blocks(model), tower_blocks(model) if learns else []):
        for number, block in enumerate(blocks):
            block.gradient_checkpointing = number % every == 0  # type: ignore[assignment]
            # Blocks are recomputed in train mode alone, and frozen ones keep activations for what learns below them.
            # The mode is set on the block itself, not on what is inside, where dropout would answer to it.
            block.training = True


def _place(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move to the device. Weights that learn are no longer pages of a file, and float32 if they are to stay it."""
    model.to(device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = torch.float32 if dtype == torch.float32 else parameter.dtype
            parameter.data = parameter.data.to(kind, copy=True)


def _pictures(
    recipe: Recipe,
    model: VilaForConditionalGeneration,
    processor: VilaProcessor,
    mixture: Mixture,
    world: World,
    events: Events,
) -> tuple[Callable[[Sequence[Image]], Tensor], Seen]:
    """Features [N, P, C] of pictures, and what the objective is given of a batch."""
    size = processor.spec.image_size
    if recipe.compute.feature_cache:
        with world.main_first():
            cache = FeatureCache(cache_dir() / "features", model, processor, events)
            cache.ensure(mixture_images(mixture, processor.spec.num_video_frames))
        with torch.no_grad():
            black = model.vision_features(torch.zeros(1, 3, size, size, device=world.device)).cpu()

        def cached(batch: Batch) -> dict[str, Tensor]:
            some = [item for item in batch.media if isinstance(item, Image)]
            return {"features": cache(some) if some else black}

        return cache, cached

    def compute(images: Sequence[Image]) -> Tensor:
        with torch.no_grad():
            return model.vision_features(processor.pixels(images).to(world.device))

    def decoded(batch: Batch) -> dict[str, Tensor]:
        return {"pixels": torch.zeros(1, 3, size, size) if batch.pixels is None else batch.pixels}

    return compute, decoded


def gather_full_tensors(
    model: VilaForConditionalGeneration, dtype: torch.dtype, world: World, only: Collection[str] | None = None
) -> dict[str, Tensor] | None:
    """Weights by name, put together, in the memory of the main process; None elsewhere. Every process calls it.

    only: names of those that are wanted; None: all.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if only is not None and name not in only:
            continue
        value = full_tensor(tensor.detach())
        if world.is_main:
            tensors[name] = value.to("cpu", dtype if value.is_floating_point() else value.dtype)
    return tensors if world.is_main else None


def model_with_tensors(
    model: VilaForConditionalGeneration, tensors: Mapping[str, Tensor]
) -> VilaForConditionalGeneration:
    """A model like `model` whose weights are `tensors`, not copied."""
    with torch.device("meta"):
        copy = VilaForConditionalGeneration(model.config)
    copy.load_state_dict(tensors, assign=True)
    copy.tie_weights()
    copy.generation_config = model.generation_config
    return copy.eval()


# --- rows
# Building the data of a run from its recipe: the mixture, and the rows that steps are made of.


MAX_WORKERS = 4


def build_mixture(recipe: Recipe, events: Events = SILENT) -> Mixture:
    """The data sets of a recipe, opened; `events` are told how files are indexed."""
    return open_mixture([DatasetEntry(**entry.model_dump()) for entry in recipe.data.mixture], recipe.seed, events)


def build_reader(recipe: Recipe, processor: VilaProcessor, mixture: Mixture) -> SampleReader:
    """What reads the samples of a mixture for a model."""
    template = recipe.data.template or processor.find_template().name
    return SampleReader(mixture, template, processor.span_tokenizer, processor.spec)


def build_rows(
    recipe: Recipe,
    processor: VilaProcessor,
    mixture: Mixture,
    states: Sequence[PackingStreamState] | None,
    *,
    rank: int = 0,
    world: int = 1,
) -> PackingStreams | WorkerStreams:
    """The rows of a run from `states` on; read by `compute.workers` processes. They end with `budget.epochs`.

    Raises ConfigError when the global batch is no multiple of the ranks, or when a data set has an image mode of its
    own and features are cached, since the cache is made with the stage's.
    """
    data, count = recipe.data, recipe.batch.rows or recipe.batch.samples
    streams_of_rank(rank, world, count)
    own = [entry.path for entry in data.mixture if entry.image_mode not in (None, processor.spec.image_mode)]
    if own and recipe.compute.feature_cache:
        raise ConfigError(f"compute.feature_cache knows one image_mode, but {own[0]} has its own; turn the cache off")
    policy = PackingPolicy(
        max_length=data.max_length,
        look_ahead=data.look_ahead,
        packing=data.packing,
        max_images=data.max_images,
        overlong=data.overlong,
        max_faults=data.max_faults,
    )
    reader, end = build_reader(recipe, processor, mixture), last_position(recipe, mixture)
    workers, decode = worker_count(recipe), not recipe.compute.feature_cache
    if workers:
        return WorkerStreams(
            reader, count, policy=policy, workers=workers, rank=rank, world=world, states=states, decode=decode, end=end
        )
    return PackingStreams(
        reader, count, policy=policy, rank=rank, world=world, states=states, shorten=reader.shorten,
        decode=reader.pixels if decode else None, location=reader.location, end=end,
    )  # fmt: skip


def last_position(recipe: Recipe, mixture: Mixture) -> int | None:
    """The global position at which `budget.epochs` end, the visits of samples that they have; None for `tokens`."""
    return max(1, round(recipe.budget.epochs * mixture.epoch_length)) if recipe.budget.epochs else None


def build_bad_sample_log(recipe: Recipe, states: Sequence[PackingStreamState] | None, *, write: bool) -> BadSampleLog:
    """The list of samples that could not be read up to `states`. write: whether this process is the one that writes."""
    count = recipe.batch.rows or recipe.batch.samples
    path = recipe.output.dir / "faults.jsonl"
    return BadSampleLog(path, recipe.data.max_faults, seen=_seen_by(states, count), write=write)


def worker_count(recipe: Recipe) -> int:
    """Processes that read ahead; with cached features there are no pixels to decode, so none by default."""
    if recipe.compute.workers >= 0:
        return recipe.compute.workers
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if recipe.compute.feature_cache else min(MAX_WORKERS, processors)


def _seen_by(states: Sequence[PackingStreamState] | None, count: int) -> Callable[[int], bool]:
    """Whether the lanes have left a position behind them."""

    def seen(position: int) -> bool:
        if states is None:
            return False
        state = states[position % count]
        return position < state.next_position and position not in state.waiting

    return seen
