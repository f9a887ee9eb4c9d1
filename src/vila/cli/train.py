"""`vila train`: one stage from a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vila.core.dist import current_place
from vila.core.errors import VilaError
from vila.core.events import SILENT

if TYPE_CHECKING:
    from vila.config.schema import Recipe
    from vila.train.run import Run

_SURVEYED = 16


def train(
    recipe: Annotated[
        str, typer.Argument(help="Packaged recipe (starter/3_sft, vila_7b/1_align, ...) or a .yaml file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields to change: optim.warmup_ratio=0.1 output.dir=runs/x ...")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, or with --slurm the script, and stop.")
    ] = False,
    slurm: Annotated[
        str,
        typer.Option(
            metavar="nodes=N,...",
            help="Submit to Slurm instead: nodes, gpus (a node, 8), cpus, partition, account, qos, constraint, "
            "reservation, time, grace (300 s), port.",
            show_default=False,
        ),
    ] = "",
    allow_changes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD",
            help="Field or section that may differ from the run that goes on. May be given several times.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train the stage that [bold]RECIPE[/bold] describes; run it again after a stop and it goes on."""
    from vila.config.load import load_recipe, recipe_to_yaml

    notes: list[str] = []
    with _said_once():
        resolved = load_recipe(recipe, overrides or [], notes=notes)
    for note in notes if current_place().main else ():
        typer.echo(f"note: {note}", err=True)
    allowed = tuple(allow_changes or ())
    if slurm:
        allowing = [word for field in allowed for word in ("--allow-changes", field)]
        typer.echo(_batch(resolved, ["train", recipe, *(overrides or []), *allowing], slurm, dry_run), nl=False)
        return
    if dry_run:
        _check_data(resolved)
        typer.echo(recipe_to_yaml(resolved), nl=False)
        return
    from vila.cli.model_card import write_model_card
    from vila.cli.progress import Screen
    from vila.cli.watch import listeners_of
    from vila.core.files import write_json
    from vila.train.run import build, is_finished, model_dir, refuse_changes

    with Screen() as screen:
        # All processes of a run come through here; one of them speaks.
        events = screen if current_place().main else SILENT
        if is_finished(resolved):
            before = load_recipe(str(resolved.output.dir / "recipe.yaml"))
            refuse_changes(before, resolved, resolved.output.dir, allowed)
            events.said(f"{resolved.name}: already trained, the model is in {model_dir(resolved)}")
            return
        run = build(resolved, events=events, allow_changes=allowed)
        run.trainer.listeners += listeners_of(resolved, run.processor, events)
        events.said(
            f"{resolved.name}: {run.trainable:,} parameters learn, {run.mixture.epoch_length:,} samples an epoch"
        )
        if run.world.main:
            lines, shares = shares_of(run)
            for line in [*lines, *preview_of(run)]:
                events.said(line)
            write_json(run.folder / "shares.json", shares)
        where = run.train()
        if run.world.main:
            write_model_card(resolved)
            events.said(f"{resolved.name}: the report is {run.folder / 'report.html'}")
        events.said(f"{resolved.name}: the model is in {where}")
        run.world.close()


@contextmanager
def _said_once() -> Iterator[None]:
    """Inside, the processes of a run raise the same errors, so rank 0 alone prints them; but not those of the disk,
    which may be of one machine alone."""
    place = current_place()
    try:
        yield
    except VilaError as error:
        error.is_repeated = not (place.main or isinstance(error.__cause__, OSError))
        raise


def _check_data(recipe: Recipe) -> None:
    """Raise ConfigError if the stage needs images and its data, where it is on this machine, has none."""
    if not recipe.needs_images:
        return
    from vila.data.loader import Entry, open_mixture
    from vila.data.survey import require_images

    entries = [Entry(**entry.model_dump()) for entry in recipe.data.mixture]
    if all(Path(entry.path).exists() for entry in entries):
        require_images(open_mixture(entries, recipe.seed), recipe.needs_images)


def _batch(recipe: Recipe, arguments: list[str], slurm: str, dry_run: bool) -> str:
    """The batch script, or what Slurm says to it. Raises ConfigError when the processes cannot share the batch."""
    from vila.cli.slurm import parse_job, render_script, submit
    from vila.data.deal import micro_note

    job = parse_job(slurm)
    if note := micro_note(job.world, recipe.batch.rows or recipe.batch.samples, recipe.batch.micro):
        typer.echo(note, err=True)
    folder = recipe.output.dir
    script = render_script(job, name=recipe.name, folder=folder, arguments=arguments)
    if dry_run:
        return script
    if (folder / "finished.json").is_file():
        return f"{recipe.name}: already trained, the model is in {folder / 'model'}\n"
    return f"{submit(script, folder)}: {folder / 'train.sbatch'}\n"


def shares_of(run: Run) -> tuple[list[str], dict[str, int]]:
    """Estimate the share of each data set in an epoch from a few of its samples: a line each, and tokens by name."""
    from vila.data.preview import LengthPreview
    from vila.data.survey import survey
    from vila.train.rows import build_reader

    reader = build_reader(run.recipe, run.processor, run.mixture)
    try:
        shares = survey(run.mixture, reader.tokenise, _SURVEYED)
    except VilaError as error:
        # Whether a fault stops the run is decided by its budget of faults.
        return [f"  shares are not known: {error}"], {}
    lines = [
        f"  {one.name}: {one.samples:,} samples, about {one.tokens:,} tokens ({one.token_share:.1%}) "
        f"and {one.images:,} images an epoch"
        for one in shares
    ]
    for one in shares:
        rows = LengthPreview(run.recipe.data.max_length, run.recipe.data.overlong)
        for length in one.lengths:
            rows.add(length)
        lines += [f"  {one.name}: {line}" for line in rows.lines()]
    return lines, {one.name: one.tokens for one in shares}


def preview_of(run: Run) -> list[str]:
    """Describe what the tower sees of a few images of each data set, and media that the samples do not have."""
    from vila.cli.data_shown import unread_note
    from vila.data.preview import preview_images

    lines = []
    for part in run.mixture.parts:
        lines += [f"  {part.name}: {line}" for line in preview_images(part, run.processor.spec, _SURVEYED).lines()]
        if note := unread_note(part.source.unread):
            lines.append(f"  {part.name}: {note}")
    return lines
