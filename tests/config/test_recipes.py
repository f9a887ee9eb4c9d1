"""Every recipe that ships: it loads, follows from the stage before, and survives YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from vila.config import load_recipe, recipe_names
from vila.config.load import recipe_differences, save_recipe

STAGES = ("1_align", "2_pretrain", "3_sft")


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipe_loads_and_survives_a_round_trip_through_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipe_takes_overrides(name: str) -> None:
    recipe = load_recipe(name, ["seed=7", "data.mixture.0.path=/x"])
    assert (recipe.seed, recipe.data.mixture[0].path) == (7, "/x")


def test_packaged_recipes_have_names_and_outputs_of_their_own() -> None:
    recipes = [load_recipe(name) for name in recipe_names()]
    assert len({recipe.name for recipe in recipes}) == len(recipes)
    assert len({recipe.output.dir for recipe in recipes}) == len(recipes)


def test_packaged_recipe_starts_where_another_one_ends() -> None:
    recipes = [load_recipe(name) for name in recipe_names()]
    ends = {(recipe.output.dir / "model").as_posix() for recipe in recipes}
    starts = {recipe.model.path for recipe in recipes if recipe.model.path.startswith("runs/")}
    assert starts <= ends


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_vila_recipes_hold_the_published_numbers(size: str) -> None:
    # scripts/v1_5/paper/*.sh at upstream's eaadb1e; the README's table differs for stage 1, and the scripts win.
    recipes = [load_recipe(f"vila_{size}/{stage}") for stage in STAGES]
    assert [recipe.batch.samples for recipe in recipes] == [256, 1024, 128]
    assert [recipe.stage.lr for recipe in recipes] == [1e-3, 5e-5, 2e-5]
    assert [recipe.stage.tune for recipe in recipes] == [("projector",), ("projector", "llm"), ("projector", "llm")]
    assert [recipe.data.max_length for recipe in recipes] == [2048, 4096, 4096]
    assert [recipe.data.template for recipe in recipes] == ["caption", "page", "vicuna_v1"]
    assert [recipe.model.image_mode for recipe in recipes] == ["square", "pad", "pad"]
    for recipe in recipes:
        assert (recipe.data.packing, recipe.budget.epochs) == ("none", 1)
        assert (recipe.optim.warmup_ratio, recipe.optim.weight_decay) == (0.03, 0)
        assert (recipe.optim.beta1, recipe.optim.beta2, recipe.optim.max_grad_norm) == (0.9, 0.999, 1.0)
    assert [entry.format for recipe in recipes for entry in recipe.data.mixture] == [
        "llava_json",
        "mmc4",
        "coyo",
        "llava_json",
        "vflan",
    ]
    assert recipes[2].data.mixture[1].template == "vicuna_v1_nosys"
    first = recipes[0].model
    assert (first.llm, first.vision) == (f"lmsys/vicuna-{size}-v1.5", "openai/clip-vit-large-patch14-336")
    assert (first.select_layer, first.select_feature, first.image_size) == (-2, "patch", 336)


@pytest.mark.parametrize("stage", STAGES)
def test_vila_13b_differs_from_7b_in_the_llm_and_places_only(stage: str) -> None:
    lines = recipe_differences(load_recipe(f"vila_7b/{stage}"), load_recipe(f"vila_13b/{stage}"))
    changed = {line.split(": ")[0] for line in lines}
    assert changed == {"name", "output.dir", "model.llm" if stage == "1_align" else "model.path"}
