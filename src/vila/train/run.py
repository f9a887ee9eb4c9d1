"""Building a run from a recipe: the one composition of model, data, optimizer and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila.config.load import recipe_differences, save_recipe
from vila.config.schema import Recipe
from vila.core.errors import CheckpointError
from vila.core.events import SILENT, Events
from vila.core.files import cache_dir, remove_partials, write_json
from vila.core.types import Image
from vila.data.batch import Batch
from vila.data.loader import images_of
from vila.data.mixture import Mixture
from vila.model.feature_cache import FeatureCache
from vila.model.load import assemble, load_model, save_model
from vila.model.precision import choose_dtype
from vila.model.processor import VilaProcessor
from vila.model.projector import calibrate_projector
from vila.model.vila import VilaForConditionalGeneration
from vila.train.checkpoint import (
    Checkpoint,
    Progress,
    clear_checkpoints,
    load_checkpoint,
    save_checkpoint,
    versions,
)
from vila.train.loop import StepListener, Trainer
from vila.train.metrics import MetricsLog
from vila.train.optim import MasterAdamW
from vila.train.rows import build_mixture, build_reader, build_rows
from vila.train.stage import count_parameters, select_trainable

_CALIBRATION_PICTURES = 256


@dataclass
class Run:
    """A stage that can be trained: everything built, resumed where a checkpoint was found."""

    recipe: Recipe
    model: VilaForConditionalGeneration
    processor: VilaProcessor
    mixture: Mixture
    trainer: Trainer
    trainable: int

    @property
    def folder(self) -> Path:
        """Directory of the run."""
        return self.recipe.output.dir

    def train(self) -> Path:
        """Train to the end of the budget, write the model, and return its directory."""
        self.trainer.run()
        save_model(self.model.to(torch.bfloat16), self.processor, model_dir(self.recipe))
        facts = {
            "progress": asdict(self.trainer.progress),
            "dropped": self.trainer.lanes.dropped,
            "truncated": self.trainer.lanes.truncated,
            "versions": versions(),
        }
        write_json(self.folder / "finished.json", facts)
        clear_checkpoints(self.folder / "checkpoint")
        return model_dir(self.recipe)


def model_dir(recipe: Recipe) -> Path:
    """Where the trained model of a run lies."""
    return recipe.output.dir / "model"


def is_finished(recipe: Recipe) -> bool:
    """Whether the run has been trained to its end."""
    return (recipe.output.dir / "finished.json").is_file()


def build(recipe: Recipe, *, listeners: Sequence[StepListener] = (), events: Events = SILENT) -> Run:
    """Build the run of a recipe, resuming from its newest checkpoint.

    Raises CheckpointError when the recipe differs from that of the checkpoint, naming each difference.
    """
    folder = recipe.output.dir
    remove_partials(folder)
    resumed = load_checkpoint(folder / "checkpoint")
    if resumed:
        refuse_changes(Recipe.model_validate(resumed.recipe), recipe, folder)
        _say_versions(resumed, events)
    dtype = choose_dtype(recipe.compute.dtype)
    model, processor = _build_model(recipe)
    mixture = build_mixture(recipe)
    model.vision_tower.to(dtype)
    features = _features(recipe, model, processor, mixture, events)
    if recipe.model.projector_init == "calibrated" and not recipe.model.path:
        some = images_of(mixture)[:_CALIBRATION_PICTURES]
        rms = next(model.get_input_embeddings().parameters()).float().square().mean().sqrt().item()
        calibrate_projector(model.projector, features(some).float(), rms)
    groups = select_trainable(
        model,
        tune=recipe.stage.tune,
        lr=recipe.stage.lr,
        lr_projector=recipe.stage.lr_projector,
        weight_decay=recipe.optim.weight_decay,
        tune_embeddings=recipe.stage.tune_embeddings,
        llm_parts=recipe.stage.llm_parts,
    )
    optimizer = MasterAdamW(
        groups,
        beta1=recipe.optim.beta1,
        beta2=recipe.optim.beta2,
        max_grad_norm=recipe.optim.max_grad_norm,
        dtype=dtype,
    )
    model.to(dtype)
    if recipe.compute.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lanes = build_rows(recipe, processor, mixture, resumed.lanes if resumed else None)
    if resumed:
        optimizer.load_state_tensors(resumed.tensors)
        events.said(f"{recipe.name}: going on after step {resumed.progress.step}")
    progress = resumed.progress if resumed else Progress()
    folder.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, folder / "recipe.yaml")
    metrics = MetricsLog(folder / "metrics.jsonl", progress.step)

    def log(trainer: Trainer, facts: dict[str, Any]) -> None:
        metrics.write(**facts)

    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        lanes=lanes,
        data_set=build_reader(recipe, processor, mixture).data_set,
        features=lambda batch: _features_of_batch(model, features, batch),
        pin=torch.cuda.is_available(),
        micro=recipe.batch.micro,
        warmup_ratio=recipe.optim.warmup_ratio,
        spent=_budget(recipe, mixture),
        save=lambda trainer: _save(recipe, trainer),
        save_every_s=recipe.output.checkpoint_every_s,
        save_every_steps=recipe.output.checkpoint_every_steps,
        progress=progress,
        listeners=[log, *listeners],
        events=events,
        name=recipe.name,
    )
    return Run(recipe, model, processor, mixture, trainer, count_parameters(groups))


def _build_model(recipe: Recipe) -> tuple[VilaForConditionalGeneration, VilaProcessor]:
    source = recipe.model
    if source.path:
        model, processor = load_model(source.path, dtype="float32")
        # A stage may show pictures and conversations in another way than the one before it did.
        model.config.template = processor.template = source.template
        model.config.vision_spec = processor.vision_spec = {**processor.vision_spec, "image_mode": source.image_mode}
        return model, processor
    return assemble(
        llm=source.llm,
        vision=source.vision,
        projector=source.projector,
        select_layer=source.select_layer,
        select_feature=source.select_feature,
        image_size=source.image_size,
        image_mode=source.image_mode,
        template=source.template,
        seed=recipe.seed,
    )


def _features(
    recipe: Recipe, model: VilaForConditionalGeneration, processor: VilaProcessor, mixture: Mixture, events: Events
) -> Callable[[Sequence[Image]], Tensor]:
    if recipe.compute.feature_cache:
        cache = FeatureCache(cache_dir() / "features", model, processor, events)
        cache.ensure(images_of(mixture))
        return cache

    def compute(images: Sequence[Image]) -> Tensor:
        return model.vision_features(processor.pixels(images).to(model.device))

    return compute


def _features_of_batch(
    model: VilaForConditionalGeneration, features: Callable[[Sequence[Image]], Tensor], batch: Batch
) -> Tensor:
    if batch.pixels is not None:
        return model.vision_features(batch.pixels.to(model.device, non_blocking=True))
    return features([item for item in batch.media if isinstance(item, Image)])


def _budget(recipe: Recipe, mixture: Mixture) -> Any:
    if recipe.budget.tokens:
        return lambda progress: progress.tokens / recipe.budget.tokens
    return lambda progress: progress.samples / (recipe.budget.epochs * mixture.epoch_length)


def _plain(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def _save(recipe: Recipe, trainer: Trainer) -> None:
    state = Checkpoint(
        trainer.optimizer.state_tensors(), trainer.progress, trainer.lanes.states, _plain(recipe), versions()
    )
    save_checkpoint(recipe.output.dir / "checkpoint", state)


def refuse_changes(before: Recipe, recipe: Recipe, folder: Path) -> None:
    """Raise CheckpointError, naming each difference, when a run in `folder` was begun with another recipe.

    What does not change the data, or only how many faults are put up with, may differ.
    """
    free = ("compute.workers:", "data.max_faults:")
    if changed := [line for line in recipe_differences(before, recipe) if not line.startswith(free)]:
        raise CheckpointError(
            f"{folder}: the recipe changed since this run began ({'; '.join(changed)}); "
            "undo the change, choose another output.dir, or delete the directory to start over"
        )


def _say_versions(resumed: Checkpoint, events: Events) -> None:
    changed = [f"{k} {v} -> {versions().get(k)}" for k, v in resumed.versions.items() if versions().get(k) != v]
    if changed:
        events.said(f"resumed with other versions ({', '.join(changed)}): the numbers may differ in the last bits")
