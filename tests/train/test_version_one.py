"""Checkpoints and recipes of version one load; what cannot be verified is logged."""

import shutil
from pathlib import Path

import pytest
import yaml

from tests.events import EventLog
from tests.train.finish import assert_identical, finish, sign, stop_after
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.config.load import load_recipe
from vila.core.errors import CheckpointError, Interrupted, RunChangedError
from vila.core.files import write_json
from vila.core.reading import read_json
from vila.train.build import build
from vila.train.checkpoint import FORMAT
from vila.train.resume import check_recipe_unchanged, with_initial_settings

RECIPE = Path(__file__).with_name("version_one.yaml")
SAVES = ("batch.rows=4", "budget.tokens=3000", "output.checkpoint_every_steps=2")
# Keys that version one wrote, in its order.
STATE = ["progress", "lanes", "recipe", "versions", "world"]
PROGRESS = ["step", "tokens", "samples", "supervised", "seconds", "bad_steps", "dropped", "truncated"]


def make_version_one(folder):
    """Leave of a checkpoint what version one wrote: the tensors, and a state without format."""
    (folder / "manifest.json").unlink()
    (folder / "inputs.json").unlink()
    state = read_json(folder / "state.json")
    assert state.pop("format") == FORMAT
    assert state["progress"].pop("unreadable") == 0
    assert (list(state), list(state["progress"])) == (STATE, PROGRESS)
    model = state["recipe"]["model"]
    del model["exif_orientation"]
    model |= {"image_mode": "pad", "template": "starter_qa"}
    assert list(model) == list(yaml.safe_load(RECIPE.read_text())["model"])
    write_json(folder / "state.json", state)


@pytest.fixture(scope="module")
def training_files(tmp_path_factory):
    return write_training_files(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def stopped(training_files):
    """The directory of a run that was stopped after its third step, with two checkpoints."""
    recipe = tiny_recipe(training_files, "stopped", *SAVES)
    with pytest.raises(Interrupted):
        build(recipe, callbacks=[stop_after(3)]).train()
    return recipe.output.dir


@pytest.fixture
def begun(training_files, stopped, tmp_path):
    """A copy of it; the overrides that resume there."""
    shutil.copytree(stopped, tmp_path / "begun")
    return (*SAVES, f"output.dir={tmp_path / 'begun'}")


@pytest.fixture
def newest(begun, tmp_path):
    return tmp_path / "begun" / "checkpoint" / "step-00000003"


def resume(training_files, begun, events):
    """Build the run, and release its directory."""
    run = build(tiny_recipe(training_files, "", *begun), events=events)
    run.lock.release()
    return run


def test_a_checkpoint_of_version_one_resumes_bit_for_bit_with_a_note(training_files, begun, newest):
    make_version_one(newest)
    events = EventLog()
    run = resume(training_files, (*begun, "model.image_mode=null", "model.template="), events)
    assert (run.trainer.progress.step, run.trainer.progress.unreadable) == (3, 0)
    model = run.recipe.model
    assert (model.image_mode, model.exif_orientation, model.template) == ("pad", False, "starter_qa")
    assert sum(str(newest) in line for line in events.lines) == 1
    assert_identical(finish(training_files, "", begun), finish(training_files, "through", SAVES))
    written = max(newest.parent.iterdir())
    assert (written / "manifest.json").is_file()
    assert read_json(written / "state.json")["format"] == FORMAT


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("progress", "tokens", -1), ("progress", "samples", "9"), ("progress", "step", 2), ("", "world", 0)],
)
def test_counters_of_version_one_are_checked(training_files, begun, newest, section, field, value):
    shutil.rmtree(newest.with_name("step-00000002"))
    make_version_one(newest)
    state = read_json(newest / "state.json")
    (state[section] if section else state)[field] = value
    write_json(newest / "state.json", state)
    with pytest.raises(CheckpointError) as caught:
        resume(training_files, begun, EventLog())
    name = f"{section}.{field}" if section else field
    assert (caught.value.file, caught.value.field) == (str(newest / "state.json"), name)


@pytest.mark.parametrize("lost", [["manifest.json"], ["manifest.json", "inputs.json"]])
def test_a_checkpoint_that_lost_its_manifest_is_not_one_of_version_one(training_files, begun, newest, lost):
    for name in lost:
        (newest / name).unlink()
    events = EventLog()
    assert resume(training_files, begun, events).trainer.progress.step == 2
    assert any(str(newest / "manifest.json") in line for line in events.lines)
    assert newest.with_name("step-00000003.damaged").is_dir()


def test_a_state_without_its_format_is_not_one_of_version_one_while_stamps_are_there(training_files, begun, newest):
    shutil.rmtree(newest.with_name("step-00000002"))
    state = read_json(newest / "state.json")
    del state["format"]
    write_json(newest / "state.json", state)
    (newest / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        resume(training_files, begun, EventLog())
    assert caught.value.file == str(newest / "manifest.json")


def test_a_later_format_is_refused(training_files, begun, newest):
    shutil.rmtree(newest.with_name("step-00000002"))
    write_json(newest / "state.json", read_json(newest / "state.json") | {"format": FORMAT + 1})
    sign(newest)
    with pytest.raises(CheckpointError) as caught:
        resume(training_files, begun, EventLog())
    assert (caught.value.field, caught.value.value) == ("format", FORMAT + 1)


def test_a_recipe_that_version_one_saved_loads_and_differs_in_nothing_that_is_left_open(tmp_path):
    before = load_recipe(str(RECIPE))
    now = load_recipe(str(RECIPE), ["model.image_mode=null", "model.template=", "model.exif_orientation=null"])
    assert (now.model.image_mode, now.model.exif_orientation, now.model.template) == (None, None, "")
    check_recipe_unchanged(before, now, tmp_path)
    model = with_initial_settings(before, now).model
    assert (model.image_mode, model.exif_orientation, model.template) == ("pad", False, "starter_qa")
    other = load_recipe(str(RECIPE), ["model.image_mode=resize", "model.exif_orientation=true"])
    with pytest.raises(RunChangedError) as caught:
        check_recipe_unchanged(before, other, tmp_path)
    assert caught.value.differences == [
        ("model.image_mode", "'pad'", "'resize'"),
        ("model.exif_orientation", "False", "True"),
    ]
    # A recipe that this version saved states the field: nothing is filled in.
    assert with_initial_settings(now, now) is now
