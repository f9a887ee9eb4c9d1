"""Build a run from a recipe: model, data, optimizer, checkpoints and callbacks; resumed if a checkpoint exists."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from vila.config.load import recipe_changes, save_recipe
from vila.config.schema import Recipe
from vila.core.errors import ConfigError, TrainingError
from vila.core.files import DirectoryLock, remove_partials, write_json
from vila.core.progress import SILENT, Events
from vila.data.dataset import build_mixture
from vila.data.fingerprint import FileFingerprint
from vila.data.mixture import Mixture
from vila.data.packing import micro_batch_note
from vila.model.layouts.base import Checkpoint as ModelCheckpoint
from vila.model.layouts.detect import LAYOUTS
from vila.model.loading import save_model
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor
from vila.train.build_data import build_data_stream, end_position, global_batch
from vila.train.callbacks import MetricsCallback, ReportCallback
from vila.train.checkpoint import Checkpoint, CheckpointWriter, Progress, load_checkpoint, versions
from vila.train.fsdp import World, open_world
from vila.train.metrics import BadStepLog, build_mfu_meter
from vila.train.optimizer import LRSchedule, count_parameters
from vila.train.preflight import Preflight, check_mixture, require_packages
from vila.train.report import write_report
from vila.train.resume import (
    Checkpointer,
    InputFingerprints,
    check_inputs_unchanged,
    check_recipe_unchanged,
    check_stream_count,
    list_inputs,
    log_environment_changes,
    recipe_of,
    restore,
    with_initial_settings,
)
from vila.train.train_state import (
    gather_full_tensors,
    load_initial_model,
    make_train_state,
    model_with_tensors,
    open_initial_model,
)
from vila.train.trainer import Trainer, TrainerCallback


@dataclass
class Run:
    """A stage that is ready to train.

    lock: lock on the run's directory, of rank 0; held from `build` to the end of `train`.
    """

    recipe: Recipe
    processor: VilaProcessor
    mixture: Mixture
    trainer: Trainer
    lock: DirectoryLock | None = None

    @property
    def model(self) -> VilaForConditionalGeneration:
        """The model that is trained."""
        return self.trainer.state.model

    @property
    def folder(self) -> Path:
        """Directory of the run."""
        return self.recipe.output.dir

    @property
    def world(self) -> World:
        """The processes of the run."""
        return self.trainer.world

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters."""
        return count_parameters(self.trainer.state.groups)

    def train(self) -> Path:
        """Train until the budget is used up, write model and report; return the model's directory. For all ranks."""
        with self.lock or nullcontext():
            return self._train()

    def _train(self) -> Path:
        try:
            self.trainer.run()
        finally:
            self.trainer.checkpointer.writer.wait()
        progress = self.trainer.progress
        if not progress.step:
            raise TrainingError(
                "the run ended before its first step: no sample can be read and fits data.max_length",
                file=self.folder / "faults.jsonl",
                hint="vila data check RECIPE lists the reasons; no model was written",
            )
        self._write_model()
        if self.world.is_main:
            finished = {
                "progress": asdict(progress),
                "passes": progress.visits / self.mixture.epoch_length,
                "dropped": progress.dropped,
                "truncated": progress.truncated,
                "ranks": self.world.process.world_size,
                "versions": versions(),
            }
            write_json(self.folder / "finished.json", finished)
            write_report(self.folder)
            shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)
        self.world.barrier()
        return model_dir(self.recipe)

    def _write_model(self) -> None:
        target, layout = model_dir(self.recipe), self.recipe.output.layout
        if self.recipe.stage.lora.rank:
            from vila.train.lora import save_adapter

            trained = {
                name
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad or name.startswith("projector.")
            }
            tensors = gather_full_tensors(self.model, torch.float32, self.world, only=trained)
            if tensors is not None:
                save_adapter(self.model, self.processor, target, self.recipe.model.path, tensors=tensors)
            return
        tensors = gather_full_tensors(self.model, torch.bfloat16, self.world)
        if tensors is not None:
            save_model(model_with_tensors(self.model, tensors), self.processor, target, layout)


def model_dir(recipe: Recipe) -> Path:
    """Return the directory of a run's trained model."""
    return recipe.output.dir / "model"


def is_finished(recipe: Recipe) -> bool:
    """Return whether the run has been trained to its end."""
    return (recipe.output.dir / "finished.json").is_file()


def build(
    recipe: Recipe,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    events: Events = SILENT,
    allow_changes: Sequence[str] = (),
    world: World | None = None,
) -> Run:
    """Build the run of a recipe, resumed from its newest checkpoint. Every rank calls it.

    allow_changes: recipe fields or sections that may differ from those of the checkpoint.
    world:         processes of the run; None joins those that `torchrun` started.
    Raises MissingExtraError for absent packages, before anything is read; CheckpointError naming each difference if the
    recipe differs from that of the checkpoint; DirectoryInUseError if another process trains into the same directory.
    """
    require_packages(recipe)
    world = world or open_world(recipe.compute.sharding, recipe.compute.timeout_s)
    events = events if world.is_main else SILENT
    world.run_on_main(lambda: Preflight(recipe, world.process.world_size).raise_problems())
    lock = _open_folder(recipe.output.dir, world, events)
    try:
        return _build(recipe, world, lock, callbacks, events, allow_changes)
    except BaseException as error:
        if lock:
            lock.release()
        if isinstance(error, ConfigError):  # about the recipe, which every rank reads
            error.is_repeated = not world.is_main
        raise


def _build(
    recipe: Recipe,
    world: World,
    lock: DirectoryLock | None,
    callbacks: Sequence[TrainerCallback],
    events: Events,
    allow_changes: Sequence[str],
) -> Run:
    folder = recipe.output.dir
    resumed = load_checkpoint(folder / "checkpoint", world, events)
    if resumed:
        recipe = _resumed_recipe(recipe, resumed, allow_changes, events)
        log_environment_changes(resumed, world, events)
    with world.main_first():
        mixture = build_mixture(recipe, events)
        start = open_initial_model(recipe)
    check_mixture(recipe, mixture)
    unchanged = world.run_on_main(partial(_unchanged_inputs, recipe, resumed, mixture, start, allow_changes, events))
    with world.main_first():
        model, processor = load_initial_model(recipe, start)
    if not recipe.stage.lora.rank:
        # Fail before training if the layout cannot hold the model.
        LAYOUTS[recipe.output.layout].check(model, processor)
    state = make_train_state(recipe, model, processor, mixture, world, events)
    restore(resumed, state.optimizer, recipe, world)
    if note := micro_batch_note(world.process.world_size, global_batch(recipe), recipe.batch.micro):
        events.log(note)
    data = build_data_stream(recipe, processor, mixture, resumed.streams if resumed else None, world)
    progress = resumed.progress if resumed else Progress()
    if resumed:
        events.log(f"{recipe.name}: resuming after step {progress.step}")
    if world.is_main:
        save_recipe(recipe, folder / "recipe.yaml")
    writer = CheckpointWriter(
        folder / "checkpoint",
        world,
        keep_last=recipe.output.keep_last,
        background=recipe.output.async_save,
        inputs=InputFingerprints(list_inputs(recipe, mixture, start), unchanged) if world.is_main else dict,
    )
    own = [MetricsCallback(folder, progress.step, events), ReportCallback(folder)] if world.is_main else []
    max_visits = end_position(recipe, mixture)
    trainer = Trainer(
        state=state,
        data=data,
        schedule=LRSchedule(
            recipe.optim.warmup_ratio, None if max_visits is not None else recipe.budget.tokens, max_visits
        ),
        checkpointer=Checkpointer(writer, recipe, world),
        bad_steps=BadStepLog(
            folder / "bad_steps.jsonl", recipe.budget.max_bad_steps, progress.step, write=world.is_main
        ),
        world=world,
        mfu_meter=build_mfu_meter(recipe, model.config, world),
        progress=progress,
        callbacks=[*own, *callbacks],
        events=events,
        name=recipe.name,
    )
    return Run(recipe, processor, mixture, trainer, lock)


def _resumed_recipe(recipe: Recipe, resumed: Checkpoint, allow_changes: Sequence[str], events: Events) -> Recipe:
    """Return the recipe to resume with. Raises CheckpointError if it does not fit the checkpoint."""
    before = recipe_of(resumed)
    check_recipe_unchanged(before, recipe, recipe.output.dir, allow_changes)
    initial = with_initial_settings(before, recipe)
    if taken := recipe_changes(recipe, initial):
        values = ", ".join(f"{name}={value}" for name, _, value in taken)
        events.log(f"note: resuming with {values}, as the run was started; the recipe does not set them")
    check_stream_count(resumed, global_batch(initial))
    return initial


def _open_folder(folder: Path, world: World, events: Events) -> DirectoryLock | None:
    """Create and lock the directory of a run; returns the lock on rank 0.

    Raises, on every rank, ConfigError if it cannot be written, DirectoryInUseError if another process trains there.
    """
    lock = DirectoryLock(folder)

    def acquire() -> None:
        try:
            lock.acquire(events=events)
            remove_partials(folder)
        except OSError as error:
            raise ConfigError(
                f"cannot be written ({error.strerror})",
                field="output.dir",
                value=str(folder),
                hint="choose another directory",
            ) from error

    world.run_on_main(acquire)
    return lock if world.is_main else None


def _unchanged_inputs(
    recipe: Recipe,
    resumed: Checkpoint | None,
    mixture: Mixture,
    start: ModelCheckpoint,
    allow_changes: Sequence[str],
    events: Events,
) -> dict[str, dict[str, FileFingerprint]]:
    """Return the fingerprints of inputs that are as in the checkpoint. Raises RunChangedError for changed inputs."""
    if resumed is None or resumed.format == 1:
        return {}
    inputs = list_inputs(recipe, mixture, start)
    return check_inputs_unchanged(resumed.inputs, inputs, recipe.output.dir, allow_changes, events)
