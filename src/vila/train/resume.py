"""Saving and resuming a run: training state in checkpoints, and checks that recipe, data and model are unchanged."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vila.config.load import recipe_changes
from vila.config.schema import Recipe
from vila.core.errors import CheckpointError, RunChangedError, VilaError
from vila.core.progress import SILENT, Events
from vila.core.reading import Fields
from vila.data.fingerprint import FileFingerprint, compare_files, fingerprint_files
from vila.data.mixture import Mixture
from vila.data.packing import PackingStreamState
from vila.model.hub import cached_folder
from vila.model.layouts.base import Checkpoint as ModelCheckpoint
from vila.train.checkpoint import Checkpoint, CheckpointWriter, Progress, versions
from vila.train.fsdp import World
from vila.train.optimizer import MasterAdamW
from vila.train.random_state import random_state, seed_everything, set_random_state

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
"""Fields and sections that affect neither the samples nor the mathematics of a step; they may change on resume."""


class Checkpointer:
    """Decides when a run is saved, and writes its training state. Every rank has one."""

    def __init__(self, writer: CheckpointWriter, recipe: Recipe, world: World) -> None:
        self.writer, self.world = writer, world
        self._recipe, self._output = recipe, recipe.output
        # Only a model that was saved after its evaluation can be kept as the best one.
        self._every_steps = (
            recipe.monitor.eval_every_steps if self._output.keep_best else self._output.checkpoint_every_steps
        )
        self.start_timer()

    def start_timer(self) -> None:
        """Start the interval until the next checkpoint by time."""
        self._started = time.monotonic()

    def is_overdue(self) -> bool:
        """Return whether `output.checkpoint_every_s` seconds have passed; ranks may disagree, so rank 0 decides."""
        return time.monotonic() - self._started >= self._output.checkpoint_every_s

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint by number of steps is due after `step`."""
        return bool(self._every_steps) and step % self._every_steps == 0

    def save(self, progress: Progress, optimizer: MasterAdamW, streams: Sequence[PackingStreamState]) -> None:
        """Write a checkpoint, or start a thread that writes it. Every rank calls it.

        streams: states of this rank's packing streams.
        """
        process = self.world.process
        tensors = optimizer.state_tensors()
        tensors |= {_generator(process.rank, name): value for name, value in random_state().items()}
        states = [state for rank in self.world.all_gather_object(streams) for state in rank]
        recipe: dict[str, Any] = self._recipe.model_dump(mode="json")
        state = Checkpoint(progress, states, recipe, versions(), process.world_size)
        self.writer.save(tensors, state, best=self._best_step())

    def _best_step(self) -> int | None:
        path = self._output.dir / "best.json"
        if not (self._output.keep_best and path.is_file()):
            return None
        return Fields.of_file(path).integer("step", maximum=2**62)


def restore(resumed: Checkpoint | None, optimizer: MasterAdamW, recipe: Recipe, world: World) -> None:
    """Load the tensors of a checkpoint into the optimizer and the model, and set the random number generators.

    Generators are seeded from seed, step and rank at the start of a run, and when the number of ranks has changed.
    Raises CheckpointError if the checkpoint is of another model.
    """
    rank, step = world.process.rank, resumed.progress.step if resumed else 0
    if resumed is None or resumed.world != world.process.world_size:
        seed_everything(recipe.seed, step, rank)
    if resumed is None:
        return
    generators = {}
    if resumed.world == world.process.world_size:
        names = resumed.tensor_names
        generators = {name: value for name, value in random_state().items() if _generator(rank, name) in names}
    tensors = {_generator(rank, name): value for name, value in generators.items()}
    resumed.load_tensors(optimizer.state_tensors() | tensors, world)
    optimizer.copy_masters_to_model()
    if generators:
        set_random_state(generators)


def _generator(rank: int, name: str) -> str:
    """Return the tensor name of a generator's state in a checkpoint."""
    return f"random/{rank}/{name}"


def check_recipe_unchanged(before: Recipe, recipe: Recipe, folder: Path, allow: Sequence[str] = ()) -> None:
    """Raise RunChangedError with each difference if the run in `folder` was started with another recipe.

    allow: fields or sections that may differ, in addition to FREE.
    """
    then, now = _with_former_defaults(before), with_initial_settings(before, recipe)
    check_differences("the recipe", recipe_changes(then, now), folder, (*FREE, *allow))


def with_initial_settings(before: Recipe, recipe: Recipe) -> Recipe:
    """Return `recipe` with fields that it leaves open set as in `before`, a recipe of version one.

    before: recipe of the run so far. If version one did not write it, `recipe` is returned unchanged.
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
    """Return a recipe of version one, which lacks `model.exif_orientation`, with the value that it trained with.

    Version one applied `model.image_mode` and `model.template` to every model, and ignored EXIF orientation.
    """
    if "exif_orientation" in recipe.model.model_fields_set:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"exif_orientation": False})})


def check_differences(
    what: str, differences: Sequence[tuple[str, str, str]], folder: Path, allow: Sequence[str]
) -> None:
    """Raise RunChangedError with the differences (field, before, now) outside the fields and sections in `allow`."""
    refused = [
        difference
        for difference in differences
        if not any(difference[0] == section or difference[0].startswith(f"{section}.") for section in allow)
    ]
    if refused:
        raise RunChangedError(what, refused, folder)


def recipe_of(checkpoint: Checkpoint) -> Recipe:
    """Return the recipe that a checkpoint was written with. Raises CheckpointError if this version cannot read it."""
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
            hint="resume with the version of vila that wrote it, or delete that directory to start over",
        ) from error


def check_stream_count(checkpoint: Checkpoint, count: int) -> None:
    """Raise CheckpointError if the global batch differs from the number of packing streams of the checkpoint."""
    if len(checkpoint.streams) != count:
        raise CheckpointError(
            "the global batch cannot change within a run",
            file=checkpoint.folder,
            field="batch",
            value=count,
            expected=str(len(checkpoint.streams)),
            hint="choose another output.dir, with model.path set to the model of this run",
        )


def log_environment_changes(resumed: Checkpoint, world: World, events: Events) -> None:
    """Log changes of versions, threads and ranks that may change the numbers in the last bits."""
    now = versions()
    changed = [f"{name} {was} -> {now.get(name)}" for name, was in resumed.versions.items() if now.get(name) != was]
    if resumed.world != world.process.world_size:
        changed.append(f"ranks {resumed.world} -> {world.process.world_size}")
    if changed:
        events.log(f"resumed in another environment ({', '.join(changed)}): results may differ in the last bits")


# Fingerprints of the inputs of a run: data sets and initial model.

_MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".model", ".txt", ".jinja")


@dataclass(frozen=True, slots=True)
class DataInput:
    """One entry of the mixture: its path, its number of samples after splits and limits, and its files by name."""

    path: str
    samples: int
    files: dict[str, Path]


@dataclass(frozen=True, slots=True)
class Inputs:
    """All inputs of a run.

    models: files by name, for each of `model.path`, `model.llm` and `model.vision` that is set.
    """

    data: list[DataInput]
    models: dict[str, dict[str, Path]]

    def by_field(self) -> dict[str, dict[str, Path]]:
        """Return the files of every recipe field."""
        return {_data_field(number): data.files for number, data in enumerate(self.data)} | self.models


def list_inputs(recipe: Recipe, mixture: Mixture, start: ModelCheckpoint) -> Inputs:
    """List the files of a recipe's data and model, without reading them.

    start: result of `open_initial_model`. A model that is not downloaded yet has no files.
    """
    data = [
        DataInput(entry.path, len(dataset.source), _by_name(dataset.source.files, Path(entry.path)))
        for entry, dataset in zip(recipe.data.mixture, mixture.datasets, strict=True)
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
    """Content of `inputs.json`: fingerprints of the inputs, computed in a thread. Call it to wait for the result."""

    def __init__(self, inputs: Inputs, known: Mapping[str, Mapping[str, FileFingerprint]] | None = None) -> None:
        """Start computing. known: fingerprints by field that `check_inputs_unchanged` has computed already."""
        self._inputs = inputs
        self._fingerprints: Mapping[str, Mapping[str, FileFingerprint]] = known or {}
        self._error: VilaError | None = None
        # A daemon thread: a run that fails does not wait for it.
        self._thread = threading.Thread(target=self._compute, name="fingerprints", daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        known = self._fingerprints
        try:
            self._fingerprints = {
                field: known[field] if field in known else fingerprint_files(files)
                for field, files in self._inputs.by_field().items()
            }
        except VilaError as error:
            self._error = error

    def __call__(self) -> dict[str, Any]:
        """Return the content of `inputs.json`. Raises VilaError naming a file that cannot be read."""
        self._thread.join()
        if self._error:
            raise self._error
        data = [
            {"path": one.path, "samples": one.samples, "files": self._fingerprints[_data_field(number)]}
            for number, one in enumerate(self._inputs.data)
        ]
        return {"data": data, "model": {field: self._fingerprints[field] for field in self._inputs.models}}


def check_inputs_unchanged(
    before: Mapping[str, Any], inputs: Inputs, folder: Path, allow: Sequence[str] = (), events: Events = SILENT
) -> dict[str, dict[str, FileFingerprint]]:
    """Compare inputs with the fingerprints of a checkpoint; return the fingerprints of unchanged fields.

    before: content of `inputs.json`.
    allow:  fields or sections that may differ, such as `data` or `model.path`; `events` receives each difference.
    Raises RunChangedError with each difference: number of samples, files, their sizes and content.
    """
    samples, fingerprints = _parse_inputs(before, folder)
    differences: list[tuple[str, str, str]] = []
    unchanged: dict[str, dict[str, FileFingerprint]] = {}
    for number, data in enumerate(inputs.data):
        field = _data_field(number)
        if field in samples and samples[field] != data.samples:
            differences.append((field, f"{samples[field]:,} samples", f"{data.samples:,} samples"))
    for field, files in inputs.by_field().items():
        if field not in fingerprints:
            continue
        changes, same = compare_files(fingerprints[field], files)
        differences += [(field, f"{name}: {was}", now) for name, was, now in changes]
        if not changes:
            unchanged[field] = same
    check_differences("the data or the model", differences, folder, allow)
    for field, was, now in differences:
        events.log(f"note: resuming with an allowed change: {field}: {was} -> {now}")
    return unchanged


def _parse_inputs(
    before: Mapping[str, Any], folder: Path
) -> tuple[dict[str, int], dict[str, dict[str, FileFingerprint]]]:
    try:
        samples = {_data_field(number): int(one["samples"]) for number, one in enumerate(before["data"])}
        files = {_data_field(number): one["files"] for number, one in enumerate(before["data"])} | before["model"]
        return samples, {
            field: {
                name: FileFingerprint(int(size), int(mtime_ns), int(pieces), str(sha256))
                for name, (size, mtime_ns, pieces, sha256) in named.items()
            }
            for field, named in files.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"not the fingerprints of a run ({type(error).__name__}: {error})", file=folder / "inputs.json"
        ) from error


def _data_field(number: int) -> str:
    return f"data.mixture.{number}.path"


def _files_in(folder: Path) -> list[Path]:
    """Return configs, tokenizer and weights of a model directory, including its subdirectories (`llm/`, ...)."""
    if folder.is_file():
        return [folder]
    found = [*folder.glob("*"), *folder.glob("*/*")]
    return [path for path in found if path.is_file() and path.suffix in _MODEL_SUFFIXES and path.name[0] != "."]


def _by_name(files: Sequence[Path], base: Path) -> dict[str, Path]:
    """Return files by a name relative to `base` (a directory, a file or a pattern), so that `base` may be moved."""
    if not base.is_dir():
        base = Path(os.path.commonpath([path.parent for path in files])) if files else base
    return {(path.relative_to(base) if path.is_relative_to(base) else path).as_posix(): path for path in sorted(files)}
