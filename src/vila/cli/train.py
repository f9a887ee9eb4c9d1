"""`vila train`: run one training stage of a recipe, locally, under torchrun, or as a Slurm job."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vila.core.errors import VilaError
from vila.core.progress import SILENT
from vila.core.system import current_process

if TYPE_CHECKING:
    from vila.config.schema import Recipe
    from vila.train.build import Run


_SURVEYED = 16
_NOTED = 3


def train(
    recipe: Annotated[
        str, typer.Argument(help="Packaged recipe (starter/3_sft, vila_7b/1_align, ...) or a .yaml file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Recipe fields to override: optim.warmup_ratio=0.1 output.dir=runs/x ...")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, or with --slurm the batch script, and exit.")
    ] = False,
    slurm: Annotated[
        str,
        typer.Option(
            metavar="nodes=N,...",
            help="Submit a Slurm job instead: nodes, gpus (per node, default 8), cpus, partition, account, qos, "
            "constraint, reservation, time, grace (seconds, default 300), port.",
        ),
    ] = "",
    allow_changes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD",
            help="Recipe field or section that may differ from the resumed run. Repeatable.",
        ),
    ] = None,
) -> None:
    """Run the training stage of [bold]RECIPE[/bold]. Resumes after an interruption."""
    from vila.config.load import load_recipe, recipe_to_yaml

    notes: list[str] = []
    origins: dict[str, str] = {}
    with _said_once():
        resolved = load_recipe(recipe, overrides or [], notes=notes, origins=origins)
    _note(notes)
    allowed = tuple(allow_changes or ())
    if slurm:
        allowing = [word for field in allowed for word in ("--allow-changes", field)]
        typer.echo(_batch(resolved, ["train", recipe, *(overrides or []), *allowing], slurm, dry_run), nl=False)
        return
    if dry_run:
        typer.echo(recipe_to_yaml(resolved), nl=False)
        sys.stdout.flush()
        _look(resolved, origins)
        return
    from vila.cli.progress import Screen
    from vila.cli.train_callbacks import build_callbacks, check_monitor
    from vila.core.files import write_json
    from vila.train.build import build, is_finished, model_dir
    from vila.train.resume import check_recipe_unchanged

    with Screen() as screen:
        # Every rank runs this code; rank 0 logs.
        events = screen if current_process().is_main else SILENT
        if is_finished(resolved):
            before = load_recipe(str(resolved.output.dir / "recipe.yaml"))
            check_recipe_unchanged(before, resolved, resolved.output.dir, allowed)
            events.log(f"{resolved.name}: already trained, the model is in {model_dir(resolved)}")
            return
        with _said_once():
            benchmark = check_monitor(resolved, events)
        run = build(resolved, events=events, allow_changes=allowed)
        run.trainer.callbacks += build_callbacks(resolved, run.processor, events, benchmark)
        events.log(
            f"{resolved.name}: {run.num_trainable:,} trainable parameters, "
            f"{run.mixture.epoch_length:,} samples per epoch"
        )
        if run.world.is_main:
            lines, shares = shares_of(run, origins.get("data.max_length", ""))
            for line in [*lines, *preview_of(run)]:
                events.log(line)
            write_json(run.folder / "shares.json", shares)
        where = run.train()
        if run.world.is_main:
            write_model_card(resolved)
            events.log(f"{resolved.name}: the report is {run.folder / 'report.html'}")
        events.log(f"{resolved.name}: the model is in {where}")
        run.world.close()


@contextmanager
def _said_once() -> Iterator[None]:
    """Mark errors of the body that all ranks raise, so that only rank 0 prints them.

    I/O errors may occur on one machine only, so every rank prints them.
    """
    process = current_process()
    try:
        yield
    except VilaError as error:
        error.is_repeated = not (process.is_main or isinstance(error.__cause__, OSError))
        raise


def _note(notes: Sequence[str]) -> None:
    """Print the first three notes and the number of the others to standard error, on rank 0 only."""
    if current_process().is_main:
        for note in notes[:_NOTED]:
            typer.echo(f"note: {note}", err=True)
        if len(notes) > _NOTED:
            typer.echo(f"note: and {len(notes) - _NOTED} more like these", err=True)


def _look(recipe: Recipe, origins: Mapping[str, str]) -> None:
    """Run all checks of a recipe that need no training.

    Missing files of a packaged recipe, and a missing model, are notes; other missing data are errors.
    """
    from vila.cli.progress import Screen
    from vila.cli.train_callbacks import check_monitor
    from vila.config.load import origin_of, recipe_names
    from vila.train.preflight import Preflight

    packaged = set(recipe_names())
    preflight = Preflight(recipe, current_process().world_size)
    with Screen() as screen:
        preflight.check_data(screen)
        preflight.check_model()
    with preflight.collected():
        check_monitor(recipe, fetch=False)
    _note(
        preflight.raise_problems(
            lambda field: field.startswith("model.") or origin_of(field, origins) in packaged,
        )
    )


def _batch(recipe: Recipe, arguments: list[str], slurm: str, dry_run: bool) -> str:
    """Return the batch script, or the output of sbatch. Raises ConfigError if the ranks cannot share the batch."""
    from vila.data.packing import micro_batch_note
    from vila.train.preflight import Preflight
    from vila.train.slurm import parse_job, render_script, submit

    job = parse_job(slurm)
    # The job runs on another machine, which may have files that are missing here.
    _note(Preflight(recipe, job.world).raise_problems(lambda field: True))
    if note := micro_batch_note(job.world, recipe.batch.rows or recipe.batch.samples, recipe.batch.micro):
        typer.echo(note, err=True)
    folder = recipe.output.dir
    script = render_script(job, name=recipe.name, folder=folder, arguments=arguments)
    if dry_run:
        return script
    if (folder / "finished.json").is_file():
        return f"{recipe.name}: already trained, the model is in {folder / 'model'}\n"
    return f"{submit(script, folder)}: {folder / 'train.sbatch'}\n"


def shares_of(run: Run, length_origin: str = "") -> tuple[list[str], dict[str, int]]:
    """Estimate the share of each data set in an epoch from a few samples; return log lines, and tokens by data set.

    length_origin: recipe that `data.max_length` is from; empty if it is the default.
    """
    from vila.data.preview import LengthPreview
    from vila.data.stats import dataset_stats
    from vila.train.build_data import build_reader

    reader = build_reader(run.recipe, run.processor, run.mixture)
    try:
        shares = dataset_stats(run.mixture, reader.tokenize, _SURVEYED)
    except VilaError as error:
        # Whether a fault stops the run is decided by its budget of faults.
        return [f"  shares are not known: {error}"], {}
    lines = [
        f"  {one.name}: {one.samples:,} samples, about {one.tokens:,} tokens ({one.token_share:.1%}) "
        f"and {one.images:,} images an epoch"
        for one in shares
    ]
    for one in shares:
        rows = LengthPreview(run.recipe.data.max_length, run.recipe.data.overlong, length_origin)
        for length in one.lengths:
            rows.add(length)
        lines += [f"  {one.name}: {line}" for line in rows.lines()]
    return lines, {one.name: one.tokens for one in shares}


def preview_of(run: Run) -> list[str]:
    """Describe a few images of each data set as the tower sees them, and media that the format does not read."""
    from vila.data.check import unread_note
    from vila.data.preview import preview_images

    lines = []
    for part in run.mixture.datasets:
        lines += [f"  {part.name}: {line}" for line in preview_images(part, run.processor.spec, _SURVEYED).lines()]
        if note := unread_note(part.source.unread):
            lines.append(f"  {part.name}: {note}")
    return lines


# --- model_card
# Model card of a run, from the files in its directory and the known facts about its data.


def write_model_card(recipe: Recipe, command: str = "") -> Path:
    """Write the card of a finished run's model; returns its path.

    command: the command line that trained it, where it is to be repeated word for word.
    """
    from vila.core.reading import Fields
    from vila.prepare.licences import licences_of
    from vila.train.metrics import read_metrics
    from vila.train.model_card import save_model_card

    folder = recipe.output.dir
    finished = Fields.of_file(folder / "finished.json")
    last = finished.section("progress").integer("step", maximum=2**62)
    facts = {
        **finished,
        "scores": [row for row in read_metrics(folder / "evaluations.jsonl") if row["step"] == last],
        "data_licences": {
            entry.path: [asdict(licence) for licence in licences_of(Path(entry.path))] for entry in recipe.data.mixture
        },
        "command": command,
    }
    save_model_card(folder / "model", recipe, facts)
    return folder / "model" / "README.md"
