"""Checkpoints are whole or absent: what is kept, what a full disk leaves, what of another model or stage is told."""

import errno
import resource
import shutil

import pytest
import torch

from tests import tiny
from tests.train.finish import assert_identical, finish, stop_after
from tests.train.ranks import run_ranks
from tests.train.stand import stand_recipe, write_stand
from vila.core.dist import Place
from vila.core.errors import CheckpointError, Interrupted
from vila.core.files import write_json
from vila.model.load import save_model
from vila.train.checkpoint import Checkpoint, Checkpoints, Progress, load_checkpoint
from vila.train.parallel import World
from vila.train.run import build

WORLD = World(Place(), torch.device("cpu"))
SAVES = ("batch.rows=4", "budget.tokens=3000", "output.checkpoint_every_steps=2")


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    return write_stand(tmp_path_factory.mktemp("stand"))


@pytest.fixture(scope="module")
def stopped(stand):
    """The directory of a run that was stopped after its first step."""
    recipe = stand_recipe(stand, "stopped", *SAVES)
    with pytest.raises(Interrupted):
        build(recipe, listeners=[stop_after(1)]).train()
    return recipe.output.dir


@pytest.fixture
def begun(stand, stopped, tmp_path):
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
    checkpoints = Checkpoints(tmp_path, WORLD, keep_last=3, background=background)
    for step in range(1, 7):
        checkpoints.save({"weight": torch.full((3,), float(step))}, state(step), best=best)
    checkpoints.wait()
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]
    into = {"weight": torch.zeros(3)}
    load_checkpoint(tmp_path, WORLD).load_tensors(into, WORLD)
    assert into["weight"].tolist() == [6, 6, 6]


def test_training_may_change_tensors_while_they_are_written(tmp_path):
    checkpoints = Checkpoints(tmp_path, WORLD, background=True)
    weight = torch.ones(1000)
    checkpoints.save({"weight": weight}, state(1))
    weight.fill_(2)
    checkpoints.wait()
    load_checkpoint(tmp_path, WORLD).load_tensors({"weight": weight}, WORLD)
    assert weight.eq(1).all()


def test_the_best_step_that_a_listener_names_is_kept_in_a_run(stand):
    options = ("output.keep_best=true", "output.keep_last=2", "monitor.eval_every_steps=1")
    recipe = stand_recipe(stand, "best", *SAVES, *options)

    def judge(trainer, facts):
        if facts["step"] <= 3:
            write_json(recipe.output.dir / "best.json", {"step": facts["step"]})

    with pytest.raises(Interrupted):
        build(recipe, listeners=[judge, stop_after(7)]).train()
    assert names(recipe.output.dir / "checkpoint") == ["step-00000003", "step-00000006", "step-00000007"]


def fill_the_disk(limit_bytes):
    """No file of this process can grow beyond; writing fails as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def on_a_full_disk(folder, out, rank, how):
    """Train, saving every second step; from step 3 on, one rank cannot write."""
    import vila.train.checkpoint as checkpoint

    def no_room(path, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def fill(trainer, facts):
        if facts["step"] == 3 and trainer.world.place.rank == rank:
            if how == "tensors":
                fill_the_disk(20_000)
            else:
                checkpoint.write_json = no_room

    run = build(stand_recipe(folder, out, *SAVES), listeners=[fill])
    try:
        run.train()
    except CheckpointError as error:
        return str(error), run.trainer.progress.step
    return "", run.trainer.progress.step


@pytest.mark.parametrize(("world", "rank", "how"), [(1, 0, "tensors"), (2, 1, "tensors"), (2, 0, "state")])
def test_a_full_disk_stops_all_ranks_and_leaves_the_checkpoint_before_it(stand, world, rank, how):
    out = f"full-{world}-{rank}-{how}"
    told = run_ranks(world, on_a_full_disk, stand, out, rank, how)
    folder = stand / out / "checkpoint"
    for said, step in told:
        assert f"{folder / 'step-00000004'}: the checkpoint was not written (" in said
        assert "; the one before it is whole. Make room, then run again to go on from there" in said
        assert 4 <= step <= 6
    assert names(folder) == ["step-00000002"]
    if world == 1:
        assert_identical(finish(stand, out, SAVES), finish(stand, "roomy", SAVES))
    else:
        assert load_checkpoint(folder, WORLD).progress.step == 2


def test_an_unexpected_error_of_the_writing_thread_is_raised(tmp_path):
    checkpoints = Checkpoints(tmp_path, WORLD, background=True)
    checkpoints.save({"weight": torch.ones(2)}, Checkpoint(Progress(step=1), [], {"when": object()}, {}))
    with pytest.raises(CheckpointError, match="step-00000001: the checkpoint was not written .*object.* not JSON"):
        checkpoints.wait()
    assert names(tmp_path) == []


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: cut(folder / ".metadata"), r"/\.metadata: not an index of tensors .*; delete that checkpoint"),
        (lambda folder: (folder / ".metadata").unlink(), r": cannot resume from it \(.*\); delete that directory"),
        (lambda folder: (folder / "state.json").unlink(), r": cannot resume from it \(.*\); delete that directory"),
        (lambda folder: cut(folder / "state.json"), r": cannot resume from it \(.*not JSON.*\); delete that directory"),
        (
            lambda folder: write_json(folder / "state.json", {"lanes": []}),
            r": cannot resume from it \('progress'\); delete that directory",
        ),
        (
            lambda folder: [file.unlink() for file in folder.glob("*.distcp")],
            r": cannot resume from it \(.*distcp.*\); delete that directory",
        ),
    ],
    ids=["index cut", "no index", "no state", "state cut", "state of another kind", "no tensors"],
)
def test_a_damaged_checkpoint_is_refused_with_its_name_and_the_remedy(stand, tmp_path, begun, spoil, says):
    folder = tmp_path / "begun" / "checkpoint" / "step-00000001"
    spoil(folder)
    with pytest.raises(CheckpointError, match=f"^{folder}{says}"):
        build(stand_recipe(stand, "", *begun))


def test_a_directory_that_was_moved_goes_on(stand, begun):
    assert build(stand_recipe(stand, "", *begun)).trainer.progress.step == 1


def test_a_checkpoint_of_another_architecture_is_refused_with_the_tensor(stand, begun):
    save_model(*tiny.vila("llama", hidden_size=16), stand / "narrow")
    other = stand_recipe(stand, "", *begun, f"model.path={stand / 'narrow'}")
    with pytest.raises(CheckpointError) as caught:
        build(other, allow_changes=("model.path",))
    said = str(caught.value)
    assert "step-00000001: master/" in said
    assert "is of shape (32" in said
    assert "it is of another model or stage. Choose another output.dir, or delete that directory" in said


def test_a_checkpoint_of_another_stage_is_refused_with_the_tensor(stand, begun):
    other = stand_recipe(stand, "", *begun, "stage.tune=[vision]", "stage.llm_parts=[]")
    with pytest.raises(CheckpointError, match=r"step-00000001: master/vision_tower\S+ is not in it; it is of another"):
        build(other, allow_changes=("stage",))
