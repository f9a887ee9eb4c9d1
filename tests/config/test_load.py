"""Recipes as text: what is read, what is refused, and in which words."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from vila.config.field_docs import expected_at
from vila.config.load import describe_fields, load_recipe, recipe_differences, recipe_names, recipe_to_yaml, save_recipe
from vila.core.errors import ConfigError, UnknownNameError

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


def problems_of(path: Path, *overrides: str) -> list[str]:
    """The lines of the one error that loading raises, without its heading."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path), overrides)
    text = str(caught.value)
    assert "Value error" not in text and "pydantic" not in text
    heading, *lines = text.split("\n")
    if not lines:
        return [text.removeprefix(f"{path}: ")]
    assert heading == f"{path}: {len(lines)} problems"
    return [line.removeprefix("  - ") for line in lines]


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


# What is read


def test_a_file_becomes_a_recipe_and_text_such_as_1e_3_a_number(base: Path) -> None:
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


def test_an_override_of_one_place_leaves_its_yaml_alias_alone(base: Path) -> None:
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


def test_differences_name_path_old_and_new_value(base: Path) -> None:
    old = load_recipe(str(base))
    new = load_recipe(str(base), ["stage.lr=0.002", "name=other", "stage.tune=[llm]", "data.mixture.1.path=f"])
    assert recipe_differences(old, old) == []
    assert recipe_differences(old, new) == [
        "name: 'tiny' -> 'other'",
        "stage.tune: ['projector'] -> ['llm']",
        "stage.lr: 0.001 -> 0.002",
        "data.mixture.1.path: 'flan' -> 'f'",
    ]


def test_differences_show_list_items_that_only_one_recipe_has(base: Path) -> None:
    old, new = load_recipe(str(base)), load_recipe(str(base), ["data.mixture=[{format: llava_json, path: pairs.json}]"])
    lines = recipe_differences(old, new)
    assert "data.mixture.1.path: 'flan' -> absent" in lines
    assert "data.mixture.1.path: absent -> 'flan'" in recipe_differences(new, old)
    assert all(line.startswith("data.mixture.1.") for line in lines)


# What is refused: names and files


def test_an_unknown_recipe_is_refused_with_near_matches() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown recipe 'vila_7b/1_aling'; did you mean 'vila_7b/1_align'"):
        load_recipe("vila_7b/1_aling")


def test_an_unknown_recipe_in_extends_names_the_file_that_asks_for_it(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.yaml", "extends: vila_7b/1_aling\n")
    with pytest.raises(UnknownNameError) as caught:
        load_recipe(str(path))
    start = f"unknown recipe that {path} extends: 'vila_7b/1_aling'; did you mean 'vila_7b/1_align'"
    assert str(caught.value).startswith(start)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert problems_of(path) == ["cannot be read (No such file or directory)"]


def test_a_packaged_name_with_an_ending_is_told_its_name() -> None:
    with pytest.raises(ConfigError, match="the packaged recipe is called 'vila_7b/1_align'"):
        load_recipe("vila_7b/1_align.yaml")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("name: x\nstage: [a, b\nseed: 1\n", " line 3 column 5: not YAML (expected ',' or ']', but got ':')"),
        ("name: x\n\tseed: 1\n", " line 2 column 1: not YAML (found character '\\t' that cannot start any token)"),
        ("name: x\nseed: \x07\n", " line 2 column 7: not YAML (special characters are not allowed)"),
        ("a: 1\n---\nb: 2\n", " line 2 column 1: not YAML (but found another document)"),
        ("a: *b\n", " line 1 column 4: not YAML (found undefined alias 'b')"),
        ("a: !!python/name:os.system\n", " line 1 column 4: not YAML (could not determine a constructor for the tag "),
        ("a: 0x_\n", ": not YAML (invalid literal for int() with base 16: '')"),
    ],
)
def test_broken_yaml_names_file_line_and_column(tmp_path: Path, text: str, place: str) -> None:
    path = written(tmp_path / "broken.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path))
    assert str(caught.value).startswith(f"{path}{place}")


@pytest.mark.parametrize(("text", "value"), [("", "None"), ("- a\n", "['a']"), ("word\n", "'word'")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, value: str) -> None:
    path = written(tmp_path / "odd.yaml", text)
    assert problems_of(path) == [f"got {value}, expected a mapping of recipe sections"]


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: \xe9\n")
    assert problems_of(path) == ["not UTF-8 text (byte 6)"]


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    first = written(tmp_path / "first.yaml", "extends: second.yaml\n")
    written(tmp_path / "second.yaml", "extends: third.yaml\n")
    written(tmp_path / "third.yaml", "extends: second.yaml\n")
    with pytest.raises(ConfigError, match=r"extends goes round in a circle: second.yaml -> third.yaml -> second.yaml"):
        load_recipe(str(first))


def test_extends_must_be_text(base: Path) -> None:
    written(base, BASE + "extends: [a, b]\n")
    assert problems_of(base) == ["extends: got ['a', 'b'], expected the name of a recipe or a path"]


def test_keys_given_twice_are_refused_with_both_lines(base: Path) -> None:
    written(base, BASE + "seed: 1\nseed: 2\noptim:\n  beta1: 0.8\n  beta1: 0.7\n")
    assert problems_of(base) == [
        f"{base} line 23: key 'seed' is given twice, first on line 22",
        f"{base} line 26: key 'beta1' is given twice, first on line 25",
    ]


def test_a_merge_key_is_no_duplicate(base: Path) -> None:
    text = BASE.replace("- format: vflan\n      path: flan", "- <<: *one\n      path: flan")
    path = written(base, text.replace("- format: llava_json", "- &one\n      format: llava_json"))
    assert [entry.format for entry in load_recipe(str(path)).data.mixture] == ["llava_json", "llava_json"]


# What is refused: fields


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optim.warmup_ration=0.1", "optim.warmup_ration: unknown key; did you mean 'warmup_ratio'?"),
        ("data.mixture.0.image_rot=x", "data.mixture.0.image_rot: unknown key; did you mean 'image_root'?"),
        ("optim.lr=1e-5", "optim.lr: unknown key; did you mean 'stage.lr'?"),
        ("optimm.beta1=0.8", "optimm: unknown key; did you mean 'optim'?"),
        ("batch.1=3", "batch.1: unknown key; known here: rows, samples, micro"),
        ("stage.lr=fast", "stage.lr: got 'fast', expected a number > 0 and < 1"),
        ("stage.lr=5", "stage.lr: got 5, expected a number > 0 and < 1"),
        ("stage.lr_projector=x", "stage.lr_projector: got 'x', expected a number > 0 and < 1 or null"),
        (
            "stage.tune=projector",
            "stage.tune: got 'projector', expected a list of vision, projector or llm, at least one",
        ),
        ("stage.tune=[]", "stage.tune: got [], expected a list of vision, projector or llm, at least one"),
        (
            "stage.tune=[visoin]",
            "stage.tune.0: got 'visoin', expected vision, projector or llm; did you mean 'vision'?",
        ),
        ("data.packing=row", "data.packing: got 'row', expected rows, grouped or none; did you mean 'rows'?"),
        ("data.max_length=1.5", "data.max_length: got 1.5, expected an integer > 8"),
        ("data.max_length=", "data.max_length: got '', expected an integer > 8"),
        ("data.mixture=[{format: mmc4}]", "data.mixture.0.path: missing; expected text"),
        ("data.mixture=x", "data.mixture: got 'x', expected a list of mappings, at least one"),
        ("compute.feature_cache=2", "compute.feature_cache: got 2, expected true or false"),
        ("optim=3", "optim: got 3, expected a mapping"),
        ("name=7", "name: got 7, expected text; put it in quotes"),
        ("output.dir=7", "output.dir: got 7, expected a path; put it in quotes"),
    ],
)
def test_a_wrong_field_is_refused_in_words(base: Path, override: str, problem: str) -> None:
    assert problems_of(base, override) == [problem]


@pytest.mark.parametrize(
    ("overrides", "problem", "fields"),
    [
        (["budget={epochs: 1, tokens: 5}"], "budget: give exactly one of epochs and tokens", ()),
        (["budget.epochs=0"], "budget: give exactly one of epochs and tokens", ()),
        (["model={path: m, llm: l, vision: v}"], "model: give either path, or both llm and vision", ()),
        (["model.llm="], "model: llm and vision go together; one of them is missing", ("model.llm", "model.vision")),
        (
            ["batch.rows=4"],
            "data.packing is 'none', so batch.samples states the batch and batch.rows must be 0",
            ("data.packing", "batch.rows"),
        ),
        (["stage.lora.rank=4"], "stage: lora puts adapters into the LLM", ("stage.lora.rank", "stage.tune")),
        (["output.keep_best=true"], "output.keep_best needs evaluations", ()),
    ],
)
def test_fields_that_do_not_go_together_are_named_with_where_they_are_from(base, overrides, problem, fields) -> None:
    (line,) = problems_of(base, *overrides)
    assert line.startswith(problem)
    for field in fields:
        origin = "the command line" if any(one.startswith(field) for one in overrides) else base
        assert f"{field} is from {origin}" in line


@pytest.mark.parametrize(
    ("before", "later", "values"),
    [
        # Adapters in place of parts of the LLM; without the tower, which they leave as it is.
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
        # A tower that trains has no cached features.
        (
            {"compute": {"feature_cache": True}, "stage": {"tune": ["projector"]}},
            {"stage": {"tune": ["vision", "projector"]}},
            {"compute.feature_cache": False},
        ),
    ],
)
@pytest.mark.parametrize("how", ["file", "overrides"])
def test_what_is_given_later_excludes_what_is_inherited(base, tmp_path, before, later, values, how) -> None:
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


def test_adapters_that_are_inherited_do_not_give_way_to_parts(base) -> None:
    """Without its adapters the recipe would train the whole LLM at the rate of adapters."""
    lower = merge(yaml.safe_load(BASE), {"stage": {"tune": ["llm"], "lora": {"rank": 8}}, "model": {"path": "m"}})
    lower["model"] = {**lower["model"], "llm": "", "vision": ""}
    written(base, yaml.safe_dump(lower))
    (line,) = problems_of(base, "stage.llm_parts=[mlp]")
    assert f"stage.lora.rank is from {base}" in line
    assert "stage.llm_parts is from the command line" in line


def test_the_weight_of_an_override_takes_the_place_of_repeat_and_back(base) -> None:
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


def test_extends_is_a_key_of_files_and_not_of_overrides(base: Path) -> None:
    (line,) = problems_of(base, "extends=vila_7b/1_align")
    assert line.startswith("extends: unknown key; known here: name, seed, model, ")


def test_a_long_value_is_cut_in_the_message(base: Path) -> None:
    (line,) = problems_of(base, f"name=[{'long, ' * 40}]")
    assert line.startswith("name: got ['long', 'long', ") and line.endswith("..., expected text")
    assert len(line) < 120


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("stage.lr", "override 'stage.lr': expected key=value, such as stage.lr=1e-5"),
        ("=5", "override '=5': expected key=value, such as stage.lr=1e-5"),
        ("stage..lr=5", "override 'stage..lr=5': expected key=value, such as stage.lr=1e-5"),
        (
            "stage.tune=[a",
            "override 'stage.tune=[a': the value is not YAML (expected ',' or ']', but got '<stream end>')",
        ),
        (
            "optim={beta1: 0.1, beta1: 0.2}",
            "override 'optim={beta1: 0.1, beta1: 0.2}': line 1: key 'beta1' is given twice",
        ),
        ("data.mixture.2.path=x", "override data.mixture.2: data.mixture is a list of 2, expected a number below 2"),
        ("data.mixture.path=x", "override data.mixture.path: data.mixture is a list of 2, expected a number below 2"),
        ("name.first=x", "override name.first: name is 'tiny', which holds no keys"),
    ],
)
def test_a_malformed_override_is_refused_in_words(base: Path, override: str, problem: str) -> None:
    (line,) = problems_of(base, override)
    assert line.startswith(problem)


def test_a_missing_field_says_what_belongs_there(base: Path) -> None:
    written(base, BASE.replace("name: tiny\n", "").replace("  lr: 1e-3\n", "").replace("budget:\n  epochs: 1\n", ""))
    assert problems_of(base) == [
        "name: missing; expected text",
        "stage.lr: missing; expected a number > 0 and < 1",
        "budget: missing; expected a mapping",
    ]


def test_all_problems_are_reported_at_once(base: Path) -> None:
    written(base, BASE.replace("max_length", "max_lenght") + "seed: 0\nseed: -1\n")
    assert problems_of(base, "stage.lr=fast", "oops", "optim.warmup_ration=2", "budget.tokens=5") == [
        f"{base} line 23: key 'seed' is given twice, first on line 22",
        "override 'oops': expected key=value, such as stage.lr=1e-5",
        "data.max_lenght: unknown key; did you mean 'max_length'?",
        "optim.warmup_ration: unknown key; did you mean 'warmup_ratio'?",
        "seed: got -1, expected an integer >= 0",
        "stage.lr: got 'fast', expected a number > 0 and < 1",
        "optim.warmup_ratio: got 2, expected a number >= 0 and < 1",
    ]


def test_a_misspelt_key_beside_the_right_one_is_still_refused(base: Path) -> None:
    assert problems_of(base, "stage.lrr=1") == ["stage.lrr: unknown key; did you mean 'lr'?"]


def test_a_bare_yes_is_a_key_like_any_other(base: Path) -> None:
    written(base, BASE + "yes: 1\n2: 3\n")
    assert [line.split("; ")[0] for line in problems_of(base)] == ["yes: unknown key", "2: unknown key"]


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


def test_every_single_value_refuses_a_list_in_the_words_of_its_description(base: Path) -> None:
    for path, kind, *_ in describe_fields():
        assert expected_at([0 if key == "N" else key for key in path.split(".")]) == kind
        if not kind.startswith("a list"):
            place = path.replace(".N.", ".0.")
            first = ["monitor.prompts=[{text: Why}]"] if place.startswith("monitor.prompts") else []
            assert problems_of(base, *first, f"{place}=[]") == [f"{place}: got [], expected {kind}"]


def test_packaged_names_are_sorted_and_without_ending() -> None:
    names = recipe_names()
    assert {"vila_7b/1_align", "vila_7b/2_pretrain", "vila_7b/3_sft", "vila_13b/3_sft"} <= set(names)
    assert names == sorted(names)
