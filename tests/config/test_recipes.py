"""Packaged recipes load, start from the output of an earlier stage, and can be saved as YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from vila.config import load_recipe, recipe_names
from vila.config.load import recipe_changes, save_recipe

STAGES = ("1_align", "2_pretrain", "3_sft")
LORA = [name for name in recipe_names() if name.endswith("_lora")]


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipe_loads_and_survives_a_round_trip_through_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipe_takes_overrides(name: str) -> None:
    recipe = load_recipe(name, ["seed=7", "stage.lr=1e-6", "data.mixture=[{format: messages, path: /x}]"])
    assert (recipe.seed, recipe.stage.lr) == (7, 1e-6)
    assert [entry.path for entry in recipe.data.mixture] == ["/x"]


def test_names_and_outputs_of_packaged_recipes_are_unique() -> None:
    recipes = [load_recipe(name) for name in recipe_names()]
    assert len({recipe.name for recipe in recipes}) == len(recipes)
    assert len({recipe.output.dir for recipe in recipes}) == len(recipes)


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipe_writes_below_runs_under_its_own_name(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.output.dir.as_posix() == f"runs/{name}"
    assert recipe.name.replace("/", "_") == name.replace("/", "_")


def test_packaged_recipe_starts_where_another_one_ends() -> None:
    recipes = [load_recipe(name) for name in recipe_names()]
    ends = {(recipe.output.dir / "model").as_posix() for recipe in recipes}
    starts = {recipe.model.path for recipe in recipes if recipe.model.path.startswith("runs/")}
    assert starts <= ends


@pytest.mark.parametrize(
    ("base", "other", "allowed"),
    [
        *((f"vila_7b/{stage}", f"vila_13b/{stage}", set()) for stage in (*STAGES, "1_align_readme", "3_sft_lora")),
        *((f"vila_1_5_3b/{stage}", f"vila_1_5_13b/{stage}", set()) for stage in (*STAGES, "3_sft_lora")),
        *((f"vila_1_5_3b/{s}", f"vila_1_5_8b/{s}", {"model.template", "data.template"}) for s in STAGES),
        ("small/1_align", "small_1_5b/1_align", {"batch.micro"}),
        ("small/3_sft_lora", "small_1_5b/3_sft", set()),
    ],
)
def test_a_larger_sibling_differs_only_in_llm_template_and_paths(base: str, other: str, allowed: set[str]) -> None:
    changed = {field for field, *_ in recipe_changes(load_recipe(base), load_recipe(other))} - {"name", "output.dir"}
    start = {"model.llm"} if "1_align" in base else {"model.path"}
    assert start <= changed
    assert {path for path in changed - start if not path.startswith("data.mixture.")} <= allowed
    templates = {path for path in changed if path.startswith("data.mixture.")}
    assert all(path.endswith(".template") for path in templates)


def test_the_readme_variant_of_stage_1_differs_only_in_rate_and_length() -> None:
    changes = recipe_changes(load_recipe("vila_7b/1_align"), load_recipe("vila_7b/1_align_readme"))
    assert changes[1:3] == [("stage.lr", "0.001", "2e-05"), ("data.max_length", "2048", "4096")]
    assert {field for field, *_ in changes} == {"name", "stage.lr", "data.max_length", "output.dir"}


@pytest.mark.parametrize("name", LORA)
def test_adapters_have_the_size_of_upstream(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.stage.lora.model_dump() == {"rank": 64, "alpha": 16, "dropout": 0.05, "targets": (), "bits": 16}
    assert recipe.stage.tune == ("projector", "llm")
    whole = load_recipe(name.removesuffix("_lora"))
    changed = {field for field, *_ in recipe_changes(whole, recipe)}
    assert changed <= {"name", "output.dir", "stage.tune", "stage.lr", "stage.lr_projector", "stage.lora.rank"}


@pytest.mark.parametrize(("size", "llm"), [("small", "0.5B"), ("small_1_5b", "1.5B")])
def test_small_recipes_have_no_stage_2(size: str, llm: str) -> None:
    align, sft = load_recipe(f"{size}/1_align"), load_recipe(f"{size}/3_sft")
    assert align.model.llm == f"Qwen/Qwen2.5-{llm}-Instruct"
    assert sft.model.path == f"{align.output.dir.as_posix()}/model"
    assert [recipe.data.packing for recipe in (align, sft)] == ["rows", "rows"]
