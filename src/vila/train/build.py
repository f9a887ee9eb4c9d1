"""Building a run from a recipe: the one composition of model, data, optimizer and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vila.config.load import recipe_changes, save_recipe
from vila.config.schema import Recipe
from vila.core.errors import ConfigError, TrainingError
from vila.core.files import DirectoryLock, remove_partials, write_json
from vila.core.progress import SILENT, Events
from vila.core.reading import Fields
from vila.data.fingerprint import FileFingerprint
from vila.data.mixture import Mixture
from vila.data.packing import fit_micro_batch, micro_batch_note
from vila.model.layouts.base import Checkpoint as ModelCheckpoint
from vila.model.layouts.detect import LAYOUTS
from vila.model.loading import save_model
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor
from vila.train.checkpoint import Checkpoint, CheckpointWriter, Progress, clear_checkpoints, load_checkpoint, versions
from vila.train.fsdp import World, open_world
from vila.train.metrics_log import MetricsLog
from vila.train.mfu import build_mfu_meter
from vila.train.parameter_groups import count_parameters
from vila.train.preflight import Preflight, check_mixture, require_packages
from vila.train.report import RunReport, write_report
from vila.train.resume import (
    InputFingerprints,
    check_inputs_unchanged,
    check_recipe_unchanged,
    check_stream_count,
    list_inputs,
    log_environment_changes,
    recipe_of,
    restore,
    save,
    with_initial_settings,
)
from vila.train.setup import (
    build_bad_sample_log,
    build_mixture,
    build_rows,
    gather_full_tensors,
    last_position,
    load_initial_model,
    make_train_state,
    model_with_tensors,
    open_initial_model,
)
from vila.train.trainer import Trainer, TrainerCallback

__all__ = ["Run", "build", "check_recipe_unchanged", "is_finished", "model_dir"]


@dataclass
class Run:
    """A stage that can be trained: everything built, resumed where a checkpoint was found."""

    recipe: Recipe
    model: VilaForConditionalGeneration
    processor: VilaProcessor
    mixture: Mixture
    trainer: Trainer
    trainable: int
    checkpoints: CheckpointWriter
    lock: DirectoryLock | None = None
    """Lock on the directory of the run; held by the main process from `build` to the end of `train`."""

    @property
    def folder(self) -> Path:
        """Directory of the run."""
        return self.recipe.output.dir

    @property
    def world(self) -> World:
        """The processes of the run."""
        return self.trainer.world

    def train(self) -> Path:
        """Train to the end of the budget, write model and report; the model's directory. All processes call it."""
        with self.lock or nullcontext():
            return self._train()

    def _train(self) -> Path:
        try:
            self.trainer.run()
        finally:
            self.checkpoints.wait()
        if not self.trainer.progress.step:
            raise TrainingError(
                "the run ended before its first step: no sample can be read and fits data.max_length",
                file=self.folder / "faults.jsonl",
                hint="vila data check RECIPE lists the reasons; no model was written",
            )
        self._write_model()
        if self.world.is_main:
            progress = self.trainer.progress
            facts = {
                "progress": asdict(progress),
                "passes": progress.visits / self.mixture.epoch_length,
                "dropped": progress.dropped,
                "truncated": progress.truncated,
                "ranks": self.world.process.world_size,
                "versions": versions(),
            }
            write_json(self.folder / "finished.json", facts)
            write_report(self.folder)
            clear_checkpoints(self.folder / "checkpoint")
        self.world.all_gather_object(None)
        return model_dir(self.recipe)

    def _write_model(self) -> None:
        target, layout = model_dir(self.recipe), self.recipe.output.layout
        if self.recipe.stage.lora.rank:
            from vila.train.lora import save_adapter

            learnt = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            learnt |= {name for name, _ in self.model.named_parameters() if name.startswith("projector.")}
            tensors = gather_full_tensors(self.model, torch.float32, self.world, only=learnt)
            if tensors is not None:
                save_adapter(self.model, self.processor, target, self.recipe.model.path, tensors=tensors)
            return
        tensors = gather_full_tensors(self.model, torch.bfloat16, self.world)
        if tensors is not None:
            save_model(model_with_tensors(self.model, tensors), self.processor, target, layout)


def model_dir(recipe: Recipe) -> Path:
    """Where the trained model of a run lies."""
    return recipe.output.dir / "model"


def is_finished(recipe: Recipe) -> bool:
    """Whether the run has been trained to its end."""
    return (recipe.output.dir / "finished.json").is_file()


def build(
    recipe: Recipe,
    *,
    listeners: Sequence[TrainerCallback] = (),
    events: Events = SILENT,
    allow_changes: Sequence[str] = (),
    world: World | None = None,
) -> Run:
    """Build the run of a recipe, resuming from its newest checkpoint. Every process of the run calls it.

    world: the processes of the run; None joins those that `torchrun` started.
    Raises MissingExtraError, before anything is read, for absent packages that the recipe needs, CheckpointError when
    the recipe differs from that of the checkpoint, naming each difference, and DirectoryInUseError when another process
    trains into the same directory.
    """
    require_packages(recipe)
    world = world or open_world(recipe.compute.sharding, recipe.compute.timeout_s)
    events = events if world.is_main else SILENT
    world.run_on_main(lambda: Preflight(recipe, world.process.world_size).raise_problems())
    lock = _open_folder(recipe.output.dir, world, events)
    try:
        return _build(recipe, world, lock, listeners, events, allow_changes)
    except BaseException as error:
        if lock:
            lock.release()
        if isinstance(error, ConfigError):  # of the recipe, which all processes read
            error.is_repeated = not world.is_main
        raise


def _build(
    recipe: Recipe,
    world: World,
    lock: DirectoryLock | None,
    listeners: Sequence[TrainerCallback],
    events: Events,
    allow_changes: Sequence[str],
) -> Run:
    folder = recipe.output.dir
    resumed = load_checkpoint(folder / "checkpoint", world, events)
    if resumed:
        before = recipe_of(resumed)
        check_recipe_unchanged(before, recipe, folder, allow_changes)
        begun = with_initial_settings(before, recipe)
        if taken := recipe_changes(recipe, begun):
            values = ", ".join(f"{name}={value}" for name, _, value in taken)
            events.log(f"note: resuming with {values}, which the run began with and the recipe leaves open")
        recipe = begun
        check_stream_count(resumed, recipe.batch.rows or recipe.batch.samples)
        log_environment_changes(resumed, world, events)
    with world.main_first():
        mixture = build_mixture(recipe, events)
        start = open_initial_model(recipe)
    check_mixture(recipe, mixture)
    same = world.run_on_main(partial(_same_inputs, recipe, resumed, mixture, start, allow_changes, events))
    with world.main_first():
        model, processor = load_initial_model(recipe, start)
    if not recipe.stage.lora.rank:
        # What cannot be written in the end is said before it is trained.
        LAYOUTS[recipe.output.layout].check(model, processor)
    learner = make_train_state(recipe, model, processor, mixture, world, events)
    restore(resumed, learner.optimizer, recipe, world)
    count = recipe.batch.rows or recipe.batch.samples
    if note := micro_batch_note(world.process.world_size, count, recipe.batch.micro):
        events.log(note)
    states = resumed.lanes if resumed else None
    place = {"rank": world.process.rank, "world": world.process.world_size}
    lanes = build_rows(recipe, processor, mixture, states, **place)
    progress = resumed.progress if resumed else Progress()
    if resumed:
        events.log(f"{recipe.name}: going on after step {progress.step}")
    if world.is_main:
        save_recipe(recipe, folder / "recipe.yaml")
    checkpoints = CheckpointWriter(
        folder / "checkpoint",
        world,
        keep_last=recipe.output.keep_last,
        background=recipe.output.async_save,
        inputs=InputFingerprints(list_inputs(recipe, mixture, start), same) if world.is_main else dict,
    )
    trainer = Trainer(
        model=model,
        objective=learner.objective,
        optimizer=learner.optimizer,
        lanes=lanes,
        data_sets=[part.name for part in mixture.datasets],
        seen=learner.seen,
        pin=world.device.type == "cuda",
        micro=fit_micro_batch(world.process.world_size, count, recipe.batch.micro),
        warmup_ratio=recipe.optim.warmup_ratio,
        spent=_budget(recipe, mixture),
        save=_saver(recipe, checkpoints),
        save_every_s=recipe.output.checkpoint_every_s,
        save_every_steps=_save_every(recipe),
        world=world,
        faults=build_bad_sample_log(recipe, states, write=world.is_main),
        bad_steps=recipe.budget.max_bad_steps,
        bad_step=_bad_steps(folder, progress.step, world),
        check_saves=checkpoints.check,
        mfu_meter=build_mfu_meter(recipe, model.config, world),
        progress=progress,
        listeners=[*_metrics(folder, progress, world, events), *listeners],
        events=events,
        name=recipe.name,
    )
    return Run(recipe, model, processor, mixture, trainer, count_parameters(learner.groups), checkpoints, lock)


def _open_folder(folder: Path, world: World, events: Events) -> DirectoryLock | None:
    """Make and lock the directory of a run; the lock is the main process's.

    Every process raises ConfigError when it cannot be written, DirectoryInUseError when another process trains there.
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


def _same_inputs(
    recipe: Recipe,
    resumed: Checkpoint | None,
    mixture: Mixture,
    start: ModelCheckpoint,
    allow_changes: Sequence[str],
    events: Events,
) -> dict[str, dict[str, FileFingerprint]]:
    """The stamps of inputs that are as the checkpoint has them. Raises RunChangedError for others."""
    if resumed is None or resumed.format == 1:
        return {}
    inputs = list_inputs(recipe, mixture, start)
    return check_inputs_unchanged(resumed.inputs, inputs, recipe.output.dir, allow_changes, events)


def _metrics(folder: Path, progress: Progress, world: World, events: Events) -> list[TrainerCallback]:
    if not world.is_main:
        return []
    metrics = MetricsLog(folder / "metrics.jsonl", progress.step)
    if metrics.last_step < progress.step:
        events.log(
            f"note: {metrics.path} holds {f'steps to {metrics.last_step:,}' if metrics.last_step else 'no steps'}, and "
            f"the run resumes after step {progress.step:,}; those between are missing from metrics and report"
        )

    def log(trainer: Trainer, facts: dict[str, Any]) -> None:
        metrics.write(**facts)

    return [log]


def _budget(recipe: Recipe, mixture: Mixture) -> Callable[[Progress], float]:
    end = last_position(recipe, mixture)
    if end is None:
        return lambda progress: progress.tokens / recipe.budget.tokens
    return lambda progress: progress.visits / end


def _save_every(recipe: Recipe) -> int:
    """The best model can only be kept where one is saved after each evaluation."""
    return recipe.monitor.eval_every_steps if recipe.output.keep_best else recipe.output.checkpoint_every_steps


def _saver(recipe: Recipe, checkpoints: CheckpointWriter) -> Callable[[Trainer, bool], None]:
    best_file = recipe.output.dir / "best.json"
    report = RunReport(recipe.output.dir)

    def save_now(trainer: Trainer, wait: bool) -> None:
        best = None
        if recipe.output.keep_best and best_file.is_file():
            best = Fields.of_file(best_file).integer("step", maximum=2**62)
        save(checkpoints, recipe, trainer, best=best)
        if trainer.is_main:
            report.write()
        if wait:
            checkpoints.wait()

    return save_now


def _bad_steps(folder: Path, step: int, world: World) -> Callable[[dict[str, Any]], None]:
    """Writes a line of `bad_steps.jsonl`; those after `step`, which the run comes by again, are dropped."""
    path = folder / "bad_steps.jsonl"
    if world.is_main and path.is_file():
        MetricsLog(path, step)

    def note(facts: dict[str, Any]) -> None:
        if world.is_main:
            MetricsLog(path, facts["step"] - 1).write(**facts)

    return note
