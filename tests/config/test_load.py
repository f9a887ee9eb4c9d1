"""Loading recipes: files, `extends`, overrides, validation, saving and comparing."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml

from vila.config.field_docs import expected_at
from vila.config.load import describe_fields, load_recipe, recipe_changes, recipe_names, recipe_to_yaml, save_recipe
from vila.core.errors import MISSING, ConfigError, UnknownNameError, VilaError

BASE = """\
name: tiny
model:
  llm: an-llm
  vision: a-tower
stage:
  tune: [projector]
  lr: 1e-3
data:
  max_length: 512
  packing: none
  mixture:
    - format: llava_json
      path: pairs.json
    - format: vflan
      path: flan
batch:
  samples: 8
budget:
  epochs: 1
output:
  dir: runs/tiny
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE, encoding="utf-8")
    return path


def problems_of(path: Path, *overrides: str) -> tuple[VilaError, ...]:
    """The problems in the error that loading raises."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path), overrides)
    assert "Value error" not in str(caught.value) and "pydantic" not in str(caught.value)
    return caught.value.problems


def problem_of(path: Path, *overrides: str) -> VilaError:
    (problem,) = problems_of(path, *overrides)
    return problem


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def merge(base, change):
    """`change` over `base`, mappings key by key."""
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    return {**base, **{key: merge(base.get(key), value) for key, value in change.items()}}


def flat(tree, prefix=""):
    """Dotted fields and values."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plain(recipe, field):
    """The plain value of a dotted field."""
    value = recipe.model_dump(mode="json")
    for key in field.split("."):
        value = value[key]
    return value


# Files and overrides


def test_a_file_is_loaded_and_1e_3_is_a_number(base: Path) -> None:
    recipe = load_recipe(str(base))
    assert recipe.stage.lr == 0.001
    assert recipe.stage.tune == ("projector",)
    assert recipe.output.dir == Path("runs/tiny")


def test_overrides_reach_sections_list_items_and_sections_that_the_file_leaves_out(base: Path) -> None:
    recipe = load_recipe(
        str(base),
        [
            "optim.beta2=0.95",
            "stage.lr=1e-5",
            "stage.tune=[projector, llm]",
            "data.mixture.1.path=/x=y",
            "name=2024-05-01",
        ],
    )
    assert recipe.optim.beta2 == 0.95
    assert recipe.stage.lr == 1e-5
    assert recipe.stage.tune == ("projector", "llm")
    assert [entry.path for entry in recipe.data.mixture] == ["pairs.json", "/x=y"]
    assert recipe.name == "2024-05-01"


def test_an_override_may_give_empty_text_null_or_a_mapping_to_merge(base: Path) -> None:
    recipe = load_recipe(
        str(base),
        ["model.llm=", "model.vision=", "model.path=m", "stage.lr_projector=null", "data.mixture.0={repeat: 2}"],
    )
    assert (recipe.model.llm, recipe.model.path) == ("", "m")
    assert recipe.stage.lr_projector is None
    assert (recipe.data.mixture[0].path, recipe.data.mixture[0].repeat) == ("pairs.json", 2.0)


def test_the_last_of_two_overrides_of_one_field_wins(base: Path) -> None:
    assert load_recipe(str(base), ["seed=1", "seed=2"]).seed == 2


def test_an_override_does_not_change_yaml_aliases_of_the_value(base: Path) -> None:
    text = BASE.replace("    - format: llava_json\n", "    - &pairs\n      format: llava_json\n")
    path = written(base, text.replace("    - format: vflan\n      path: flan\n", "    - *pairs\n"))
    recipe = load_recipe(str(path), ["data.mixture.0.path=other.json"])
    assert [entry.path for entry in recipe.data.mixture] == ["other.json", "pairs.json"]


def test_extends_merges_mappings_and_replaces_lists_along_a_chain(base: Path) -> None:
    (base.parent / "deeper").mkdir()
    middle = written(base.parent / "deeper" / "middle.yaml", "extends: ../base.yaml\nstage: {lr: 2e-3}\nseed: 3\n")
    top = written(middle.with_name("top.yaml"), "extends: middle.yaml\nstage: {tune: [llm]}\nseed: 4\n")
    recipe = load_recipe(str(top))
    assert (recipe.stage.lr, recipe.stage.tune, recipe.seed, recipe.name) == (0.002, ("llm",), 4, "tiny")


def test_extends_takes_the_name_of_a_packaged_recipe(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.yaml", "extends: vila_7b/1_align\nname: mine\n")
    recipe, packaged = load_recipe(str(path)), load_recipe("vila_7b/1_align")
    assert recipe == packaged.model_copy(update={"name": "mine"})


# Saving and comparing


@pytest.mark.parametrize(
    "name", ["plain", "", "null", "2024-05-01", "1e-3", "yes", "a: b # c", " x\n\ty ", "é 模 😀", "'\"\\"]
)
def test_a_saved_recipe_loads_as_an_equal_one(base: Path, name: str) -> None:
    recipe = load_recipe(str(base), ["optim.max_grad_norm=.inf", "stage.lr=1.1e-05"])
    recipe = recipe.model_copy(update={"name": name})
    saved = base.parent / "saved" / "recipe.yaml"
    save_recipe(recipe, saved)
    again = load_recipe(str(saved))
    assert again == recipe
    assert again.optim.max_grad_norm == math.inf
    assert saved.read_text(encoding="utf-8") == recipe_to_yaml(again)
    assert [path.name for path in saved.parent.iterdir()] == ["recipe.yaml"]


def test_changes_name_field_old_and_new_value(base: Path) -> None:
    old = load_recipe(str(base))
    new = load_recipe(str(base), ["stage.lr=0.002", "name=other", "stage.tune=[llm]", "data.mixture.1.path=f"])
    assert recipe_changes(old, old) == []
    assert recipe_changes(old, new) == [
        ("name", "'tiny'", "'other'"),
        ("stage.tune", "['projector']", "['llm']"),
        ("stage.lr", "0.001", "0.002"),
        ("data.mixture.1.path", "'flan'", "'f'"),
    ]


def test_changes_have_list_items_that_only_one_recipe_has(base: Path) -> None:
    old, new = load_recipe(str(base)), load_recipe(str(base), ["data.mixture=[{format: llava_json, path: pairs.json}]"])
    assert ("data.mixture.1.path", "'flan'", "absent") in recipe_changes(old, new)
    assert ("data.mixture.1.path", "absent", "'flan'") in recipe_changes(new, old)
    assert all(field.startswith("data.mixture.1.") for field, *_ in recipe_changes(old, new))


# Invalid names and files


def test_an_unknown_recipe_has_near_names() -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_recipe("vila_7b/1_aling")
    assert (caught.value.kind, caught.value.name, caught.value.near[0]) == (
        "recipe",
        "vila_7b/1_aling",
        "vila_7b/1_align",
    )


def test_an_unknown_recipe_in_extends_names_the_extending_file(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.yaml", "extends: vila_7b/1_aling\n")
    with pytest.raises(UnknownNameError) as caught:
        load_recipe(str(path))
    assert str(path) in caught.value.kind and caught.value.near[0] == "vila_7b/1_align"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(tmp_path / "none.yaml"))
    assert caught.value.file == str(tmp_path / "none.yaml")


def test_a_packaged_name_with_an_ending_has_the_name_as_hint() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("vila_7b/1_align.yaml")
    assert "'vila_7b/1_align'" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("name: x\nstage: [a, b\nseed: 1\n", "line 3 column 5"),
        ("name: x\n\tseed: 1\n", "line 2 column 1"),
        ("name: x\nseed: \x07\n", "line 2 column 7"),
        ("a: 1\n---\nb: 2\n", "line 2 column 1"),
        ("a: *b\n", "line 1 column 4"),
        ("a: !!python/name:os.system\n", "line 1 column 4"),
        ("a: 0x_\n", None),
    ],
)
def test_invalid_yaml_names_file_line_and_column(tmp_path: Path, text: str, position: str | None) -> None:
    path = written(tmp_path / "broken.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path))
    assert (caught.value.file, caught.value.record) == (str(path), position)


@pytest.mark.parametrize(("text", "value"), [("", None), ("- a\n", ["a"]), ("word\n", "word")])
def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path, text: str, value: object) -> None:
    path = written(tmp_path / "odd.yaml", text)
    error = problem_of(path)
    assert (error.file, error.value) == (str(path), value)


def test_text_that_is_not_utf_8_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: \xe9\n")
    assert problem_of(path).file == str(path)


def test_a_circular_extends_is_an_error(tmp_path: Path) -> None:
    first = written(tmp_path / "first.yaml", "extends: second.yaml\n")
    written(tmp_path / "second.yaml", "extends: third.yaml\n")
    written(tmp_path / "third.yaml", "extends: second.yaml\n")
    error = problem_of(first)
    assert error.field == "extends" and "second.yaml -> third.yaml -> second.yaml" in error.problem


def test_extends_must_be_text(base: Path) -> None:
    written(base, BASE + "extends: [a, b]\n")
    error = problem_of(base)
    assert (error.field, error.value) == ("extends", ["a", "b"])


def test_repeated_keys_are_errors_with_both_lines(base: Path) -> None:
    written(base, BASE + "seed: 1\nseed: 2\noptim:\n  beta1: 0.8\n  beta1: 0.7\n")
    seed, beta = problems_of(base)
    assert (seed.file, seed.record, beta.record) == (str(base), "line 23", "line 26")
    assert "'seed'" in seed.problem and "line 22" in seed.problem
    assert "'beta1'" in beta.problem and "line 25" in beta.problem


def test_a_merge_key_is_no_duplicate(base: Path) -> None:
    text = BASE.replace("- format: vflan\n      path: flan", "- <<: *one\n      path: flan")
    path = written(base, text.replace("- format: llava_json", "- &one\n      format: llava_json"))
    assert [entry.format for entry in load_recipe(str(path)).data.mixture] == ["llava_json", "llava_json"]


# Invalid fields


@pytest.mark.parametrize(
    ("override", "field", "suggestion"),
    [
        ("optim.warmup_ration=0.1", "optim.warmup_ration", "'warmup_ratio'"),
        ("data.mixture.0.image_rot=x", "data.mixture.0.image_rot", "'image_root'"),
        ("optim.lr=1e-5", "optim.lr", "'stage.lr'"),
        ("optimm.beta1=0.8", "optimm", "'optim'"),
        ("batch.1=3", "batch.1", "rows, samples, micro"),
        ("extends=vila_7b/1_align", "extends", "name, seed, model, "),
        ("stage.lrr=1", "stage.lrr", "'lr'"),
    ],
)
def test_an_unknown_key_has_a_suggestion(base: Path, override: str, field: str, suggestion: str) -> None:
    error = problem_of(base, override)
    assert (error.field, error.value) == (field, MISSING)
    assert suggestion in error.hint


@pytest.mark.parametrize(
    ("override", "field", "value", "expected"),
    [
        ("stage.lr=fast", "stage.lr", "fast", "a number > 0 and < 1"),
        ("stage.lr=5", "stage.lr", 5, "a number > 0 and < 1"),
        ("stage.lr_projector=x", "stage.lr_projector", "x", "a number > 0 and < 1 or null"),
        ("stage.tune=projector", "stage.tune", "projector", "a list of vision, projector or llm, at least one"),
        ("stage.tune=[]", "stage.tune", [], "a list of vision, projector or llm, at least one"),
        ("stage.tune=[visoin]", "stage.tune.0", "visoin", "vision, projector or llm"),
        ("data.packing=row", "data.packing", "row", "rows, grouped or none"),
        ("data.max_length=1.5", "data.max_length", 1.5, "an integer > 8"),
        ("data.max_length=", "data.max_length", "", "an integer > 8"),
        ("data.mixture=[{format: mmc4}]", "data.mixture.0.path", MISSING, "text"),
        ("data.mixture=x", "data.mixture", "x", "a list of mappings, at least one"),
        ("compute.feature_cache=2", "compute.feature_cache", 2, "true or false"),
        ("optim=3", "optim", 3, "a mapping"),
        ("name=7", "name", 7, "text"),
        ("output.dir=7", "output.dir", 7, "a path"),
    ],
)
def test_an_invalid_value_is_named_with_what_is_expected(base: Path, override, field, value, expected) -> None:
    error = problem_of(base, override)
    assert (error.field, error.value, error.expected) == (field, value, expected)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("stage.tune=[visoin]", "'vision'"),
        ("data.packing=row", "'rows'"),
        ("name=7", "quotes"),
        ("output.dir=7", "quotes"),
    ],
)
def test_misspelt_choices_and_unquoted_text_have_a_hint(base: Path, override: str, hint: str) -> None:
    assert hint in problem_of(base, override).hint


@pytest.mark.parametrize(
    ("overrides", "section", "fields"),
    [
        (["budget={epochs: 1, tokens: 5}"], "budget", ()),
        (["budget.epochs=0"], "budget", ()),
        (["model={path: m, llm: l, vision: v}"], "model", ()),
        (["model.llm="], "model", ("model.llm", "model.vision")),
        (["batch.rows=4"], None, ("data.packing", "batch.rows")),
        (["stage.lora.rank=4"], "stage", ("stage.lora.rank", "stage.tune")),
        (["output.keep_best=true"], None, ()),
    ],
)
def test_conflicting_fields_are_named_with_their_layers(base, overrides, section, fields) -> None:
    error = problem_of(base, *overrides)
    assert error.field == section
    for field in fields:
        origin = "the command line" if any(one.startswith(field) for one in overrides) else base
        assert re.search(rf"{re.escape(field)}\b[^,;]* {re.escape(str(origin))}", error.problem)


@pytest.mark.parametrize(
    ("before", "later", "values"),
    [
        # Adapters exclude parts of the LLM and a trainable tower.
        (
            {"stage": {"tune": ["projector", "llm"], "llm_parts": ["self_attn"]}, "model": {"path": "m"}},
            {"stage": {"lora": {"rank": 8}}},
            {"stage.lora.rank": 8, "stage.llm_parts": []},
        ),
        (
            {"stage": {"tune": ["vision", "projector", "llm"]}, "model": {"path": "m"}},
            {"stage": {"lora": {"rank": 8}}},
            {"stage.tune": ["projector", "llm"]},
        ),
        # One of two sources, batches, budgets.
        (
            {"model": {"path": "m"}},
            {"model": {"llm": "l", "vision": "v"}},
            {"model.path": "", "model.llm": "l", "model.vision": "v"},
        ),
        (
            {"model": {"path": "", "llm": "l", "vision": "v"}},
            {"model": {"path": "m"}},
            {"model.path": "m", "model.llm": "", "model.vision": ""},
        ),
        ({"budget": {"epochs": 2}}, {"budget": {"tokens": 9}}, {"budget.epochs": 0, "budget.tokens": 9}),
        ({"budget": {"tokens": 9, "epochs": 0}}, {"budget": {"epochs": 2}}, {"budget.epochs": 2, "budget.tokens": 0}),
        (
            {"data": {"packing": "none"}, "batch": {"samples": 4}},
            {"data": {"packing": "rows"}, "batch": {"rows": 2}},
            {"batch.rows": 2, "batch.samples": 0},
        ),
        # A trainable tower excludes cached features.
        (
            {"compute": {"feature_cache": True}, "stage": {"tune": ["projector"]}},
            {"stage": {"tune": ["vision", "projector"]}},
            {"compute.feature_cache": False},
        ),
    ],
)
@pytest.mark.parametrize("how", ["file", "overrides"])
def test_a_later_layer_excludes_inherited_values(base, tmp_path, before, later, values, how) -> None:
    lower = merge(yaml.safe_load(BASE), before)
    if before.get("model", {}).get("path"):
        lower["model"] = {**lower["model"], "llm": "", "vision": ""}
    written(base, yaml.safe_dump(lower))
    notes: list[str] = []
    if how == "file":
        upper = written(tmp_path / "upper.yaml", yaml.safe_dump({"extends": base.name, **later}))
        recipe = load_recipe(str(upper), notes=notes)
    else:
        recipe = load_recipe(str(base), [f"{key}={value}" for key, value in flat(later)], notes=notes)
    assert {field: plain(recipe, field) for field in values} == values
    assert notes


def test_inherited_adapters_are_not_excluded_by_llm_parts(base) -> None:
    """Without its adapters the recipe would train the whole LLM with their learning rate."""
    lower = merge(yaml.safe_load(BASE), {"stage": {"tune": ["llm"], "lora": {"rank": 8}}, "model": {"path": "m"}})
    lower["model"] = {**lower["model"], "llm": "", "vision": ""}
    written(base, yaml.safe_dump(lower))
    error = problem_of(base, "stage.llm_parts=[mlp]")
    assert re.search(rf"stage\.lora\.rank\b[^,;]* {re.escape(str(base))}", error.problem)
    assert re.search(r"stage\.llm_parts\b[^,;]* command line", error.problem)


def test_an_override_of_weight_excludes_repeat_and_vice_versa(base) -> None:
    entry = {"format": "flan", "path": "flan"}
    for given, later, values in (({"repeat": 2}, "weight=3", (1, 3)), ({"weight": 3}, "repeat=2", (2, None))):
        text = yaml.safe_dump(merge(yaml.safe_load(BASE), {"data": {"mixture": [entry | given]}}))
        (found,) = load_recipe(str(written(base, text)), [f"data.mixture.0.{later}"]).data.mixture
        assert (found.repeat, found.weight) == values


def test_the_documented_adapters_on_the_starter_are_accepted() -> None:
    recipe = load_recipe("starter/3_sft", ["stage.lora.rank=8"])
    assert (recipe.stage.lora.rank, recipe.stage.llm_parts) == (8, ())


@pytest.mark.parametrize("name", [name for name in recipe_names() if load_recipe(name).model.path])
def test_every_recipe_of_a_whole_model_becomes_one_with_adapters(name) -> None:
    tune = () if "llm" in load_recipe(name).stage.tune else ("stage.tune=[projector, llm]",)
    assert load_recipe(name, [*tune, "stage.lora.rank=64"]).stage.lora.rank == 64


@pytest.mark.parametrize(
    "override", ["stage.lr", "=5", "stage..lr=5", "stage.tune=[a", "optim={beta1: 0.1, beta1: 0.2}"]
)
def test_a_malformed_override_is_an_error(base: Path, override: str) -> None:
    error = problem_of(base, override)
    assert (error.field, error.value) == ("override", override)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("data.mixture.2.path=x", "data.mixture.2"),
        ("data.mixture.path=x", "data.mixture.path"),
        ("name.first=x", "name.first"),
    ],
)
def test_an_override_of_a_field_that_cannot_exist_is_an_error(base: Path, override: str, field: str) -> None:
    assert problem_of(base, override).field == field


def test_a_missing_field_has_what_is_expected(base: Path) -> None:
    written(base, BASE.replace("name: tiny\n", "").replace("  lr: 1e-3\n", "").replace("budget:\n  epochs: 1\n", ""))
    assert [(error.field, error.expected) for error in problems_of(base)] == [
        ("name", "text"),
        ("stage.lr", "a number > 0 and < 1"),
        ("budget", "a mapping"),
    ]


def test_all_problems_are_reported_at_once(base: Path) -> None:
    written(base, BASE.replace("max_length", "max_lenght") + "seed: 0\nseed: -1\n")
    problems = problems_of(base, "stage.lr=fast", "oops", "optim.warmup_ration=2", "budget.tokens=5")
    assert problems[0].record == "line 23"
    assert [error.field for error in problems[1:]] == [
        "override",
        "data.max_lenght",
        "optim.warmup_ration",
        "seed",
        "stage.lr",
        "optim.warmup_ratio",
    ]


def test_keys_that_yaml_reads_as_other_types_are_text(base: Path) -> None:
    written(base, BASE + "yes: 1\n2: 3\n")
    assert [error.field for error in problems_of(base)] == ["yes", "2"]


# The table of fields


def test_fields_are_described_with_type_default_and_help() -> None:
    rows = {path: rest for path, *rest in describe_fields()}
    assert rows["stage.lr"][:2] == ["a number > 0 and < 1", "required"]
    assert rows["stage.lr_projector"][:2] == ["a number > 0 and < 1 or null", "null"]
    assert rows["data.mixture"][:2] == ["a list of mappings, at least one", "required"]
    assert rows["data.mixture.N.repeat"][:2] == ["a number > 0", "1.0"]
    assert rows["model.image_mode"][:2] == ["pad, resize or square or null", "null"]
    assert rows["model.llm"][:2] == ["text", '""']
    assert rows["output.dir"][:2] == ["a path", "required"]
    assert rows["compute.feature_cache"][:2] == ["true or false", "false"]
    assert "optim" not in rows


def test_every_field_has_help_on_one_line() -> None:
    for path, kind, default, text in describe_fields():
        assert kind and default and text and "\n" not in text, path


def test_every_field_rejects_a_list_with_its_description(base: Path) -> None:
    for path, kind, *_ in describe_fields():
        assert expected_at([0 if key == "N" else key for key in path.split(".")]) == kind
        if not kind.startswith("a list"):
            place = path.replace(".N.", ".0.")
            first = ["monitor.prompts=[{text: Why}]"] if place.startswith("monitor.prompts") else []
            error = problem_of(base, *first, f"{place}=[]")
            assert (error.field, error.value, error.expected) == (place, [], kind)


def test_packaged_names_are_sorted_and_without_ending() -> None:
    names = recipe_names()
    assert {"vila_7b/1_align", "vila_7b/2_pretrain", "vila_7b/3_sft", "vila_13b/3_sft"} <= set(names)
    assert names == sorted(names)
