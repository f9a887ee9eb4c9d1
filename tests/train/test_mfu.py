"""MFU of a step equals the value computed from its metrics."""

import pytest

from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.plan.flops import TrainableParts, causal_pairs, step_flops
from vila.plan.model_shape import shape_of
from vila.train.build import build
from vila.train.metrics import read_metrics


@pytest.fixture(scope="module")
def training_files(tmp_path_factory):
    return write_training_files(tmp_path_factory.mktemp("train"))


def test_the_share_is_that_of_the_facts_of_the_step(training_files):
    run = build(tiny_recipe(training_files, "mfu", "monitor.peak_tflops=0.5", "budget.tokens=600"))
    run.train()
    shape, trainable = shape_of(run.model.config), TrainableParts.of(run.recipe.stage)
    for row in read_metrics(run.folder / "metrics.jsonl"):
        needed = step_flops(shape, trainable, **{k: row[k] for k in ("tokens", "pairs", "supervised", "images")}).total
        assert row["mfu"] == pytest.approx(needed / (row["tokens"] / row["tokens_per_second"] * 0.5e12), rel=1e-6)


def test_pairs_are_those_of_the_samples(training_files):
    run = build(
        tiny_recipe(
            training_files, "pairs", "data.packing=none", "batch.rows=0", "batch.samples=2", "budget.tokens=300"
        )
    )
    seen = []
    streams = run.trainer.data.streams
    step = streams.step
    streams.step = lambda: seen.append(step()) or seen[-1]
    run.train()
    text = [len(row[0]) for rows in seen for row in rows if row[0].id.startswith("text")]
    assert text
    first = read_metrics(run.folder / "metrics.jsonl")[0]
    alone = [row for row in seen[0] if row[0].id.startswith("text")]
    assert first["pairs"] >= causal_pairs(len(row[0]) for row in alone)


def test_without_a_known_peak_there_is_no_share(training_files):
    run = build(tiny_recipe(training_files, "unknown", "budget.tokens=100"))
    run.train()
    assert all("mfu" not in row for row in read_metrics(run.folder / "metrics.jsonl"))
