"""Model of a stage, ready to train: loaded, trainable modules selected, sharded, with its optimizer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vila.config.schema import Recipe
from vila.core.errors import ConfigError
from vila.core.files import cache_dir
from vila.core.progress import SILENT, Events
from vila.core.types import Image
from vila.core.vision_spec import VisionSpec
from vila.data.collate import Batch
from vila.data.dataset import mixture_images
from vila.data.mixture import Mixture
from vila.model.feature_cache import FeatureCache
from vila.model.layouts.base import Checkpoint
from vila.model.loading import (
    build_components,
    build_model,
    check_templates,
    choose_dtype,
    open_checkpoint,
    open_components,
    own_template,
)
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor
from vila.model.projector import calibrate_projector
from vila.train.fsdp import World, decoder_blocks, full_tensor, shard, tower_blocks
from vila.train.loss import LossModule
from vila.train.optimizer import MasterAdamW, ParameterGroup, group_parameters, select_trainable

NEW_TEMPLATE = "vicuna_v1"
"""Template of a new model if the recipe names none."""
_CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class TrainState:
    """A model on its device, with everything that a training step needs.

    loss_module:   the model with its loss; sharded with FSDP2 if the run has a device mesh.
    vision_inputs: image arguments of `loss_module` for a batch.
    """

    model: VilaForConditionalGeneration
    loss_module: LossModule
    optimizer: MasterAdamW
    groups: Sequence[ParameterGroup]
    vision_inputs: VisionInputs

    @contextmanager
    def unsharded_model(self) -> Iterator[None]:
        """Gather the sharded weights, for inference. Every rank enters, and runs the same forward passes inside."""
        root = self.loss_module
        if isinstance(root, FSDPModule):
            root.unshard()
        try:
            yield
        finally:
            if isinstance(root, FSDPModule):
                root.reshard()


class VisionInputs:
    """Image arguments of the loss module: pixels that were decoded with the batch, or cached tower features."""

    def __init__(
        self, model: VilaForConditionalGeneration, processor: VilaProcessor, cache: FeatureCache | None = None
    ) -> None:
        self._model, self._processor, self._cache = model, processor, cache
        size = processor.spec.image_size
        self._dummy_pixels = torch.zeros(1, 3, size, size)
        if cache is not None:
            self._dummy_features = self._compute(self._dummy_pixels).cpu()

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Return `pixels` [N, 3, H, W] or `features` [N, P, C] of a batch; of a dummy image if it has no images."""
        if self._cache is None:
            return {"pixels": self._dummy_pixels if batch.pixels is None else batch.pixels}
        images = [item for item in batch.media if isinstance(item, Image)]
        return {"features": self._cache(images) if images else self._dummy_features}

    def features(self, images: Sequence[Image]) -> Tensor:
        """Return the tower features [N, P, C] of images."""
        return self._cache(images) if self._cache is not None else self._compute(self._processor.pixels(images))

    @torch.no_grad()
    def _compute(self, pixels: Tensor) -> Tensor:
        device = next(self._model.vision_tower.parameters()).device
        return self._model.vision_features(pixels.to(device))


def open_initial_model(recipe: Recipe) -> Checkpoint:
    """Open the model that a stage starts from, without reading weights: `model.path`, or an LLM and a tower.

    Raises TemplateError for a template whose special tokens the tokenizer lacks, LayoutError for a model that cannot be
    read, or a tower without the requested features.
    """
    source, data = recipe.model, recipe.data
    if source.path:
        checkpoint = open_checkpoint(source.path)
    else:
        settings = source.model_dump(exclude={"path", "projector_init"}) | {
            "image_mode": source.image_mode or "pad",
            "exif_orientation": source.exif_orientation is not False,
            "template": source.template or NEW_TEMPLATE,
        }
        checkpoint = open_components(**settings)
    if source.template:
        checkpoint.config.template = checkpoint.processor.template = source.template
    own = own_template(checkpoint).name
    stage = data.template or own
    check_templates(checkpoint, *dict.fromkeys([own, *(entry.template or stage for entry in data.mixture)]))
    return checkpoint


def load_initial_model(recipe: Recipe, checkpoint: Checkpoint) -> tuple[VilaForConditionalGeneration, VilaProcessor]:
    """Load the model that a stage starts from onto the CPU, its weights in the dtype of the files.

    checkpoint: result of `open_initial_model`.
    """
    source = recipe.model
    if not source.path:
        return build_components(checkpoint, recipe.seed), checkpoint.processor
    model, processor = build_model(checkpoint), checkpoint.processor
    # The recipe may override how the previous stage transformed images.
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
    """Prepare the model of `load_initial_model` for the recipe's stage: device, dtype, adapters, sharding, optimizer.

    Raises ConfigError or TrainingError if the stage cannot be trained with these settings.
    """
    stage, compute = recipe.stage, recipe.compute
    dtype = choose_dtype(compute.dtype, world.device)
    model.vision_tower.to(world.device, dtype)
    vision_inputs = VisionInputs(model, processor, _feature_cache(recipe, model, processor, mixture, world, events))
    if recipe.model.projector_init == "calibrated" and not recipe.model.path:
        images = mixture_images(mixture, processor.spec.num_video_frames)[:_CALIBRATION_IMAGES]
        rms = next(model.get_input_embeddings().parameters()).float().square().mean().sqrt().item()
        calibrate_projector(model.projector, vision_inputs.features(images).float().to(model.device), rms)
    adapters = _add_adapters(recipe, model, world) if stage.lora.rank else None
    select_trainable(
        model, stage.tune, tune_embeddings=stage.tune_embeddings, llm_parts=stage.llm_parts, adapters=adapters
    )
    if compute.gradient_checkpointing:
        enable_gradient_checkpointing(model, compute.checkpoint_every)
    if compute.compile:
        for block in decoder_blocks(model):
            block.compile(dynamic=True)
    loss_module = LossModule(model)
    if world.mesh is not None:
        shard(loss_module, model, world, dtype, reshard=compute.reshard)
    else:
        _move_to_device(model, world.device, dtype)
    groups = group_parameters(
        model, lr=stage.lr, lr_projector=stage.lr_projector, weight_decay=recipe.optim.weight_decay
    )
    optimizer = MasterAdamW(
        groups,
        beta1=recipe.optim.beta1,
        beta2=recipe.optim.beta2,
        max_grad_norm=recipe.optim.max_grad_norm,
        dtype=torch.float32 if world.mesh is not None else dtype,
    )
    if world.mesh is None:
        model.to(dtype)
    return TrainState(model, loss_module, optimizer, groups, vision_inputs)


def _add_adapters(recipe: Recipe, model: VilaForConditionalGeneration, world: World) -> set[str]:
    """Add LoRA adapters; return the names of their parameters."""
    from vila.train.lora import adapter_parameters, add_adapters

    lora = recipe.stage.lora
    if lora.bits < 16 and world.mesh is not None:
        raise ConfigError(
            "quantized base weights cannot be sharded",
            field="stage.lora.bits",
            value=lora.bits,
            hint="set compute.sharding=replicate",
        )
    add_adapters(model, lora, recipe.seed)
    return set(adapter_parameters(model))


def _feature_cache(
    recipe: Recipe,
    model: VilaForConditionalGeneration,
    processor: VilaProcessor,
    mixture: Mixture,
    world: World,
    events: Events,
) -> FeatureCache | None:
    """Return the cache of tower features with all images of the mixture; None without `compute.feature_cache`."""
    if not recipe.compute.feature_cache:
        return None
    with world.main_first():
        cache = FeatureCache(cache_dir() / "features", model, processor, events)
        cache.ensure(mixture_images(mixture, processor.spec.num_video_frames))
    return cache


def enable_gradient_checkpointing(model: VilaForConditionalGeneration, every: int = 1) -> None:
    """Recompute the activations of every nth transformer block in the backward pass instead of storing them."""
    # transformers 5.23 renamed the method.
    enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    is_tower_trained = any(parameter.requires_grad for parameter in model.vision_tower.parameters())
    for blocks in (decoder_blocks(model), tower_blocks(model) if is_tower_trained else []):
        for number, block in enumerate(blocks):
            block.gradient_checkpointing = number % every == 0  # type: ignore[assignment]
            # Blocks recompute in train mode only; frozen blocks also store activations for trainable modules below.
            # The mode is set on the block alone: dropout inside it would react to it.
            block.training = True


def _move_to_device(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move the model. Trainable weights are copied, as they may be memory-mapped; float32 if `dtype` is float32."""
    model.to(device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            target = torch.float32 if dtype == torch.float32 else parameter.dtype
            parameter.data = parameter.data.to(target, copy=True)


def gather_full_tensors(
    model: VilaForConditionalGeneration, dtype: torch.dtype, world: World, only: Collection[str] | None = None
) -> dict[str, Tensor] | None:
    """Gather the sharded weights by name into the CPU memory of rank 0; None elsewhere. Every rank calls it.

    only: names of the wanted weights; None: all.
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
    """Return a new model with the config of `model` and the weights `tensors`, which are shared, not copied."""
    with torch.device("meta"):
        copy = VilaForConditionalGeneration(model.config)
    copy.load_state_dict(tensors, assign=True)
    copy.tie_weights()
    copy.generation_config = model.generation_config
    return copy.eval()
