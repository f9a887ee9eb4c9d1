"""`vila train`: one stage from a recipe."""

from __future__ import annotations

from typing import Annotated

import typer


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
        screen.said(f"{resolved.name}: the model is in {run.train()}")
