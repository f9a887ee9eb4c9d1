"""Checkpoints are written atomically; retention, full disks, and checkpoints of another model or stage."""

import errno
import json
import math
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.events import EventLog
from tests.train.finish import assert_identical, finish, on_step, sign, stop_after
from tests.train.ranks import run_ranks
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.core.errors import CheckpointError, Interrupted
from vila.core.files import write_json
from vila.core.progress import SILENT
from vila.core.reading import read_json
from vila.core.system import ProcessInfo
from vila.model.loading import save_model
from vila.train.build import build
from vila.train.checkpoint import Checkpoint, CheckpointWriter, Progress, load_checkpoint
from vila.train.fsdp import World, open_world

WORLD = World(ProcessInfo(), torch.device("cpu"))
SAVES = ("batch.rows=4", "budget.tokens=3000", "output.checkpoint_every_steps=2")


@pytest.fixture(scope="module")
def training_files(tmp_path_factory):
    return write_training_files(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def stopped(training_files):
    """The directory of a run that was stopped after its first step."""
    recipe = tiny_recipe(training_files, "stopped", *SAVES)
    with pytest.raises(Interrupted):
        build(recipe, callbacks=[stop_after(1)]).train()
    return recipe.output.dir


@pytest.fixture
def begun(training_files, stopped, tmp_path):
    """A copy of it; the overrides that go on there."""
    shutil.copytree(stopped, tmp_path / "begun")
    return (*SAVES, f"output.dir={tmp_path / 'begun'}")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def state(step):
    return Checkpoint(Progress(step=step), [], {}, {})


@pytest.mark.parametrize(("best", "kept"), [(None, [4, 5, 6]), (2, [2, 4, 5, 6]), (5, [4, 5, 6])])
@pytest.mark.parametrize("background", [False, True])
def test_the_newest_and_the_best_are_kept(tmp_path, best, kept, background):
    checkpoints = CheckpointWriter(tmp_path, WORLD, keep_last=3, background=background)
    for step in range(1, 7):
        checkpoints.save({"weight": torch.full((3,), float(step))}, state(step), best=best)
    checkpoints.wait()
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]
    into = {"weight": torch.zeros(3)}
    load_checkpoint(tmp_path, WORLD).load_tensors(into, WORLD)
    assert into["weight"].tolist() == [6, 6, 6]


def test_training_may_change_tensors_while_they_are_written(tmp_path):
    checkpoints = CheckpointWriter(tmp_path, WORLD, background=True)
    weight = torch.ones(1000)
    checkpoints.save({"weight": weight}, state(1))
    weight.fill_(2)
    checkpoints.wait()
    load_checkpoint(tmp_path, WORLD).load_tensors({"weight": weight}, WORLD)
    assert weight.eq(1).all()


def test_the_best_step_that_a_callback_names_is_kept_in_a_run(training_files):
    options = ("output.keep_best=true", "output.keep_last=2", "monitor.eval_every_steps=1")
    recipe = tiny_recipe(training_files, "best", *SAVES, *options)

    def judge(trainer, facts):
        if facts["step"] <= 3:
            write_json(recipe.output.dir / "best.json", {"step": facts["step"]})

    with pytest.raises(Interrupted):
        build(recipe, callbacks=[on_step(judge), stop_after(7)]).train()
    assert names(recipe.output.dir / "checkpoint") == ["step-00000003", "step-00000006", "step-00000007"]


def test_by_default_a_damaged_checkpoint_has_one_before_it(training_files):
    recipe = tiny_recipe(training_files, "default", *SAVES)
    with pytest.raises(Interrupted):
        build(recipe, callbacks=[stop_after(7)]).train()
    folder = recipe.output.dir / "checkpoint"
    assert names(folder) == ["step-00000006", "step-00000007"]
    cut(folder / "step-00000007" / "state.json")
    assert load_checkpoint(folder, WORLD).progress.step == 6


def fill_the_disk(limit_bytes):
    """No file of this process can grow beyond; writing fails as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def on_a_full_disk(folder, out, rank, how):
    """Train, saving every second step; from step 3 on, one rank cannot write."""
    import vila.train.checkpoint as checkpoint

    def no_room(path, value):  # for state.json
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def fill(trainer, facts):
        if facts["step"] == 3 and trainer.world.process.rank == rank:
            if how == "tensors":
                fill_the_disk(20_000)
            else:
                checkpoint.write_json = no_room

    run = build(tiny_recipe(folder, out, *SAVES), callbacks=[on_step(fill)])
    try:
        run.train()
    except CheckpointError as error:
        return error, run.trainer.progress.step
    return None, run.trainer.progress.step


@pytest.mark.parametrize(("world", "rank", "how"), [(1, 0, "tensors"), (2, 1, "tensors"), (2, 0, "state")])
def test_a_full_disk_stops_all_ranks_and_leaves_the_checkpoint_before_it(training_files, world, rank, how):
    out = f"full-{world}-{rank}-{how}"
    ended = run_ranks(world, on_a_full_disk, training_files, out, rank, how)
    folder = training_files / out / "checkpoint"
    for error, step in ended:
        assert isinstance(error, CheckpointError)
        assert error.file == str(folder / "step-00000004")
        assert 4 <= step <= 6
    assert names(folder) == ["step-00000002"]
    if world == 1:
        assert_identical(finish(training_files, out, SAVES), finish(training_files, "roomy", SAVES))
    else:
        assert load_checkpoint(folder, WORLD).progress.step == 2


def test_an_unexpected_error_of_the_writing_thread_is_raised(tmp_path):
    checkpoints = CheckpointWriter(tmp_path, WORLD, background=True)
    checkpoints.save({"weight": torch.ones(2)}, Checkpoint(Progress(step=1), [], {"when": object()}, {}))
    with pytest.raises(CheckpointError) as caught:
        checkpoints.wait()
    assert caught.value.file == str(tmp_path / "step-00000001")
    assert "JSON" in caught.value.problem  # the reason of the TypeError
    assert names(tmp_path) == []


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("file", "damage", "field"),
    [
        (".metadata", cut, "bytes"),
        (".metadata", Path.unlink, None),
        ("state.json", Path.unlink, None),
        ("state.json", cut, "bytes"),
        ("state.json", lambda file: write_json(file, {"lanes": []}), "bytes"),
        ("__0_0.distcp", Path.unlink, None),
        ("inputs.json", Path.unlink, None),
        ("manifest.json", Path.unlink, None),
        ("manifest.json", cut, None),
        ("manifest.json", lambda file: file.write_text(file.read_text() + "\n"), None),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_file(training_files, tmp_path, begun, file, damage, field):
    path = tmp_path / "begun" / "checkpoint" / "step-00000001" / file
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        build(tiny_recipe(training_files, "", *begun))
    assert (caught.value.file, caught.value.field) == (str(path), field)


def changed(state, field, value):
    """A copy of `state.json` with one value changed, by its dotted name."""
    state = json.loads(json.dumps(state))
    *keys, last = [int(key) if key.isdecimal() else key for key in field.split(".")]
    inside = state
    for key in keys:
        inside = inside[key]
    inside[last] = value
    return state


@pytest.mark.parametrize(
    ("change", "value", "field"),
    [
        ("progress.step", 2, "progress.step"),
        ("progress.tokens", "120", "progress.tokens"),
        ("progress.tokens", -1, "progress.tokens"),
        ("progress.tokens", 1e30, "progress.tokens"),
        ("progress.samples", True, "progress.samples"),
        ("progress.supervised", 2**40, "progress.supervised"),
        ("progress.seconds", math.nan, "progress.seconds"),
        ("progress.bad_steps", 2, "progress.bad_steps"),
        ("progress.warp", 9, "progress.warp"),
        ("progress", None, "progress.step"),
        ("world", 0, "world"),
        ("recipe", [], "recipe"),
        ("versions.torch", 2.13, "versions.torch"),
        ("lanes", {}, "lanes"),
        ("lanes.1", [5, []], None),
        ("lanes.0", [4, [8]], "lanes.0"),
        ("lanes.0", [8, [4, 4]], "lanes.0"),
        ("lanes.0", ["4", []], "lanes.0"),
        ("lanes.0", [4], "lanes.0"),
        ("lanes.0", [True, []], "lanes.0"),
    ],
)
def test_values_out_of_range_are_refused_with_the_field(stopped, tmp_path, change, value, field):
    folder = tmp_path / "step-00000001"
    shutil.copytree(stopped / "checkpoint" / folder.name, folder)
    state = read_json(folder / "state.json")
    write_json(folder / "state.json", changed(state, change, value))
    sign(folder)
    if field is None:  # a state that may be
        assert load_checkpoint(tmp_path, WORLD).streams[1].next_position == 5
        return
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, WORLD)
    assert (caught.value.file, caught.value.field) == (str(folder / "state.json"), field)


@pytest.fixture
def two(tmp_path):
    """A directory with the checkpoints of steps 1 and 2."""
    checkpoints = CheckpointWriter(tmp_path / "checkpoint", WORLD, keep_last=2)
    for step in (1, 2):
        checkpoints.save({"weight": torch.full((64,), float(step))}, state(step))
    return tmp_path / "checkpoint"


def load_weight(folder, events=SILENT):
    into = {"weight": torch.zeros(64)}
    checkpoint = load_checkpoint(folder, WORLD, events)
    checkpoint.load_tensors(into, WORLD)
    assert into["weight"].unique().tolist() == [checkpoint.progress.step]
    return checkpoint.progress.step


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "inputs.json", "manifest.json", "state.json"])
def test_any_bit_that_flips_in_the_newest_checkpoint_makes_the_one_before_it_be_taken(two, file):
    path = two / "step-00000002" / file
    sound = path.read_bytes()
    bits = random.Random(file)
    for place in [0, 8 * len(sound) - 1, *(bits.randrange(8 * len(sound)) for _ in range(22))]:
        shutil.rmtree(two / "step-00000002.damaged", ignore_errors=True)
        flipped = bytearray(sound)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        events = EventLog()
        assert load_weight(two, events) == 1
        (line,) = events.lines
        # A digest that flips in the manifest shows at the file that it is of.
        assert str(path if file != "manifest.json" else path.parent) in line
        (two / "step-00000002.damaged").rename(two / "step-00000002")
    path.write_bytes(sound)
    assert load_weight(two) == 2


def test_any_bit_that_flips_in_the_only_checkpoint_is_refused(two):
    shutil.rmtree(two / "step-00000001")
    for path in (two / "step-00000002").iterdir():
        sound = path.read_bytes()
        flipped = bytearray(sound)
        flipped[len(sound) // 2] ^= 16
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(two, WORLD)
        assert caught.value.file == str(path)
        path.write_bytes(sound)
    assert names(two) == ["step-00000002"]


def test_directories_with_other_names_are_ignored_and_left(two):
    strays = ["step-00000009.damaged", "step-9", "step-000000009", "step-backup", "step-00000008", "old"]
    for name in strays:
        (two / name).touch() if name == "step-00000008" else (two / name).mkdir()
    assert load_weight(two) == 2
    checkpoints = CheckpointWriter(two, WORLD)
    checkpoints.save({"weight": torch.full((64,), 3.0)}, state(3))
    assert names(two) == sorted(["step-00000002", "step-00000003", *strays])


def test_a_checkpoint_after_the_damaged_one_was_set_aside_is_kept(two):
    cut(two / "step-00000002" / "state.json")
    assert load_weight(two) == 1
    CheckpointWriter(two, WORLD).save({"weight": torch.full((64,), 2.0)}, state(2))
    assert load_weight(two) == 2
    assert names(two) == ["step-00000001", "step-00000002", "step-00000002.damaged"]


def refused_on_two_ranks(folder):
    """What each rank finds in a directory of checkpoints."""
    world = open_world()
    events = EventLog()
    try:
        checkpoint = load_checkpoint(folder, world, events)
    except CheckpointError as error:
        return error.file, error.is_repeated
    return checkpoint.progress.step, len(events.lines)


def test_ranks_agree_on_the_checkpoint_that_they_take(two):
    cut(two / "step-00000002" / "__0_0.distcp")
    assert run_ranks(2, refused_on_two_ranks, two) == [(1, 1), (1, 1)]
    cut(two / "step-00000001" / "state.json")
    file = str(two / "step-00000001" / "state.json")
    assert run_ranks(2, refused_on_two_ranks, two) == [(file, False), (file, True)]


def test_a_directory_that_was_moved_resumes(training_files, begun):
    assert build(tiny_recipe(training_files, "", *begun)).trainer.progress.step == 1


def test_a_checkpoint_of_another_architecture_is_refused_with_the_tensor(training_files, begun):
    save_model(*tiny.vila("llama", hidden_size=16), training_files / "narrow")
    other = tiny_recipe(training_files, "", *begun, f"model.path={training_files / 'narrow'}")
    with pytest.raises(CheckpointError) as caught:
        build(other, allow_changes=("model.path",))
    assert caught.value.field.startswith("master/")
    assert caught.value.file.endswith("step-00000001")


def test_a_checkpoint_of_another_stage_is_refused_with_the_tensor(training_files, begun):
    other = tiny_recipe(training_files, "", *begun, "stage.tune=[vision]", "stage.llm_parts=[]")
    with pytest.raises(CheckpointError) as caught:
        build(other, allow_changes=("stage",))
    assert caught.value.field.startswith("master/vision_tower.")
    assert caught.value.file.endswith("step-00000001")
