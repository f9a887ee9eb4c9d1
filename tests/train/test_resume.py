"""Runs that are killed or stopped resume to the same losses and weights, bit for bit."""

import os
import signal
import subprocess
import time

import pytest
import torch
from torch import nn

from tests import preloaded
from tests.train.finish import assert_identical, finish, sign, stop_after, stopped
from tests.train.ranks import run_ranks
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.config.load import save_recipe
from vila.core.errors import CheckpointError, Interrupted, RunChangedError
from vila.core.files import write_json
from vila.core.reading import read_json
from vila.train.build import build
from vila.train.metrics import read_metrics

SAVES = ("batch.rows=4", "budget.tokens=3000", "output.checkpoint_every_steps=2")
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def training_files(tmp_path_factory):
    return write_training_files(tmp_path_factory.mktemp("train"))


@pytest.fixture(autouse=True)
def one_thread():
    """As in the ranks: numbers depend on how many threads share a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def steps_of(folder):
    return sorted(path.name for path in (folder / "checkpoint").iterdir() if not path.name.startswith("."))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_together(run):
    """As in a power cut: a rank that outlived another one would hear of it, and stop with an error."""
    (run.folder / f"dying-{run.world.process.rank}").touch()
    while len(list(run.folder.glob("dying-*"))) < run.world.process.world_size:
        time.sleep(0.001)
    die()


def killed(folder, out, point):
    """Train, saving in the background every second step, and die at `point` of step 5 or of the save of step 4."""
    import vila.train.checkpoint as checkpoint

    run = build(tiny_recipe(folder, out, *SAVES))
    if point == "in the middle of a step":
        update = run.trainer.state.optimizer.step

        def half_a_step(*arguments):
            if run.trainer.progress.step == 4:
                die()
            update(*arguments)

        run.trainer.state.optimizer.step = half_a_step
    elif point == "while tensors are written":

        class Dying(checkpoint.dcp.FileSystemWriter):
            def write_data(self, plan, planner):
                done = super().write_data(plan, planner)
                if "step-00000004" in str(self.path):
                    for file in self.path.glob(f"__{run.world.process.rank}_*.distcp"):
                        os.truncate(file, file.stat().st_size // 2)
                    die_together(run)
                return done

        checkpoint.dcp.FileSystemWriter = Dying
    else:
        write = checkpoint.write_json

        def all_but_the_name(path, value):
            write(path, value)
            if path.name == "state.json" and value["progress"]["step"] == 4:
                die()

        checkpoint.write_json = all_but_the_name
    run.trainer.run()
    run.trainer.checkpointer.writer.wait()


# Saving goes on beside training: when a step is cut short, the save before it may be done or not.
POINTS = {
    "in the middle of a step": {"step-00000002", "step-00000004"},
    "while tensors are written": {"step-00000002"},
    "before the folder has its name": {"step-00000002"},
}


@pytest.fixture(scope="module")
def through(training_files):
    """The run that nothing happens to."""
    return run_ranks(1, finish, training_files, "through", SAVES)[0]


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_resumes_bit_for_bit(training_files, through, point):
    out = point.replace(" ", "-")
    assert run_ranks(1, killed, training_files, out, point) == [KILLED]
    assert steps_of(training_files / out)
    assert set(steps_of(training_files / out)) <= POINTS[point]
    assert_identical(finish(training_files, out, SAVES), through)
    assert not list((training_files / out).rglob("*.partial"))


def test_two_ranks_that_are_killed_and_asked_to_stop_resume_bit_for_bit(training_files):
    through = run_ranks(2, finish, training_files, "two-through", SAVES)[0]
    assert run_ranks(2, killed, training_files, "two", "while tensors are written") == [KILLED, KILLED]
    assert steps_of(training_files / "two") == ["step-00000002"]
    # The signal reaches the second rank alone, in or after the step.
    ours, theirs = run_ranks(2, stopped, training_files, "two", SAVES, 5, signal.SIGTERM, 1)
    assert ours == theirs
    assert ours[0] == 0
    assert ours[1] in ("step 5", "step 6")
    assert_identical(run_ranks(2, finish, training_files, "two", SAVES)[0], through)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_stop_saves_and_resumes_bit_for_bit(training_files, through, number, code):
    out = f"asked-{number}"
    outcome = stopped(training_files, out, SAVES, 3, number)
    assert outcome == (code, "step 3")
    assert steps_of(training_files / out) == ["step-00000002", "step-00000003"]
    assert_identical(finish(training_files, out, SAVES), through)


def test_the_command_that_a_batch_system_warns_exits_with_0(training_files):
    recipe = tiny_recipe(training_files, "warned", "budget.tokens=1000000")
    save_recipe(recipe, training_files / "warned.yaml")
    command = [str(preloaded.program()), "train", str(training_files / "warned.yaml")]
    metrics = training_files / "warned" / "metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
                time.sleep(0.05)
            process.send_signal(signal.SIGUSR1)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, output
    step = read_metrics(metrics)[-1]["step"]
    assert f"step {step}:" in output
    assert steps_of(training_files / "warned") == [f"step-{step:08d}"]


def drop_out(run):
    """Put dropout behind the projector, where no tensor of a checkpoint knows of it."""
    run.model.projector.register_forward_hook(lambda module, inputs, output: nn.functional.dropout(output, 0.3))


def drop_out_and_stop(run):
    drop_out(run)
    run.trainer.callbacks.append(stop_after(4))


def test_a_run_with_dropout_resumes_bit_for_bit(training_files, through):
    dropped = finish(training_files, "dropout", SAVES, drop_out)
    assert dropped[0] != through[0]
    with pytest.raises(Interrupted):
        finish(training_files, "dropout-stopped", SAVES, drop_out_and_stop)
    assert_identical(finish(training_files, "dropout-stopped", SAVES, drop_out), dropped)


@pytest.fixture(scope="module")
def begun(training_files):
    """A run that was stopped at step 2."""
    with pytest.raises(Interrupted):
        build(tiny_recipe(training_files, "begun", *SAVES), callbacks=[stop_after(2)]).train()
    return training_files


@pytest.mark.parametrize(
    ("change", "allow"),
    [
        ("batch.micro=2", ()),
        ("output.keep_last=3", ()),
        ("compute.gradient_checkpointing=true", ()),
        ("monitor.eval_items=7", ()),
        ("stage.lr=1e-3", ("stage.lr",)),
        ("stage.lr=1e-3", ("stage",)),
    ],
)
def test_changes_that_are_free_or_allowed_by_field_or_section_resume(begun, change, allow):
    assert build(tiny_recipe(begun, "begun", *SAVES, change), allow_changes=allow).trainer.progress.step == 2


def test_other_changes_are_refused_with_every_difference(begun):
    recipe = tiny_recipe(begun, "begun", *SAVES, "seed=5", "stage.lr=1e-3", "optim.beta2=0.9")
    with pytest.raises(RunChangedError) as caught:
        build(recipe, allow_changes=("optim", "stage.lr_projector"))
    assert caught.value.file == str(begun / "begun")
    assert caught.value.differences == [("seed", "0", "5"), ("stage.lr", "0.005", "0.001")]


def test_another_global_batch_is_refused_even_when_allowed(begun):
    with pytest.raises(CheckpointError) as caught:
        build(tiny_recipe(begun, "begun", *SAVES, "batch.rows=6"), allow_changes=("batch.rows",))
    assert (caught.value.field, caught.value.value) == ("batch", 6)


def test_a_checkpoint_of_another_version_is_refused_with_the_field(begun):
    file = begun / "begun" / "checkpoint" / "step-00000002" / "state.json"
    state = read_json(file)
    write_json(file, state | {"recipe": state["recipe"] | {"warp": 9}})
    sign(file.parent)
    try:
        with pytest.raises(CheckpointError) as caught:
            build(tiny_recipe(begun, "begun", *SAVES))
        assert (caught.value.file, caught.value.field) == (str(file), "recipe.warp")
    finally:
        write_json(file, state)
        sign(file.parent)
