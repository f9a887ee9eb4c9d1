"""`vila train`: one stage from a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vila.core.errors import VilaError

if TYPE_CHECKING:
    from vila.train.run import Run

_SURVEYED = 16


def train(
    recipe: Annotated[
        str, typer.Argument(help="Packaged recipe (starter/3_sft, vila_7b/1_align, ...) or a .yaml file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields to change: optim.warmup_ratio=0.1 output.dir=runs/x ...")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")] = False,
) -> None:
    """Train the stage that [bold]RECIPE[/bold] describes; run it again after a stop and it goes on."""
    from vila.config.load import load_recipe, recipe_to_yaml

    resolved = load_recipe(recipe, overrides or [])
    if dry_run:
        typer.echo(recipe_to_yaml(resolved), nl=False)
        return
    from vila.cli.progress import Screen
    from vila.train.run import build, is_finished, model_dir, refuse_changes

    with Screen() as screen:
        if is_finished(resolved):
            refuse_changes(load_recipe(str(resolved.output.dir / "recipe.yaml")), resolved, resolved.output.dir)
            screen.said(f"{resolved.name}: already trained, the model is in {model_dir(resolved)}")
            return
        run = build(resolved, events=screen)
        screen.said(
            f"{resolved.name}: {run.trainable:,} parameters learn, {run.mixture.epoch_length:,} samples an epoch"
        )
        for line in share_lines(run):
            screen.said(line)
        screen.said(f"{resolved.name}: the model is in {run.train()}")


def share_lines(run: Run) -> list[str]:
    """What each data set brings to an epoch, estimated from a few of its samples; a line each."""
    from vila.data.survey import survey
    from vila.train.rows import build_reader

    reader = build_reader(run.recipe, run.processor, run.mixture)
    try:
        shares = survey(run.mixture, reader.tokenise, _SURVEYED)
    except VilaError as error:
        # Whether a fault stops the run is for its own budget of faults to say.
        return [f"  shares are not known: {error}"]
    return [
        f"  {one.name}: {one.samples:,} samples, about {one.tokens:,} tokens ({one.token_share:.1%}) "
        f"and {one.images:,} images an epoch"
        for one in shares
    ]
