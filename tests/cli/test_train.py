"""`vila train` on a run that is there already."""

import pytest

from tests.cli.printed import words
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.config.load import save_recipe
from vila.core.errors import ConfigError, RunChangedError
from vila.train.build import build


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    recipe = tiny_recipe(write_training_files(folder), "out", "budget.tokens=200")
    build(recipe).train()
    save_recipe(recipe, folder / "recipe.yaml")
    return folder / "recipe.yaml"


def test_a_changed_field_is_refused_with_the_flag_that_allows_it(vila_error, trained):
    error = vila_error("train", trained, "stage.lr=1e-4")
    assert (type(error), error.exit_code) == (RunChangedError, 1)
    assert error.differences == [("stage.lr", "0.005", "0.0001")]
    assert words(error.hint) >= {"--allow-changes", "stage.lr"}


@pytest.mark.parametrize("allowed", [("stage.lr", "seed"), ("stage", "seed")])
def test_fields_and_sections_that_are_allowed_may_differ(vila, trained, allowed):
    flags = [word for field in allowed for word in ("--allow-changes", field)]
    code, _, err = vila("train", trained, "stage.lr=1e-4", "seed=9", *flags)
    assert code == 0
    assert str(trained.parent / "out" / "model") in words(err)


def test_what_was_not_allowed_is_still_refused(vila_error, trained):
    error = vila_error("train", trained, "stage.lr=1e-4", "seed=9", "--allow-changes", "stage.lr")
    assert error.differences == [("seed", "0", "9")]


def test_of_several_processes_one_prints(vila, trained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        code, _, err = vila("train", trained)
        assert code == 0
        assert bool(err) == (rank == "0")


@pytest.mark.parametrize("arguments", [("no/recipe",), ("starter/3_sft", "stage.lr=fast"), ("starter/3_sft", "oops")])
def test_of_several_processes_one_prints_an_error(vila, monkeypatch, arguments):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        code, _, err = vila("train", *arguments)
        assert code == 2
        assert bool(err) == (rank == "0")


def test_a_recipe_that_one_machine_lacks_is_printed_by_its_rank(vila_error, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    error = vila_error("train", "absent.yaml")
    assert (type(error), error.file) == (ConfigError, "absent.yaml")
