"""The card of a run's model, from what the run left in its folder and what is known of its data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vila.config.schema import Recipe


def write_model_card(recipe: Recipe, command: str = "") -> Path:
    """Write the card of a finished run's model; returns its path.

    command: the command line that trained it, where it is to be repeated word for word.
    """
    from vila.cli.data_licences import licences_of
    from vila.core.fields import Fields
    from vila.train.card import write_card
    from vila.train.metrics import read_metrics

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
    write_card(folder / "model", recipe, facts)
    return folder / "model" / "README.md"
