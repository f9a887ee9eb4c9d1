"""Steps that are not finite, data that is too short, and directories that cannot be written."""

import math
from itertools import pairwise

import pytest
import torch

from tests.other_process import HOST, PID, locked_elsewhere
from tests.train.finish import on_step, stop_after
from tests.train.ranks import run_ranks
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.core.errors import ConfigError, DirectoryInUseError, Interrupted, TrainingError, VilaError
from vila.train.build import build
from vila.train.metrics import read_metrics

BUDGET = ("batch.rows=4", "budget.tokens=3000", "budget.max_bad_steps=2")


@pytest.fixture(scope="module")
def training_files(tmp_path_factory):
    return write_training_files(tmp_path_factory.mktemp("train"))


def poison(run, steps, kind="loss", rank=0):
    """Corrupt the loss, or only the gradient, of some steps in one rank."""
    forward = run.trainer.state.loss_module.forward

    def corrupted(*batch, **options):
        loss, by_data_set = forward(*batch, **options)
        if run.trainer.progress.step + 1 in steps and run.world.process.rank == rank:
            if kind == "loss":
                loss = loss * math.nan
            else:
                loss.register_hook(lambda gradient: gradient * math.inf)
        return loss, by_data_set

    run.trainer.state.loss_module.forward = corrupted


def state_of(run):
    return {name: tensor.clone() for name, tensor in run.trainer.state.optimizer.state_tensors().items()}


@pytest.mark.parametrize(("field", "values"), [("loss", {"nan"}), ("grad_norm", {"nan", "inf"})])
def test_steps_that_are_not_finite_are_skipped_up_to_the_budget(training_files, field, values):
    run = build(tiny_recipe(training_files, f"bad-{field}", *BUDGET))
    poison(run, {2, 4, 5}, field)
    states = [state_of(run)]
    run.trainer.callbacks.append(on_step(lambda trainer, facts: states.append(state_of(run))))
    with pytest.raises(TrainingError) as caught:
        run.train()
    assert (caught.value.record, caught.value.field) == ("step 5", field)
    assert str(caught.value.value) in values
    assert caught.value.file == str(run.folder / "bad_steps.jsonl")
    assert "budget.max_bad_steps=2" in caught.value.hint
    changed = [any(not torch.equal(old[name], new[name]) for name in old) for old, new in pairwise(states)]
    assert changed == [True, False, True, False]
    assert run.trainer.progress.step == 4
    assert run.trainer.progress.bad_steps == 2
    bad = read_metrics(run.folder / "bad_steps.jsonl")
    assert [row["step"] for row in bad] == [2, 4, 5]
    assert all(row["ids"] and set(row) == {"step", "loss", "grad_norm", "ids"} for row in bad)
    if field == "loss":
        assert {row["loss"] for row in bad} == {"nan"}
    else:
        assert all(math.isfinite(float(row["loss"])) for row in bad)


def test_a_resumed_run_keeps_count_of_the_steps_that_it_skipped(training_files):
    run = build(tiny_recipe(training_files, "counted", *BUDGET))
    poison(run, {2})
    run.trainer.callbacks.append(stop_after(3))
    with pytest.raises(Interrupted):
        run.train()
    path = run.folder / "bad_steps.jsonl"
    first = read_metrics(path)[0]
    # A run that was killed wrote of steps that the one which goes on comes by again, and half a line.
    path.write_text(path.read_text() + '{"step": 4, "ids": []}\n{"step": 5, "id')
    run = build(tiny_recipe(training_files, "counted", *BUDGET))
    assert read_metrics(path) == [first]
    assert run.trainer.progress.bad_steps == 1
    poison(run, {5, 6})
    with pytest.raises(TrainingError) as caught:
        run.train()
    assert (caught.value.record, caught.value.field) == ("step 6", "loss")
    assert [row["step"] for row in read_metrics(path)] == [2, 5, 6]


def poisoned_rank(folder, out, steps):
    """Train with a second rank whose loss is corrupted; the error's location, the progress, and a weight."""
    run = build(tiny_recipe(folder, out, *BUDGET))
    poison(run, steps, rank=1)
    location = None
    try:
        run.trainer.run()
    except TrainingError as error:
        location = error.record, error.field
    weight = next(iter(run.trainer.state.optimizer.state_tensors().values()))
    return location, run.trainer.progress, weight.full_tensor().isfinite().all().item()


def test_ranks_agree_on_the_steps_that_they_leave_out(training_files):
    ours, theirs = run_ranks(2, poisoned_rank, training_files, "agreed", {2, 3, 5})
    assert ours[0] == theirs[0] == ("step 5", "loss")
    assert ours[1].bad_steps == theirs[1].bad_steps == 2
    assert ours[2] and theirs[2]
    rows = read_metrics(training_files / "agreed" / "bad_steps.jsonl")
    assert [row["step"] for row in rows] == [2, 3, 5]
    assert all(len(row["ids"]) >= 4 for row in rows)  # of both ranks, four rows


def test_data_that_is_shorter_than_a_batch_is_refused_with_both_numbers(training_files):
    with pytest.raises(ConfigError) as caught:
        build(tiny_recipe(training_files, "short", "batch.rows=26"))
    assert (caught.value.field, caught.value.value) == ("batch.rows", 26)
    assert "24" in caught.value.problem


def refused_when_built(folder, out):
    try:
        build(tiny_recipe(folder, out))
    except VilaError as error:
        return error
    return None


@pytest.mark.parametrize("world", [1, 2])
def test_a_directory_that_cannot_be_written_is_named(training_files, world):
    out = "data.jsonl/run"
    errors = (
        [refused_when_built(training_files, out)]
        if world == 1
        else run_ranks(world, refused_when_built, training_files, out)
    )
    assert len(errors) == world
    for error in errors:
        assert isinstance(error, ConfigError)
        assert (error.field, error.value) == ("output.dir", str(training_files / out))


def test_a_file_in_place_of_the_directory_is_named(training_files):
    (training_files / "taken").write_text("")
    error = refused_when_built(training_files, "taken")
    assert isinstance(error, ConfigError)
    assert (error.field, error.value) == ("output.dir", str(training_files / "taken"))


@pytest.mark.parametrize("world", [1, 2])
def test_a_directory_that_another_run_trains_into_is_refused_with_host_and_pid(training_files, world):
    with locked_elsewhere(training_files / "busy"):
        args = (training_files, "busy")
        errors = [refused_when_built(*args)] if world == 1 else run_ranks(world, refused_when_built, *args)
    for error in errors:
        assert isinstance(error, DirectoryInUseError)
        assert (error.file, error.host, error.pid) == (str(training_files / "busy"), HOST, PID)


def test_a_run_holds_its_directory_until_it_ends(training_files):
    run = build(tiny_recipe(training_files, "held", *BUDGET))
    seen = []
    run.trainer.callbacks.append(on_step(lambda trainer, facts: seen.append((run.folder / ".lock").is_file())))
    run.train()
    assert all(seen)
    assert not (run.folder / ".lock").exists()
