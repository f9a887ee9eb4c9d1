"""Prompts and evaluations during training: their files, and that they do not change training."""

import json
import os
import random
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import tiny
from tests.train.finish import on_step
from tests.train.ranks import run_ranks
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.cli.train_callbacks import build_callbacks
from vila.core.errors import ConfigError, DataError, Interrupted, UnknownNameError
from vila.core.files import sha256_tree
from vila.core.reading import read_json
from vila.engine.engine import Engine
from vila.eval.training_callbacks import inference_mode
from vila.train.build import build, model_dir
from vila.train.metrics import read_metrics


@pytest.fixture(scope="module")
def training_files(tmp_path_factory):
    folder = write_training_files(tmp_path_factory.mktemp("train"))
    images = folder / "easy" / "test" / "images"
    images.mkdir(parents=True)
    questions = []
    for number in range(3):
        (images / f"{number}.png").write_bytes(tiny.image(number).source)
        questions += [["what color is the shape?", "teal", number], ["is there a circle?", "yes", number]]
    (images.parent / "questions.json").write_text(json.dumps(questions))
    return folder


def watched(training_files, out, *overrides):
    return tiny_recipe(
        training_files,
        out,
        f"monitor.prompts=[{{text: 'what?', image: {training_files / '0.png'}}}, {{text: 'who?'}}]",
        "monitor.prompt_every_steps=4",
        "monitor.eval_every_steps=3",
        f"monitor.eval_data={training_files / 'easy'}",
        "monitor.eval_items=4",
        "budget.tokens=1300",
        *overrides,
    )


def train(recipe, *callbacks, watch=True):
    run = build(recipe)
    run.trainer.callbacks += [*(build_callbacks(recipe, run.processor) if watch else []), *callbacks]
    run.train()
    return run


@pytest.fixture(scope="module")
def whole(training_files):
    recipe = watched(training_files, "whole")
    train(recipe)
    return recipe.output.dir


def rows(folder, name):
    return read_metrics(folder / f"{name}.jsonl")


def test_prompts_are_answered_at_their_steps_and_at_the_end(whole):
    last = rows(whole, "metrics")[-1]["step"]
    assert last % 4  # so that the end is a step of its own
    answers = rows(whole, "answers")
    assert [row["step"] for row in answers] == [s for s in [*range(4, last, 4), last] for _ in range(2)]
    assert {(row["prompt"], bool(row["image"])) for row in answers} == {("what?", True), ("who?", False)}
    assert answers[-1]["answer"] != answers[1]["answer"]  # the model has learnt meanwhile


def test_the_last_answers_are_those_of_the_trained_model(training_files, whole):
    recipe = watched(training_files, "again")
    run = build(recipe)
    run.trainer.run()
    answer = Engine(run.model, run.processor).generate([{"role": "user", "content": "who?"}])
    assert rows(whole, "answers")[-1]["answer"] == answer


def test_evaluations_are_scored_and_the_best_is_named(whole):
    found = rows(whole, "evaluations")
    last = rows(whole, "metrics")[-1]["step"]
    assert [row["step"] for row in found] == sorted({*range(3, last + 1, 3), last})
    assert all(row["benchmark"] == "easy_vqa" and row["items"] == 4 and 0 <= row["score"] <= 100 for row in found)
    best = read_json(whole / "best.json")
    assert best["score"] == max(row["score"] for row in found)
    assert best["step"] == next(row["step"] for row in found if row["score"] == best["score"])
    predictions = whole / "evaluations" / "step-00000003" / "predictions.jsonl"
    assert len(predictions.read_text().splitlines()) == 4


@pytest.mark.parametrize("options", [(), ("compute.gradient_checkpointing=true", "compute.dtype=bfloat16")])
def test_callbacks_do_not_change_training(training_files, options):
    folders = {}
    for watch in (True, False):
        recipe = watched(training_files, f"noticed-{watch}-{len(options)}", *options)
        train(recipe, watch=watch)
        folders[watch] = recipe
    keys = ("step", "loss", "grad_norm", "tokens_seen")
    ours, theirs = (
        [[row[key] for key in keys] for row in rows(folders[watch].output.dir, "metrics")] for watch in (True, False)
    )
    assert ours == theirs
    ours, theirs = (sha256_tree(model_dir(folders[watch]), "*.safetensors") for watch in (True, False))
    assert ours == theirs
    assert rows(folders[True].output.dir, "answers")
    assert not (folders[False].output.dir / "answers.jsonl").exists()


def test_modes_and_random_numbers_are_as_before(training_files):
    trainer = build(tiny_recipe(training_files, "modes", "compute.gradient_checkpointing=true")).trainer
    modes = {name: module.training for name, module in trainer.state.model.named_modules()}
    assert len(set(modes.values())) == 2
    drawn = {}
    for look in (True, False):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        if look:
            with pytest.raises(ZeroDivisionError), inference_mode(trainer):
                assert not any(module.training for module in trainer.state.model.modules())
                torch.rand(3), random.random(), np.random.rand()
                1 / 0  # noqa: B018 - also when asking fails
        drawn[look] = (torch.rand(1).item(), random.random(), np.random.rand())
    assert drawn[True] == drawn[False]
    assert {name: module.training for name, module in trainer.state.model.named_modules()} == modes


def test_a_resumed_run_repeats_no_line(training_files, whole):
    recipe = watched(training_files, "resumed")

    def stop(trainer, facts):
        if facts["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(recipe, on_step(stop))
    folder = recipe.output.dir
    # As a kill after later steps than the checkpoint's leaves them.
    for name, extra in (("answers", {"prompt": "what?", "answer": "x"}), ("evaluations", {"score": 101.0})):
        with (folder / f"{name}.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": 6, **extra}) + "\n" + '{"step": 7, "cut')
    (folder / "best.json").write_text('{"step": 6}')
    train(recipe)
    for name in ("answers", "evaluations"):
        plain = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder, name)]
        assert plain == [{k: v for k, v in row.items() if k != "seconds"} for row in rows(whole, name)]
    assert read_json(folder / "best.json") == read_json(whole / "best.json")


def test_the_best_is_the_first_of_the_highest_scores_that_are_left(training_files):
    recipe = watched(training_files, "best", "monitor.prompts=[]")
    folder = recipe.output.dir
    folder.mkdir()
    scores = {1: None, 2: 70.0, 3: 80.0, 4: 80.0, 5: 90.0}
    lines = [{"step": step, "benchmark": "easy_vqa", "score": score} for step, score in scores.items()]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (callback,) = build_callbacks(recipe, tiny.vila()[1])
    callback.on_step_end(SimpleNamespace(world=SimpleNamespace(is_main=True)), {"step": 5})
    assert read_json(folder / "best.json") == {"step": 3, "benchmark": "easy_vqa", "score": 80.0}


def test_a_prompt_that_cannot_be_answered_does_not_stop_the_run(training_files):
    recipe = watched(training_files, "long", f"monitor.prompts=[{{text: {'x' * 600}}}]", "monitor.eval_every_steps=0")
    train(recipe)
    assert all(row["answer"] == "" and "context" in row["error"] for row in rows(recipe.output.dir, "answers"))


@pytest.mark.parametrize(
    ("override", "error", "fields"),
    [
        ("monitor.prompts=[{text: a}, {text: b, image: no.png}]", ConfigError, {"field": "monitor.prompts.1.image"}),
        ("monitor.eval_benchmark=easy_vga", UnknownNameError, {"near": ["easy_vqa"]}),
        ("monitor.eval_data=/nowhere", DataError, {"file": "/nowhere/test/questions.json"}),
    ],
)
def test_invalid_monitor_settings_are_refused_before_training(training_files, override, error, fields):
    with pytest.raises(error) as caught:
        build_callbacks(watched(training_files, "refused", override), tiny.vila()[1])
    assert vars(caught.value).items() >= fields.items()


def test_missing_images_of_a_benchmark_are_an_error_before_training(training_files, tmp_path):
    shutil.copytree(training_files / "easy", tmp_path / "easy")
    (tmp_path / "easy" / "test" / "images" / "1.png").unlink()
    with pytest.raises(ConfigError) as caught:
        build_callbacks(watched(training_files, "gone", f"monitor.eval_data={tmp_path / 'easy'}"), tiny.vila()[1])
    assert caught.value.field == "monitor.eval_data"
    assert caught.value.problem.endswith("1.png")


def test_nothing_is_asked_by_default(training_files):
    assert build_callbacks(tiny_recipe(training_files, "plain"), tiny.vila()[1]) == []


def ranks_train(training_files, watch):
    recipe = watched(training_files, f"ranks-{watch}", "compute.sharding=full", "batch.micro=1")
    train(recipe, watch=watch)
    return sha256_tree(model_dir(recipe), "*.safetensors")


def ranks_train_both(training_files):
    return ranks_train(training_files, True), ranks_train(training_files, False)


def test_sharded_weights_answer_like_full_ones(training_files, whole):
    results = run_ranks(2, ranks_train_both, training_files)
    assert len({digest for pair in results for digest in pair}) == 1
    ranks = training_files / "ranks-True"
    ours, theirs = rows(ranks, "answers"), rows(whole, "answers")
    assert [(row["step"], row["answer"]) for row in ours] == [(row["step"], row["answer"]) for row in theirs]
    ours, theirs = ([(row["step"], row["score"]) for row in rows(folder, "evaluations")] for folder in (ranks, whole))
    assert ours == theirs
