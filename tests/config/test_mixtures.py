"""Named mixtures are expanded when a recipe is loaded; problems name the place where they were written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.test_load import BASE, problem_of, written
from vila.config.load import load_recipe, save_recipe

MIXTURES = """
  mixtures:
    captions:
      - {format: llava_json, path: cc3m.json}
    chat:
      - {format: messages, path: chat.jsonl, repeat: 2}
      - {mixture: captions, repeat: 0.5}
    shares:
      - {format: messages, path: one.jsonl, weight: 1}
      - {format: messages, path: two.jsonl, weight: 3}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return written(tmp_path / "base.yaml", BASE.replace("data:\n", "data:" + MIXTURES, 1))


def entries(path: Path, *overrides: str) -> list[tuple[str, float, float | None]]:
    mixture = load_recipe(str(path), overrides).data.mixture
    return [(entry.path, entry.repeat, entry.weight) for entry in mixture]


def test_names_are_expanded_and_repeats_multiply(base: Path) -> None:
    assert entries(base, "data.mixture=[{mixture: chat, repeat: 3}, {format: messages, path: own}]") == [
        ("chat.jsonl", 6.0, None),
        ("cc3m.json", 1.5, None),
        ("own", 1.0, None),
    ]


def test_the_weight_of_a_name_is_distributed_by_the_own_weights(base: Path) -> None:
    changed = "data.mixture=[{mixture: shares, weight: 8}, {format: messages, path: own, weight: 2}]"
    assert [(path, weight) for path, _, weight in entries(base, changed)] == [
        ("one.jsonl", 2.0), ("two.jsonl", 6.0), ("own", 2.0),
    ]  # fmt: skip


def test_a_sum_of_names_is_a_mixture(base: Path) -> None:
    assert entries(base, "data.mixture=captions + chat*2") == [
        ("cc3m.json", 1.0, None),
        ("chat.jsonl", 4.0, None),
        ("cc3m.json", 1.0, None),
    ]


def test_a_loaded_recipe_has_no_named_mixtures_and_can_be_saved(base: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(base), ["data.mixture=chat"])
    assert recipe.data.mixtures == {}
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(str(tmp_path / "saved.yaml")) == recipe


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("data.mixture=chatt", "data.mixture.0"),
        ("data.mixture=chat*x", "data.mixture"),
        ("data.mixture=chat*0", "data.mixture.0.repeat"),
        ("data.mixture=[{mixture: chat, template: x}]", "data.mixture.0.template"),
        ("data.mixture=[{mixture: chat, weight: 2}]", "data.mixture.0"),
        ("data.mixture=[{mixture: shares, repeat: 2}]", "data.mixture.0"),
        ("data.mixtures.captions=[{mixture: chat}]", "data.mixtures.captions.0"),
        ("data.mixtures.chat=[{format: messages, pth: x}]", "data.mixtures.chat.0.pth"),
        ("data.mixtures.chat=[{format: messages}]", "data.mixtures.chat.0.path"),
        ("data.mixtures.unused=[{format: messages, path: x, repeat: -1}]", "data.mixtures.unused.0.repeat"),
        ("data.mixture=[{format: messages, path: x, repeat: 2, weight: 1}]", "data.mixture.0"),
        ("data.mixture=[{format: messages, path: x, split: val}]", "data.mixture.0"),
        ("data.mixture=[{format: messages, path: x, weight: 1}, {format: messages, path: y}]", "data"),
    ],
)
def test_an_invalid_mixture_is_named_where_it_was_written(base: Path, override: str, field: str) -> None:
    use = [] if override.startswith("data.mixture=") else ["data.mixture=[{mixture: chat}]"]
    assert problem_of(base, *use, override).field == field


def test_an_unknown_mixture_has_a_near_name(base: Path) -> None:
    error = problem_of(base, "data.mixture=chatt")
    assert error.value == "chatt" and "'chat'" in error.hint
