"""Going on where a run stopped: what may have changed meanwhile, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vila.config.load import recipe_changes
from vila.config.schema import Recipe
from vila.core.errors import CheckpointError, RunChangedError
from vila.core.events import Events
from vila.train.checkpoint import Checkpoint, Checkpoints, states_in_order, versions
from vila.train.loop import Trainer
from vila.train.optim import MasterAdamW
from vila.train.parallel import World
from vila.train.randomness import random_state, seed_everything, set_random_state

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


def refuse_changes(before: Recipe, recipe: Recipe, folder: Path, allow: Sequence[str] = ()) -> None:
    """Raise RunChangedError, naming each difference, when a run in `folder` was begun with another recipe.

    allow: fields, or sections, that may differ besides FREE.
    """
    then, now = _with_former_defaults(before), as_begun(before, recipe)
    refuse_differences("the recipe", recipe_changes(then, now), folder, (*FREE, *allow))


def as_begun(before: Recipe, recipe: Recipe) -> Recipe:
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


def refuse_differences(
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


def refuse_other_lanes(checkpoint: Checkpoint, count: int) -> None:
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
    rank, step = world.place.rank, resumed.progress.step if resumed else 0
    if resumed is None or resumed.world != world.place.world:
        seed_everything(recipe.seed, step, rank)
    if resumed is None:
        return
    generators = {}
    if resumed.world == world.place.world:
        here = resumed.tensor_names
        generators = {k: v for k, v in random_state().items() if _generator(rank, k) in here}
    resumed.load_tensors(optimizer.state_tensors() | {_generator(rank, k): v for k, v in generators.items()}, world)
    optimizer.state_was_loaded()
    if generators:
        set_random_state(generators)


def save(checkpoints: Checkpoints, recipe: Recipe, trainer: Trainer, *, best: int | None) -> None:
    """Write a checkpoint of a trainer. Every process calls it."""
    world = trainer.world
    tensors = trainer.optimizer.state_tensors()
    tensors |= {_generator(world.place.rank, name): value for name, value in random_state().items()}
    lanes = states_in_order(world.gather(trainer.lanes.states))
    plain: dict[str, Any] = recipe.model_dump(mode="json")
    state = Checkpoint(trainer.progress, lanes, plain, versions(), world.place.world)
    checkpoints.save(tensors, state, best=best)


def _generator(rank: int, name: str) -> str:
    return f"random/{rank}/{name}"


def say_what_differs(resumed: Checkpoint, world: World, events: Events) -> None:
    """Tell where the run goes on, and what may change its numbers in the last bits."""
    changed = [f"{k} {v} -> {versions().get(k)}" for k, v in resumed.versions.items() if versions().get(k) != v]
    if resumed.world != world.place.world:
        changed.append(f"ranks {resumed.world} -> {world.place.world}")
    if changed:
        events.said(f"resumed with other versions ({', '.join(changed)}): the numbers may differ in the last bits")
