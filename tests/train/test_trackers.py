"""Trackers receive every step once, in one run, also when training is interrupted.

The packages are not installed here: fakes with the same interface record their calls.
"""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.train.tiny_run import tiny_recipe
from vila.core.errors import ConfigError
from vila.core.optional import MissingExtraError
from vila.train.trackers import flatten_metrics, open_trackers


class FakeRun:
    def __init__(self, calls):
        self.calls = calls

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def calls(monkeypatch):
    """Calls recorded by the fakes of all three packages."""
    calls = []
    wandb, trackio, board = ModuleType("wandb"), ModuleType("trackio"), ModuleType("torch.utils.tensorboard")

    def init(*args, **kwargs):
        calls.append(("init", args, kwargs))
        return FakeRun(calls)

    class SummaryWriter:
        def __init__(self, folder, purge_step, flush_secs):
            calls.append(("init", (folder,), {"purge_step": purge_step}))

        def add_scalar(self, name, value, step):
            calls.append(("log", step, {name: value}))

        def close(self):
            calls.append(("finish",))

    wandb.init = trackio.init = init
    board.SummaryWriter = SummaryWriter
    for module in (wandb, trackio, board):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def recipe_of(folder, *names):
    return tiny_recipe(folder, "out", f"monitor.trackers=[{', '.join(names)}]", "monitor.project=mine")


def step(number, **facts):
    return {"step": number, "loss": 1 / number, **facts}


def trainer(number):
    return SimpleNamespace(progress=SimpleNamespace(step=number))


def checkpoint(folder, number):
    (folder / "out" / "checkpoint" / f"step-{number:08d}").mkdir(parents=True)


def logged(calls):
    return [entry[1:] for entry in calls if entry[0] == "log"]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_is_the_same_run_there_and_repeats_no_step(tmp_path, calls, name):
    recipe = recipe_of(tmp_path, name)
    (first,) = open_trackers(recipe, recipe.output.dir)
    for number in (1, 2, 3):
        first.on_step_end(trainer(number), step(number))
    checkpoint(tmp_path, 2)
    calls.append(("kill",))
    (second,) = open_trackers(recipe, recipe.output.dir)
    for number in (3, 4):
        second.on_step_end(trainer(number), step(number))
    second.on_train_end(trainer(4))
    second.close()
    assert [number for number, _ in logged(calls)] == [1, 2, 3, 4]
    assert calls[-1] == ("finish",) and calls.count(("finish",)) == 1
    inits = [entry[1:] for entry in calls if entry[0] == "init"]
    assert inits[0] == inits[1]
    positional, named = inits[0]
    assert named["resume"] == "allow" and named["config"]["stage"]["lr"] == recipe.stage.lr
    assert "mine" in (*positional, named.get("project"))
    first.close()


def test_a_run_without_a_checkpoint_begins_anew_there_too(tmp_path, calls):
    recipe = recipe_of(tmp_path, "wandb")
    for _ in range(2):
        (tracker,) = open_trackers(recipe, recipe.output.dir)
        tracker.on_step_end(trainer(1), step(1))
        tracker.close()
    ids = [entry[2]["id"] for entry in calls if entry[0] == "init"]
    assert ids[0] != ids[1]
    assert [number for number, _ in logged(calls)] == [1, 1]


def test_tensorboard_forgets_what_the_resumed_run_will_write_again(tmp_path, calls):
    recipe = recipe_of(tmp_path, "tensorboard")
    (first,) = open_trackers(recipe, recipe.output.dir)
    for number in (1, 2, 3):
        first.on_step_end(trainer(number), step(number))
    checkpoint(tmp_path, 1)
    (second,) = open_trackers(recipe, recipe.output.dir)
    second.on_step_end(trainer(2), step(2))
    inits = [entry[1:] for entry in calls if entry[0] == "init"]
    assert [named["purge_step"] for _, named in inits] == [1, 2]
    assert inits[0][0] == (str(recipe.output.dir / "tensorboard"),)
    assert [number for number, _ in logged(calls)] == [1, 2, 3, 2]
    first.close(), second.close()


def test_scores_go_along_with_their_step(tmp_path, calls):
    recipe = recipe_of(tmp_path, "trackio")
    (tracker,) = open_trackers(recipe, recipe.output.dir)
    path = recipe.output.dir / "evaluations.jsonl"
    tracker.on_step_end(trainer(1), step(1))
    for number, score in ((2, 50.0), (3, None)):
        with path.open("a") as stream:
            stream.write(json.dumps({"step": number, "benchmark": "pope", "score": score}) + "\n")
        tracker.on_step_end(trainer(number), step(number))
    with path.open("a") as stream:
        stream.write(json.dumps({"step": 3, "benchmark": "pope", "score": 60.0}) + "\n")
    tracker.on_train_end(trainer(3))
    scores = [(number, values["eval/pope"]) for number, values in logged(calls) if "eval/pope" in values]
    assert scores == [(2, 50.0), (3, 60.0)]


def test_facts_become_flat_names_and_numbers():
    facts = step(2, loss_by_data_set={"a/b": 1.5}, tokens_by_data_set={"c": 7}, lr=1e-5, mfu=float("nan"), note="x")
    assert flatten_metrics(facts) == {"loss": 0.5, "loss/a/b": 1.5, "tokens/c": 7, "lr": 1e-5}


def test_missing_packages_are_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "trackio", None)
    recipe = recipe_of(tmp_path, "wandb", "trackio")
    with pytest.raises(MissingExtraError) as raised:
        open_trackers(recipe, recipe.output.dir)
    assert raised.value.field == "monitor.trackers"
    assert raised.value.hint == "pip install wandb trackio"


def test_a_tracker_that_cannot_be_opened_is_an_error_before_training(tmp_path, calls, monkeypatch):
    def refuse(**kwargs):
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    recipe = recipe_of(tmp_path, "wandb")
    with pytest.raises(ConfigError) as caught:
        open_trackers(recipe, recipe.output.dir)
    assert (caught.value.field, caught.value.value) == ("monitor.trackers", "wandb")
    assert "no API key" in caught.value.problem


def test_only_one_process_sends(tmp_path, calls, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert open_trackers(recipe_of(tmp_path, "wandb"), tmp_path) == []
    assert calls == []
