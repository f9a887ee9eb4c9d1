"""Data or a model that changed between a stop and the resume is refused with both values, or let through by name."""

import json
import os
import shutil

import pytest

import vila.train.build
from tests import tiny
from tests.events import EventLog
from tests.pages import numbers
from tests.starter.tiny_run import write_llm, write_vision
from tests.train.finish import stop_after
from tests.train.ranks import run_ranks
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.core.errors import Interrupted, RunChangedError
from vila.core.reading import read_json
from vila.model.loading import save_model
from vila.train.build import build

STEPS = ("batch.rows=4", "budget.tokens=3000")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after step 2."""
    folder = write_training_files(tmp_path_factory.mktemp("train"))
    with pytest.raises(Interrupted):
        build(tiny_recipe(folder, "out", *STEPS), callbacks=[stop_after(2)]).train()
    return folder


@pytest.fixture
def training_files(stopped, tmp_path):
    """A copy of it."""
    shutil.copytree(stopped, tmp_path / "training_files")
    return tmp_path / "training_files"


def resume(training_files, *allow, events=None):
    return build(tiny_recipe(training_files, "out", *STEPS), events=events or EventLog(), allow_changes=allow)


def ignore_paths():
    """Ignore the paths in the recipe, which differ in a copy; the content of the files is still compared."""
    vila.train.build.check_recipe_unchanged = lambda *_, **__: None


@pytest.fixture(autouse=True)
def other_paths(monkeypatch):
    monkeypatch.setattr(vila.train.build, "check_recipe_unchanged", vila.train.build.check_recipe_unchanged)
    ignore_paths()


def test_the_checkpoint_has_stamps_of_data_and_model(training_files):
    stamps = read_json(training_files / "out" / "checkpoint" / "step-00000002" / "inputs.json")
    (data,) = stamps["data"]
    assert data["samples"] == 24
    assert list(data["files"]) == ["data.jsonl"]
    assert data["files"]["data.jsonl"][0] == (training_files / "data.jsonl").stat().st_size
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(stamps["model"]["model.path"])


def test_a_copied_run_resumes(training_files):
    for path in [training_files / "data.jsonl", *(training_files / "base").iterdir()]:
        os.utime(path, ns=(0, 10**18))
    assert resume(training_files).trainer.progress.step == 2


def append_a_sample(training_files):
    line = (training_files / "data.jsonl").read_text().splitlines()[2]
    with (training_files / "data.jsonl").open("a") as stream:
        stream.write(line + "\n")


def test_more_samples_are_refused_with_both_numbers(training_files):
    append_a_sample(training_files)
    with pytest.raises(RunChangedError) as caught:
        resume(training_files)
    assert ("data.mixture.0.path", "24 samples", "25 samples") in caught.value.differences
    assert caught.value.file == str(training_files / "out")


@pytest.mark.parametrize("allow", ["data", "data.mixture", "data.mixture.0.path"])
def test_changed_data_resume_when_they_are_allowed_by_name(training_files, allow):
    append_a_sample(training_files)
    events = EventLog()
    assert resume(training_files, allow, events=events).trainer.progress.step == 2
    assert any({24, 25} <= set(numbers(line)) and "data.mixture.0.path" in line for line in events.lines)


def test_a_changed_answer_of_the_same_length_is_refused(training_files):
    path = training_files / "data.jsonl"
    path.write_text(path.read_text().replace("abab", "baba", 1))
    os.utime(path, ns=(0, 10**18))
    with pytest.raises(RunChangedError) as caught:
        resume(training_files)
    ((field, before, now),) = caught.value.differences
    assert field == "data.mixture.0.path"
    assert before.startswith("data.jsonl: sha256 ") and now.startswith("sha256 ")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_a_changed_model_is_refused_with_the_file(training_files, file):
    if file == "model.safetensors":
        save_model(*tiny.vila("llama", seed=7), training_files / "base")
    else:
        path = training_files / "base" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), "note": "changed"}))
    with pytest.raises(RunChangedError) as caught:
        resume(training_files)
    assert {field for field, *_ in caught.value.differences} == {"model.path"}
    assert any(before.startswith(f"{file}: ") for _, before, _ in caught.value.differences)


def refused(training_files):
    ignore_paths()
    try:
        resume(training_files)
    except RunChangedError as error:
        return error.differences, error.is_repeated
    return None


def test_all_ranks_refuse_and_one_of_them_prints(training_files):
    append_a_sample(training_files)
    ours, theirs = run_ranks(2, refused, training_files)
    assert ours[0] == theirs[0]
    assert (ours[1], theirs[1]) == (False, True)


def test_metrics_that_are_missing_are_logged(training_files):
    (training_files / "out" / "metrics.jsonl").unlink()
    events = EventLog()
    assert resume(training_files, events=events).trainer.progress.step == 2
    assert any(line.startswith("note:") and "metrics.jsonl" in line for line in events.lines)


def test_parts_are_stamped_under_their_own_fields(tmp_path):
    folder = write_training_files(tmp_path / "training_files")
    llm, vision = write_llm(tmp_path / "llm"), write_vision(tmp_path / "vision")
    parts = ("model.path=", f"model.llm={llm}", f"model.vision={vision}", "model.image_size=56", "data.max_length=512")
    recipe = tiny_recipe(folder, "parts", *STEPS, *parts)
    with pytest.raises(Interrupted):
        build(recipe, callbacks=[stop_after(1)]).train()
    stamps = read_json(folder / "parts" / "checkpoint" / "step-00000001" / "inputs.json")
    assert set(stamps["model"]) == {"model.llm", "model.vision"}
    assert "tokenizer.json" in stamps["model"]["model.llm"]
    (vision / "config.json").write_text((vision / "config.json").read_text() + " ")
    with pytest.raises(RunChangedError) as caught:
        build(recipe)
    assert [field for field, *_ in caught.value.differences] == ["model.vision"]
