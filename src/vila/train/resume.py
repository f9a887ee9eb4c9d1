"""Going on where a run stopped: what may have changed meanwhile, and what a checkpoint holds."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vila.config.load import recipe_changes
from vila.config.schema import Recipe
from vila.core.errors import CheckpointError, RunChangedError, VilaError
from vila.core.progress import SILENT, Events
from vila.data.fingerprint import FileFingerprint, compare_files, fingerprint_files
from vila.data.mixture import Mixture
from vila.model.hub import cached_folder
from vila.model.layouts.base import Checkpoint as ModelCheckpoint
from vila.train.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    flatten_stream_states,
    random_state,
    seed_everything,
    set_random_state,
    versions,
)
from vila.train.fsdp import World
from vila.train.optimizer import MasterAdamW
from vila.train.trainer import Trainer

FREE = (
    "batch.micro",
    "budget.max_bad_steps",
    "compute.checkpoint_every",
    "compute.compile",
    "compute.gradient_checkpointing",
    "compute.reshard",
    "compute.sharding",
    "compute.timeout_s",
    "compute.workers",
    "data.max_faults",
    "monitor",
    "output.async_save",
    "output.checkpoint_every_s",
    "output.checkpoint_every_steps",
    "output.dir",
    "output.keep_best",
    "output.keep_last",
    "output.layout",
)
"""Fields that neither the samples nor the mathematics of a step depend on."""


def check_recipe_unchanged(before: Recipe, recipe: Recipe, folder: Path, allow: Sequence[str] = ()) -> None:
    """Raise RunChangedError, naming each difference, when a run in `folder` was begun with another recipe.

    allow: fields, or sections, that may differ besides FREE.
    """
    then, now = _with_former_defaults(before), with_initial_settings(before, recipe)
    check_differences("the recipe", recipe_changes(then, now), folder, (*FREE, *allow))


def with_initial_settings(before: Recipe, recipe: Recipe) -> Recipe:
    """Return the recipe to resume with: fields that it leaves open get their values from a recipe of version one.

    before: the recipe of the run so far. If version one did not write it, `recipe` is returned as it is.
    """
    then = _with_former_defaults(before).model
    if then is before.model:
        return recipe
    now = recipe.model
    values = {
        "image_mode": then.image_mode if now.image_mode is None else now.image_mode,
        "exif_orientation": then.exif_orientation if now.exif_orientation is None else now.exif_orientation,
        "template": now.template or then.template,
    }
    return recipe.model_copy(update={"model": now.model_copy(update=values)})


def _with_former_defaults(recipe: Recipe) -> Recipe:
    """A recipe of version one, which has no `model.exif_orientation`, with the value that version one trained with.

    Its `model.image_mode` and `model.template` were applied to every model, and it ignored EXIF orientation.
    """
    if "exif_orientation" in recipe.model.model_fields_set:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"exif_orientation": False})})


def check_differences(
    what: str, differences: Sequence[tuple[str, str, str]], folder: Path, allow: Sequence[str]
) -> None:
    """Raise RunChangedError with the differences (field, before, now) that are in no field or section of `allow`."""
    refused = [one for one in differences if not _within(one[0], allow)]
    if refused:
        raise RunChangedError(what, refused, folder)


def recipe_of(checkpoint: Checkpoint) -> Recipe:
    """The recipe that a checkpoint was written under. Raises CheckpointError when this version does not know it."""
    try:
        return Recipe.model_validate(checkpoint.recipe)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"the recipe cannot be read ({first['msg']})",
            file=checkpoint.folder / "state.json",
            field=f"recipe.{field}",
            value=first["input"],
            hint="go on with the version of vila that wrote it, or delete that directory to start over",
        ) from error


def check_stream_count(checkpoint: Checkpoint, count: int) -> None:
    """Raise CheckpointError when the rows of a global batch are not as many as the lanes of the checkpoint."""
    if len(checkpoint.lanes) != count:
        raise CheckpointError(
            "the global batch cannot change within a run",
            file=checkpoint.folder,
            field="batch",
            value=count,
            expected=str(len(checkpoint.lanes)),
            hint="choose another output.dir, and model.path to begin from the weights of this run",
        )


def _within(field: str, sections: Sequence[str]) -> bool:
    return any(field == section or field.startswith(f"{section}.") for section in sections)


def restore(resumed: Checkpoint | None, optimizer: MasterAdamW, recipe: Recipe, world: World) -> None:
    """Put the tensors of a checkpoint where they belong, and the random number generators where they were.

    Another number of processes draws other numbers: its generators begin anew from seed, step and rank.
    Raises CheckpointError when it is of another model.
    """
    rank, step = world.process.rank, resumed.progress.step if resumed else 0
    if resumed is None or resumed.world != world.process.world_size:
        seed_everything(recipe.seed, step, rank)
    if resumed is None:
        return
    generators = {}
    if resumed.world == world.process.world_size:
        here = resumed.tensor_names
        generators = {k: v for k, v in random_state().items() if _generator(rank, k) in here}
    resumed.load_tensors(optimizer.state_tensors() | {_generator(rank, k): v for k, v in generators.items()}, world)
    optimizer.copy_masters_to_model()
    if generators:
        set_random_state(generators)


def save(checkpoints: CheckpointWriter, recipe: Recipe, trainer: Trainer, *, best: int | None) -> None:
    """Write a checkpoint of a trainer. Every process calls it."""
    world = trainer.world
    tensors = trainer.optimizer.state_tensors()
    tensors |= {_generator(world.process.rank, name): value for name, value in random_state().items()}
    lanes = flatten_stream_states(world.all_gather_object(trainer.lanes.states))
    plain: dict[str, Any] = recipe.model_dump(mode="json")
    state = Checkpoint(trainer.progress, lanes, plain, versions(), world.process.world_size)
    checkpoints.save(tensors, state, best=best)


def _generator(rank: int, name: str) -> str:
    return f"random/{rank}/{name}"


def log_environment_changes(resumed: Checkpoint, world: World, events: Events) -> None:
    """Tell where the run goes on, and what may change its numbers in the last bits."""
    changed = [f"{k} {v} -> {versions().get(k)}" for k, v in resumed.versions.items() if versions().get(k) != v]
    if resumed.world != world.process.world_size:
        changed.append(f"ranks {resumed.world} -> {world.process.world_size}")
    if changed:
        events.log(f"resumed with other versions ({', '.join(changed)}): the numbers may differ in the last bits")


# --- inputs
# Stamps of what a run reads, the data sets and the model that it starts from, kept in its checkpoints.


_MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".model", ".txt", ".jinja")


@dataclass(frozen=True, slots=True)
class DataInput:
    """One entry of the mixture: its path, its samples after splits and limits, and its files by name."""

    path: str
    samples: int
    files: dict[str, Path]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that a run reads.

    models: files by name, of each of `model.path`, `model.llm` and `model.vision` that is given.
    """

    data: list[DataInput]
    models: dict[str, dict[str, Path]]


def list_inputs(recipe: Recipe, mixture: Mixture, start: ModelCheckpoint) -> Inputs:
    """List the files of a recipe's data and model; nothing is read.

    start: what `open_start` returned.
    A part that is still to be fetched from the hub has no files.
    """
    data = [
        DataInput(entry.path, len(part.source), _by_name(part.source.files, Path(entry.path)))
        for entry, part in zip(recipe.data.mixture, mixture.datasets, strict=True)
    ]
    models: dict[str, dict[str, Path]] = {}
    if recipe.model.path:
        weights = {piece.file.path for piece in start.tensors.values()}
        models["model.path"] = _by_name([*_files_in(start.folder), *weights], start.folder)
    else:
        for field, name in (("model.llm", recipe.model.llm), ("model.vision", recipe.model.vision)):
            if folder := cached_folder(name):
                models[field] = _by_name(_files_in(folder), folder)
    return Inputs(data, models)


class InputFingerprints:
    """The stamps of a run's inputs as `inputs.json` holds them, computed by a thread; call it to wait for them."""

    def __init__(self, inputs: Inputs, known: Mapping[str, Mapping[str, FileFingerprint]] | None = None) -> None:
        """known: stamps that are computed already, from `check_inputs_unchanged`; without them the work begins now."""
        self._inputs = inputs
        self._stamps: Mapping[str, Mapping[str, FileFingerprint]] = known or {}
        self._error: VilaError | None = None
        # A daemon: a run that ends by an error does not wait for it.
        self._thread = threading.Thread(target=self._compute, name="stamps", daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        try:
            self._stamps = {
                field: self._stamps[field] if field in self._stamps else fingerprint_files(files)
                for field, files in _fields(self._inputs).items()
            }
        except VilaError as error:
            self._error = error

    def __call__(self) -> dict[str, Any]:
        """Return the content of `inputs.json`. Raises VilaError naming a file that cannot be read."""
        self._thread.join()
        if self._error:
            raise self._error
        data = [
            {"path": one.path, "samples": one.samples, "files": self._stamps[_data_field(number)]}
            for number, one in enumerate(self._inputs.data)
        ]
        return {"data": data, "model": {field: self._stamps[field] for field in self._inputs.models}}


def check_inputs_unchanged(
    before: Mapping[str, Any], inputs: Inputs, folder: Path, allow: Sequence[str] = (), events: Events = SILENT
) -> dict[str, dict[str, FileFingerprint]]:
    """Compare inputs with the stamps of a checkpoint; returns the stamps of those that are the same, by field.

    before: content of `inputs.json`.
    allow:  fields, or sections, that may differ, such as `data` or `model.path`; `events` receive a line then.
    Raises RunChangedError with each difference: number of samples, files, their sizes and content.
    """
    samples, stamps = _parsed(before, folder)
    differences: list[tuple[str, str, str]] = []
    known: dict[str, dict[str, FileFingerprint]] = {}
    for number, one in enumerate(inputs.data):
        field = _data_field(number)
        if field in samples and samples[field] != one.samples:
            differences.append((field, f"{samples[field]:,} samples", f"{one.samples:,} samples"))
    for field, files in _fields(inputs).items():
        if field not in stamps:
            continue
        changes, same = compare_files(stamps[field], files)
        differences += [(field, f"{name}: {was}", now) for name, was, now in changes]
        if not changes:
            known[field] = same
    check_differences("the data or the model", differences, folder, allow)
    for field, was, now in differences:
        events.log(f"note: resuming with a change that was allowed: {field}: {was} -> {now}")
    return known


def _parsed(before: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], dict[str, dict[str, FileFingerprint]]]:
    try:
        samples = {_data_field(number): int(one["samples"]) for number, one in enumerate(before["data"])}
        files = {_data_field(number): one["files"] for number, one in enumerate(before["data"])} | before["model"]
        stamps = {field: {name: _stamp(*values) for name, values in named.items()} for field, named in files.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"not the stamps of a run ({type(error).__name__}: {error})", file=folder / "inputs.json"
        ) from error
    return samples, stamps


def _stamp(size: int, mtime_ns: int, pieces: int, sha256: str) -> FileFingerprint:
    return FileFingerprint(int(size), int(mtime_ns), int(pieces), str(sha256))


def _fields(inputs: Inputs) -> dict[str, dict[str, Path]]:
    return {_data_field(number): one.files for number, one in enumerate(inputs.data)} | inputs.models


def _data_field(number: int) -> str:
    return f"data.mixture.{number}.path"


def _files_in(folder: Path) -> list[Path]:
    """Configs, tokenizer and weights of a model's directory, those of its parts (`llm/`, ...) among them."""
    if folder.is_file():
        return [folder]
    found = [*folder.glob("*"), *folder.glob("*/*")]
    return [path for path in found if path.is_file() and path.suffix in _MODEL_SUFFIXES and path.name[0] != "."]


def _by_name(files: Sequence[Path], base: Path) -> dict[str, Path]:
    """Files by a name that does not change with the place of `base`, a directory, a file or a pattern."""
    if not base.is_dir():
        base = Path(os.path.commonpath([path.parent for path in files])) if files else base
    return {(path.relative_to(base) if path.is_relative_to(base) else path).as_posix(): path for path in sorted(files)}
