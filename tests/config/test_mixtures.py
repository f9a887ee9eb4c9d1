"""Named mixtures: put in their places when a recipe is loaded, with problems told where they were written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.test_load import BASE, problems_of, written
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


def test_names_stand_for_their_data_sets_and_repeats_multiply(base: Path) -> None:
    assert entries(base, "data.mixture=[{mixture: chat, repeat: 3}, {format: messages, path: own}]") == [
        ("chat.jsonl", 6.0, None),
        ("cc3m.json", 1.5, None),
        ("own", 1.0, None),
    ]


def test_weights_divide_the_weight_of_their_name(base: Path) -> None:
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


def test_a_loaded_recipe_holds_its_data_sets_alone_and_survives_saving(base: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(base), ["data.mixture=chat"])
    assert recipe.data.mixtures == {}
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(str(tmp_path / "saved.yaml")) == recipe


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.mixture=chatt", "data.mixture.0: no mixture 'chatt' in data.mixtures; did you mean 'chat'?"),
        ("data.mixture=chat*x", "data.mixture: 'chat*x': 'x' is not a number; write name*2"),
        ("data.mixture=chat*0", "data.mixture.0: repeat: got 0.0, expected a number > 0"),
        (
            "data.mixture=[{mixture: chat, template: x}]",
            "data.mixture.0: beside mixture only repeat or weight may stand, not template",
        ),
        (
            "data.mixture=[{mixture: chat, weight: 2}]",
            "data.mixture.0: weight needs a weight on every data set of 'chat'",
        ),
        (
            "data.mixture=[{mixture: shares, repeat: 2}]",
            "data.mixture.0: the data sets of 'shares' have weights, which repeat cannot multiply",
        ),
        (
            "data.mixtures.captions=[{mixture: chat}]",
            "data.mixtures.captions.0: mixtures go round in a circle: chat -> captions -> chat",
        ),
        (
            "data.mixtures.chat=[{format: messages, pth: x}]",
            "data.mixtures.chat.0.pth: unknown key; did you mean 'path'?",
        ),
        ("data.mixtures.chat=[{format: messages}]", "data.mixtures.chat.0.path: missing; expected text"),
        (
            "data.mixtures.unused=[{format: messages, path: x, repeat: -1}]",
            "data.mixtures.unused.0.repeat: got -1, expected a number > 0",
        ),
        (
            "data.mixture=[{format: messages, path: x, repeat: 2, weight: 1}]",
            "data.mixture.0: give repeat or weight, not both",
        ),
        (
            "data.mixture=[{format: messages, path: x, split: val}]",
            "data.mixture.0: split is val, but val_fraction is 0: nothing is held back",
        ),
        (
            "data.mixture=[{format: messages, path: x, weight: 1}, {format: messages, path: y}]",
            "data: mixture.1 has no weight, others have; give all or none one",
        ),
    ],
)
def test_a_wrong_mixture_is_refused_where_it_was_written(base: Path, override: str, problem: str) -> None:
    use = [] if override.startswith("data.mixture=") else ["data.mixture=[{mixture: chat}]"]
    assert problems_of(base, *use, override) == [problem]
