"""All problems of a recipe are reported at once, before weights are read."""

import json

import pytest

from tests.train.ranks import run_ranks
from tests.train.tiny_run import tiny_recipe
from vila.core.errors import ConfigError, DataError, LayoutError, UnknownNameError, VilaError
from vila.train.build import build
from vila.train.preflight import Preflight


def mixture(**entry):
    return f"data.mixture=[{json.dumps({'format': 'messages', **entry})}]"


@pytest.mark.parametrize(
    ("override", "error", "field"),
    [
        (mixture(path="PATH", format="massages"), UnknownNameError, "data.mixture.0.format"),
        (mixture(path="PATH", options={"colour": 1}), ConfigError, "data.mixture.0.options"),
        (mixture(path="PATH", template="vicunia"), UnknownNameError, "data.mixture.0.template"),
        (mixture(path="PATH", image_root="nowhere"), ConfigError, "data.mixture.0.image_root"),
        (mixture(path="absent.jsonl"), ConfigError, "data.mixture.0.path"),
        (mixture(path="shards/*.tar"), ConfigError, "data.mixture.0.path"),
        ("data.template=chatmll", UnknownNameError, "data.template"),
        ("model.template=chatmll", UnknownNameError, "model.template"),
        ("model.path=runs/not/there", ConfigError, "model.path"),
        ("output.layout=llava", UnknownNameError, "output.layout"),
        ("output.dir=/dev/null/run", ConfigError, "output.dir"),
        ("batch.rows=26", ConfigError, "batch.rows"),
    ],
)
@pytest.mark.parametrize("how", ["build", "look"])
def test_each_problem_is_named_before_weights_are_read(training_folder, refuse_weights, override, error, field, how):
    recipe = tiny_recipe(training_folder, "fault", override.replace("PATH", str(training_folder / "data.jsonl")))
    with pytest.raises(VilaError) as caught:
        if how == "build":
            build(recipe)
        else:
            preflight = Preflight(recipe)
            preflight.check_data()
            preflight.check_model()
            preflight.raise_problems()
    assert isinstance(caught.value, error)
    assert caught.value.field == field


def test_all_problems_are_named_at_once(training_folder, refuse_weights):
    faults = ("data.template=chatmll", "output.layout=llava", mixture(path="absent.jsonl", format="massages"))
    with pytest.raises(ConfigError) as caught:
        build(tiny_recipe(training_folder, "fault", *faults))
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert all(any(name in line for line in lines) for name in ("chatmll", "llava", "absent.jsonl", "massages"))


def test_a_file_of_another_kind_is_named_when_a_recipe_is_looked_at(training_folder, tmp_path):
    (tmp_path / "data.csv").write_text("a,b\n")
    preflight = Preflight(tiny_recipe(training_folder, "kind", mixture(path=str(tmp_path / "data.csv"))))
    preflight.check_data()
    with pytest.raises(DataError) as caught:
        preflight.raise_problems()
    assert str(tmp_path / "data.csv") in str(caught.value)


def test_ranks_that_cannot_share_the_batch_are_named(training_folder):
    with pytest.raises(ConfigError) as caught:
        Preflight(tiny_recipe(training_folder, "ranks"), ranks=3).raise_problems()
    assert (caught.value.field, caught.value.value) == ("batch", 2)


def test_a_layout_that_cannot_hold_the_model_is_refused_before_training(training_folder):
    with pytest.raises(LayoutError):
        build(tiny_recipe(training_folder, "layout", "output.layout=tinychat"))


def refused(training_folder):
    try:
        build(tiny_recipe(training_folder, "fault", "output.layout=llava"))
    except VilaError as error:
        return error
    return None


def test_of_two_ranks_one_prints_the_problem(training_folder):
    errors = run_ranks(2, refused, training_folder)
    assert [type(error) for error in errors] == [UnknownNameError] * 2
    assert [error.is_repeated for error in errors] == [False, True]
