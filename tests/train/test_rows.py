"""The data of a run: workers change nothing, image modes arrive, faults and shares are written down."""

import json

import pytest

from tests.train.stand import stand_recipe, write_stand
from tests.train.test_run import stop_after
from vila.core.errors import ConfigError, Interrupted, MediaError
from vila.core.files import sha256_tree
from vila.train.build import build, model_dir
from vila.train.data_stream import worker_count
from vila.train.metrics_log import read_metrics


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    return write_stand(tmp_path_factory.mktemp("stand"))


def test_workers_do_not_change_a_run_and_may_differ_after_a_stop(stand):
    alone = stand_recipe(stand, "alone", "budget.tokens=1000")
    build(alone).train()
    first = stand_recipe(stand, "workers", "budget.tokens=1000", "compute.workers=2")
    run = build(first, callbacks=[stop_after(3)])
    with pytest.raises(Interrupted):
        run.train()
    assert not run.trainer.data.streams._workers
    build(stand_recipe(stand, "workers", "budget.tokens=1000", "compute.workers=1")).train()
    assert sha256_tree(model_dir(first), "*.safetensors") == sha256_tree(model_dir(alone), "*.safetensors")
    ours, theirs = (read_metrics(recipe.output.dir / "metrics.jsonl") for recipe in (first, alone))
    keys = ("loss", "grad_norm", "tokens_by_data_set", "dropped")
    assert [[row[key] for key in keys] for row in ours] == [[row[key] for key in keys] for row in theirs]


def test_metrics_tell_the_tokens_of_every_data_set(stand):
    path = stand / "data.jsonl"
    mixture = f"data.mixture=[{{format: messages, path: {path}}}, {{format: messages, path: {path}, repeat: 0.5}}]"
    recipe = stand_recipe(stand, "shares", mixture, "budget.epochs=1", "budget.tokens=0")
    build(recipe).train()
    rows = read_metrics(recipe.output.dir / "metrics.jsonl")
    assert all(sum(row["tokens_by_data_set"].values()) == row["tokens"] for row in rows)
    seen = {name: sum(row["tokens_by_data_set"].get(name, 0) for row in rows) for name in ("data", "data#2")}
    assert 1.4 < seen["data"] / seen["data#2"] < 2.9


def test_an_image_mode_of_a_data_set_needs_pixels_and_not_a_cache(stand):
    changed = ("data.mixture.0.image_mode=resize", "compute.feature_cache=true")
    with pytest.raises(ConfigError) as caught:
        build(stand_recipe(stand, "mode", *changed))
    assert (caught.value.field, caught.value.value) == ("data.mixture.0.image_mode", "resize")


def test_a_run_goes_on_with_a_larger_fault_budget_after_it_was_exceeded(tmp_path):
    stand = write_stand(tmp_path)
    (stand / "4.png").write_bytes(b"broken")
    options = ("budget.tokens=1500", "output.checkpoint_every_steps=1")
    with pytest.raises(MediaError) as caught:
        build(stand_recipe(stand, "faults", *options)).train()
    assert "4.png" in str(caught.value)
    # Three epochs and a stop in the second one: 4.png is one sample.
    options = ("budget.tokens=0", "budget.epochs=3", "output.checkpoint_every_steps=1", "data.max_faults=1")
    recipe = stand_recipe(stand, "faults", *options)
    with pytest.raises(Interrupted):
        build(recipe, callbacks=[stop_after(5)]).train()
    build(recipe).train()
    (line,) = (json.loads(line) for line in (recipe.output.dir / "faults.jsonl").read_text().splitlines())
    assert "4.png" in line["reason"] and "not an image" in line["reason"]
    assert (line["file"], line["record"]) == (str(stand / "data.jsonl"), 4)
    assert sum(row["faults"] for row in read_metrics(recipe.output.dir / "metrics.jsonl")) == 1


def test_cached_features_need_no_workers(stand):
    assert worker_count(stand_recipe(stand, "a", "compute.workers=-1", "compute.feature_cache=true")) == 0
    assert 1 <= worker_count(stand_recipe(stand, "a", "compute.workers=-1")) <= 4
    assert worker_count(stand_recipe(stand, "a", "compute.workers=7")) == 7


def test_a_global_batch_that_does_not_fit_the_ranks_is_refused(stand):
    from vila.data.dataset import DatasetEntry, open_mixture
    from vila.train.data_stream import build_streams

    recipe = stand_recipe(stand, "ranks", "batch.rows=4")
    mixture = open_mixture([DatasetEntry("messages", str(stand / "data.jsonl"))], 0)
    with pytest.raises(ConfigError) as caught:
        build_streams(recipe, None, mixture, None, world_size=3)
    assert (caught.value.field, caught.value.value, caught.value.expected) == ("batch", 4, "3 or 6")
