"""Every packaged recipe trains three steps on tiny parts, with only sizes and paths overridden."""

import json

import numpy as np
import pytest

from tests.config.tiny_inputs import write_data, write_parts
from tests.train.finish import on_step
from vila.config import load_recipe, recipe_names
from vila.model.loading import build_components, open_components, save_model
from vila.train.build import build
from vila.train.metrics import read_metrics

STEPS = 3


class Enough(Exception):
    """Ends a run."""


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Tiny parts, and an aligned model (output of stage 1) for each tower."""
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    for name in (name for name in recipe_names() if name.endswith("/1_align")):
        facts = load_recipe(name).model
        if not (folder / "aligned" / tower_of(name)).exists():
            checkpoint = open_components(
                llm=str(folder / "llm"), vision=str(folder / tower_of(name)), projector=facts.projector,
                select_layer=facts.select_layer, select_feature=facts.select_feature, image_size=28,
                image_mode=facts.image_mode, template=facts.template,
            )  # fmt: skip
            save_model(build_components(checkpoint, seed=0), checkpoint.processor, folder / "aligned" / tower_of(name))
    return folder


def tower_of(name):
    """Type of the tower in the recipes of a folder."""
    return {"starter": "dinov2", "vila_7b": "clip", "vila_13b": "clip"}.get(name.split("/")[0], "siglip")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def small_recipe(name, parts, data, out):
    """The recipe `name` with smaller sizes and other paths."""
    recipe = load_recipe(name)
    each = 1 if recipe.batch.rows else max(1, 6 // len(recipe.data.mixture))
    sizes = {} if recipe.batch.rows else {"max_samples": each}
    entries = [
        {**entry.model_dump(mode="json"), **sizes, "path": str(path), "image_root": str(path.parent)}
        for entry in recipe.data.mixture
        for path in [data[entry.format]]
    ]
    batch = -(-each * len(entries) // STEPS)
    where = [f"model.llm={parts / 'llm'}", f"model.vision={parts / tower_of(name)}", "model.image_size=28"]
    changes = [
        *([f"model.path={parts / 'aligned' / tower_of(name)}"] if recipe.model.path else where),
        f"data.mixture={json.dumps(entries)}",
        f"output.dir={out}",
        "compute.workers=0",
        "batch.micro=1",
        "batch.rows=1" if recipe.batch.rows else f"batch.samples={batch}",
    ]
    if recipe.budget.tokens:
        changes.append("budget.tokens=2000")
    if recipe.batch.rows:
        changes.append("data.max_length=64")  # a few samples per sequence, so that an epoch has enough steps
    return load_recipe(name, changes)


def stop_after(steps):
    """A listener that ends the run."""

    def listen(trainer, facts):
        if facts["step"] == steps:
            raise Enough

    return on_step(listen)


@pytest.mark.parametrize("name", recipe_names())
def test_a_packaged_recipe_trains_three_steps(name, parts, data, tmp_path):
    recipe = small_recipe(name, parts, data, tmp_path / "out")
    with pytest.raises(Enough):
        build(recipe, callbacks=[stop_after(STEPS)]).train()
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(np.isfinite(row["loss"]) and row["supervised"] > 0 for row in rows)
    read = {data_set.split("#")[0] for row in rows for data_set in row["tokens_by_data_set"]}
    assert read == {data[entry.format].stem for entry in load_recipe(name).data.mixture}
