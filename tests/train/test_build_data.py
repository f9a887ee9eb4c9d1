"""Data of a run: workers change nothing, image modes apply, bad samples and data sets are logged."""

import json

import pytest

from tests.train.test_build import stop_after
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.core.errors import ConfigError, Interrupted, MediaError
from vila.core.files import sha256_tree
from vila.train.build import build, model_dir
from vila.train.build_data import worker_count
from vila.train.metrics import read_metrics


@pytest.fixture(scope="module")
def training_files(tmp_path_factory):
    return write_training_files(tmp_path_factory.mktemp("train"))


def test_workers_do_not_change_a_run_and_may_differ_after_a_stop(training_files):
    alone = tiny_recipe(training_files, "alone", "budget.tokens=1000")
    build(alone).train()
    first = tiny_recipe(training_files, "workers", "budget.tokens=1000", "compute.workers=2")
    run = build(first, callbacks=[stop_after(3)])
    with pytest.raises(Interrupted):
        run.train()
    assert not run.trainer.data.streams._workers
    build(tiny_recipe(training_files, "workers", "budget.tokens=1000", "compute.workers=1")).train()
    assert sha256_tree(model_dir(first), "*.safetensors") == sha256_tree(model_dir(alone), "*.safetensors")
    ours, theirs = (read_metrics(recipe.output.dir / "metrics.jsonl") for recipe in (first, alone))
    keys = ("loss", "grad_norm", "tokens_by_data_set", "dropped")
    assert [[row[key] for key in keys] for row in ours] == [[row[key] for key in keys] for row in theirs]


def test_metrics_have_the_tokens_of_every_data_set(training_files):
    path = training_files / "data.jsonl"
    mixture = f"data.mixture=[{{format: messages, path: {path}}}, {{format: messages, path: {path}, repeat: 0.5}}]"
    recipe = tiny_recipe(training_files, "shares", mixture, "budget.epochs=1", "budget.tokens=0")
    build(recipe).train()
    rows = read_metrics(recipe.output.dir / "metrics.jsonl")
    assert all(sum(row["tokens_by_data_set"].values()) == row["tokens"] for row in rows)
    seen = {name: sum(row["tokens_by_data_set"].get(name, 0) for row in rows) for name in ("data", "data#2")}
    assert 1.4 < seen["data"] / seen["data#2"] < 2.9


def test_an_image_mode_of_a_data_set_needs_pixels_and_not_a_cache(training_files):
    changed = ("data.mixture.0.image_mode=resize", "compute.feature_cache=true")
    with pytest.raises(ConfigError) as caught:
        build(tiny_recipe(training_files, "mode", *changed))
    assert (caught.value.field, caught.value.value) == ("data.mixture.0.image_mode", "resize")


def test_a_run_resumes_with_a_larger_budget_of_bad_samples_after_it_was_exceeded(tmp_path):
    training_files = write_training_files(tmp_path)
    (training_files / "4.png").write_bytes(b"broken")
    options = ("budget.tokens=1500", "output.checkpoint_every_steps=1")
    with pytest.raises(MediaError) as caught:
        build(tiny_recipe(training_files, "faults", *options)).train()
    assert caught.value.file == str(training_files / "4.png")
    # Three epochs and a stop in the second one: 4.png is one sample.
    options = ("budget.tokens=0", "budget.epochs=3", "output.checkpoint_every_steps=1", "data.max_faults=1")
    recipe = tiny_recipe(training_files, "faults", *options)
    with pytest.raises(Interrupted):
        build(recipe, callbacks=[stop_after(5)]).train()
    build(recipe).train()
    (line,) = (json.loads(line) for line in (recipe.output.dir / "faults.jsonl").read_text().splitlines())
    assert str(training_files / "4.png") in line["reason"]
    assert (line["file"], line["record"]) == (str(training_files / "data.jsonl"), 4)
    assert sum(row["faults"] for row in read_metrics(recipe.output.dir / "metrics.jsonl")) == 1


def test_cached_features_need_no_workers(training_files):
    assert worker_count(tiny_recipe(training_files, "a", "compute.workers=-1", "compute.feature_cache=true")) == 0
    assert 1 <= worker_count(tiny_recipe(training_files, "a", "compute.workers=-1")) <= 4
    assert worker_count(tiny_recipe(training_files, "a", "compute.workers=7")) == 7


def test_a_global_batch_that_does_not_fit_the_ranks_is_refused(training_files):
    from vila.data.dataset import DatasetEntry, open_mixture
    from vila.train.build_data import build_streams

    recipe = tiny_recipe(training_files, "ranks", "batch.rows=4")
    mixture = open_mixture([DatasetEntry("messages", str(training_files / "data.jsonl"))], 0)
    with pytest.raises(ConfigError) as caught:
        build_streams(recipe, None, mixture, None, world_size=3)
    assert (caught.value.field, caught.value.value, caught.value.expected) == ("batch", 4, "3 or 6")
