"""`vila train` and its `--dry-run` report errors before weights are read."""

import re

import pytest

from tests import tiny
from tests.cli.printed import words
from tests.train.tiny_run import tiny_recipe
from vila.config.load import load_recipe, save_recipe
from vila.core.errors import ConfigError, DataError, UnknownNameError
from vila.core.optional import MissingExtraError
from vila.model.loading import save_model


def test_what_a_packaged_recipe_names_is_a_note_and_what_the_user_names_an_error(vila, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = vila("train", "starter/3_sft", "--dry-run")
    assert code == 0
    assert "model.path=runs/starter/2_pretrain/model" in words(err)
    code, again, _ = vila("train", "starter/3_sft", "data.mixture.0.path=mine.jsonl", "--dry-run")
    assert code == 2
    assert [problem.field for problem in vila.error.problems] == ["data.mixture.0.path"]
    assert (
        load_recipe(written(tmp_path / "a.yaml", out)).data.mixture[1:]
        == load_recipe(written(tmp_path / "b.yaml", again)).data.mixture[1:]
    )
    (tmp_path / "own.yaml").write_text("extends: starter/3_sft\nmodel: {path: my/own/model}\n")
    # The model of an earlier stage, which may not have been trained yet.
    code, _, err = vila("train", "own.yaml", "--dry-run")
    assert code == 0
    assert "model.path=my/own/model" in words(err)


def test_the_data_of_a_packaged_mixture_that_the_user_names_may_be_absent(vila, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = vila("train", "vila_1_5_3b/3_sft", "data.mixture=llava_instruct+vflan", "--dry-run")
    assert code == 0
    assert "data.mixture.0.path=data/llava_instruct_150k_zh.jsonl" in words(err)


def written(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("override", "kind", "fields"),
    [
        ("monitor.prompts=[{text: Why, image: absent.png}]", ConfigError, {"field": "monitor.prompts.0.image"}),
        ("monitor={eval_every_steps: 5, eval_benchmark: easy_vqua}", UnknownNameError, {"name": "easy_vqua"}),
        ("monitor={eval_every_steps: 5, eval_benchmark: gqa}", ConfigError, {"field": "monitor.eval_data"}),
        ("monitor={eval_every_steps: 5, eval_benchmark: gqa, eval_data: absent}", DataError, {}),
        ("monitor.trackers=[trackio]", MissingExtraError, {"hint": "pip install trackio"}),
    ],
)
def test_monitor_settings_are_checked_before_weights_are_read(
    vila, training_folder, refuse_weights, override, kind, fields
):
    path = training_folder / "recipe.yaml"
    save_recipe(tiny_recipe(training_folder, "monitor"), path)
    vila("train", path, override)
    assert type(vila.error) is kind
    assert vars(vila.error).items() >= fields.items()
    code, _, err = vila("train", path, override, "--dry-run")
    assert code in (1, 2)
    assert all(str(value) in err for value in fields.values())


def test_a_dry_run_of_a_valid_recipe_logs_nothing(vila, training_folder):
    path = training_folder / "whole.yaml"
    save_recipe(tiny_recipe(training_folder, "whole"), path)
    code, _, err = vila("train", path, "--dry-run")
    assert code == 0
    assert not re.search("note|error", err)
    assert not (training_folder / "whole").exists()


def test_a_damaged_config_is_named_by_a_dry_run(vila, training_folder, tmp_path):
    save_model(*tiny.vila(), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    save_recipe(tiny_recipe(training_folder, "damaged", f"model.path={tmp_path / 'model'}"), tmp_path / "r.yaml")
    code, _, _ = vila("train", tmp_path / "r.yaml", "--dry-run")
    assert (code, vila.error.file) == (1, str(tmp_path / "model" / "config.json"))
