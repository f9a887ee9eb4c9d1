"""Packaged recipes have the values of the three published tables of hyperparameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vila.config import Recipe, load_recipe

PUBLISHED = json.loads(
    (Path(__file__).parents[1] / "golden" / "hyperparameters" / "published.json").read_text(encoding="utf-8")
)
TABLES, DATA_SETS = PUBLISHED["tables"], PUBLISHED["data_sets"]

# Upstream's names of templates. Stage 2 of 1.0 names one that is not used for pages and pairs.
TEMPLATES = {"plain": "caption", "v1": "vicuna_v1", "llama_3": "llama_3"}
FORMATS = {
    "torch": {"llava_json", "llava_json_v15", "video_json"},
    "coyo": {"coyo"},
    "mmc4": {"mmc4"},
    "vflan": {"vflan"},
}
# Pickles that are converted to shards with another name.
PREPARED = {
    "coyo-700m/pkl02-split": "coyo-25m",
    "mmc4-core/pkl-core": "mmc4-core",
    "vlm-flan-clean-text1m-nosqa-sharded": "vflan",
}

Reading = Callable[[Recipe], Any]

CELLS: dict[str, Reading] = {
    "tune": lambda r: list(r.stage.tune),
    "learning_rate": lambda r: r.stage.lr,
    "model_max_length": lambda r: r.data.max_length,
    "num_train_epochs": lambda r: r.budget.epochs,
    "global_batch": lambda r: r.batch.samples,
    "per_device_train_batch_size": lambda r: r.batch.micro,
    "weight_decay": lambda r: r.optim.weight_decay,
    "warmup_ratio": lambda r: r.optim.warmup_ratio,
    "adam_beta1": lambda r: r.optim.beta1,
    "adam_beta2": lambda r: r.optim.beta2,
    "max_grad_norm": lambda r: r.optim.max_grad_norm,
    "seed": lambda r: r.seed,
    "bf16": lambda r: r.compute.dtype == "bfloat16",
    "gradient_checkpointing": lambda r: r.compute.gradient_checkpointing,
    "dataloader_num_workers": lambda r: r.compute.workers,
    "zero": lambda r: {True: 3, False: 2}[r.compute.reshard] if r.compute.sharding == "full" else r.compute.sharding,
    "save_steps": lambda r: r.output.checkpoint_every_steps,
    "evaluation_strategy": lambda r: "steps" if r.monitor.eval_every_steps else "no",
    "vision_tower": lambda r: first(r).model.vision,
    "mm_projector_type": lambda r: first(r).model.projector,
    "mm_vision_select_layer": lambda r: first(r).model.select_layer,
    "mm_vision_select_feature": lambda r: first(r).model.select_feature,
    # Unset in a script: centre crop, as of the tower's own image processor.
    "image_aspect_ratio": lambda r: {"square": None}.get(r.model.image_mode, r.model.image_mode),
    "llm": lambda r: first(r).model.llm,
    "version": lambda r: r.data.template,
    "vflan_no_system_prompt": lambda r: all(
        e.template.endswith("_nosys") for e in r.data.mixture if e.format == "vflan"
    ),
}
"""Upstream flag -> value in a recipe."""

WITHOUT_COUNTERPART = {
    "tf32": "master weights and reductions are float32, everything else bfloat16",
    "lr_scheduler_type": "cosine is the only schedule",
    "logging_steps": "metrics.jsonl has a line per step",
    "report_to": "see monitor.trackers",
    "lazy_preprocess": "unused upstream",
    "group_by_modality_length": "unused upstream",
    "gpus_per_node": "part of global_batch",
    "nodes": "part of global_batch",
    "gradient_accumulation_steps": "follows from global_batch, micro and the number of GPUs",
    "save_total_limit": "1 upstream; output.keep_last is 2, as a fallback for a damaged checkpoint",
    "data_mixture": "see test_a_recipe_reads_the_published_data_sets",
}

OURS = {"1_mm_align": "1_align", "2_pretrain_mmc4_coyo": "2_pretrain", "2_pretrain": "2_pretrain", "3_sft": "3_sft"}


def first(recipe: Recipe) -> Recipe:
    """The stage that built the model from an LLM and a tower."""
    while recipe.model.path:
        recipe = load_recipe(recipe.model.path.removeprefix("runs/").removesuffix("/model"))
    return recipe


def published_stages() -> list[Any]:
    """(table, name of the recipe, its cells)."""
    rows = []
    for size in ("7b", "13b"):
        for table, suffix in (("v1.0 scripts", ""), ("v1.0 README", "_readme")):
            for stage, ours in OURS.items():
                if stage in TABLES[table]:
                    name = f"vila_{size}/{ours}{suffix if ours == '1_align' else ''}"
                    rows.append((table, name, TABLES[table].get("common", {}) | TABLES[table][stage]))
    table = "v1.5 scripts"
    for size, model in TABLES[table]["models"].items():
        for stage, ours in OURS.items():
            if stage in TABLES[table]:
                cells = TABLES[table]["common"] | model | TABLES[table][stage]
                rows.append((table, f"vila_1_5_{size}/{ours}", cells))
    return [pytest.param(*row[1:], id=f"{row[0]}: {row[1]}") for row in rows]


@pytest.mark.parametrize(("name", "cells"), published_stages())
def test_a_recipe_has_the_published_values(name: str, cells: dict[str, Any]) -> None:
    recipe = load_recipe(name)
    expected = {cell: value for cell, value in cells.items() if cell not in WITHOUT_COUNTERPART}
    if "version" in expected:
        expected["version"] = "page" if recipe.data.template == "page" else TEMPLATES[expected["version"]]
    if "vflan_no_system_prompt" in expected and expected["version"] == "llama_3":
        # That template has no variant without a system text, see the recipe.
        del expected["vflan_no_system_prompt"]
    assert {cell: CELLS[cell](recipe) for cell in expected} == expected


@pytest.mark.parametrize(("name", "cells"), [p for p in published_stages() if "nodes" in p.values[1]])
def test_the_published_batch_is_the_product_of_its_parts(name: str, cells: dict[str, Any]) -> None:
    gpus = cells["nodes"] * cells["gpus_per_node"]
    recipe = load_recipe(name)
    assert recipe.batch.samples / gpus / recipe.batch.micro == cells["gradient_accumulation_steps"]


@pytest.mark.parametrize(("name", "cells"), [p for p in published_stages() if "data_mixture" in p.values[1]])
def test_a_recipe_reads_the_published_data_sets(name: str, cells: dict[str, Any]) -> None:
    ours = {entry.path.removeprefix("data/"): entry.format for entry in load_recipe(name).data.mixture}
    theirs = [DATA_SETS[data_set] for data_set in cells["data_mixture"]]
    assert {PREPARED.get(path, path) for _, path in theirs} == ours.keys()
    for kind, path in theirs:
        assert ours[PREPARED.get(path, path)] in FORMATS[kind]


def test_videos_are_read_from_the_video_data_sets() -> None:
    videos = [entry.path for entry in load_recipe("vila_1_5_3b/3_sft").data.mixture if entry.format == "video_json"]
    names = ("shot2story_shotonly", "video_chatgpt", "youcook2", "vatex", "sharegpt_video")
    assert videos == [f"data/{DATA_SETS[name][1]}" for name in names]


def test_stage_2_of_vila_1_0_uses_the_page_template() -> None:
    assert {load_recipe(f"vila_{size}/2_pretrain").data.template for size in ("7b", "13b")} == {"page"}


def test_data_sets_of_vila_1_5_have_upstream_names() -> None:
    recipe = load_recipe("vila_1_5_3b/3_sft", ["data.mixture=llava_instruct+vflan*2"])
    assert [(entry.path, entry.repeat) for entry in recipe.data.mixture] == [
        ("data/llava_instruct_150k_zh.jsonl", 1),
        ("data/vflan", 2),
    ]


def test_every_column_of_the_tables_is_checked_or_explained() -> None:
    columns = {column for _, cells in (p.values for p in published_stages()) for column in cells}
    assert columns == CELLS.keys() | WITHOUT_COUNTERPART.keys()
    assert not CELLS.keys() & WITHOUT_COUNTERPART.keys()
