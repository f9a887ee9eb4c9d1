"""Several ranks train the same losses and weights as one process, with any sharding."""

import os
import time

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.train.finish import on_step
from tests.train.ranks import run_ranks
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.core.errors import ConfigError, Interrupted, TrainingError, VilaError
from vila.core.reading import read_json
from vila.core.system import ProcessInfo
from vila.train.build import build, model_dir
from vila.train.fsdp import _mesh, open_world
from vila.train.metrics import read_metrics
from vila.train.train_state import gather_full_tensors

ROWS = ("batch.rows=4", "budget.tokens=1600")
# One sample per sequence: ranks with no image in a step, and with unequal numbers of supervised tokens.
SAMPLES = ("data.packing=none", "batch.rows=0", "batch.samples=4", "budget.tokens=900")


@pytest.fixture(scope="module")
def training_files(tmp_path_factory):
    return write_training_files(tmp_path_factory.mktemp("train"))


def train(training_files, out, *overrides):
    """Train to the end; the losses, the float32 weights, and facts of this rank."""
    run = build(tiny_recipe(training_files, out, *overrides))
    sharded = [p for p in run.model.parameters() if isinstance(p, DTensor)]
    facts = {
        "sharded": len(sharded),
        "all": len(list(run.model.parameters())),
        "bytes": sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in run.model.parameters()),
        "tower_blocks": sum(p.numel() for p in run.model.vision_tower.parameters()),
    }
    run.trainer.run()
    run.trainer.checkpointer.writer.wait()
    weights = gather_full_tensors(run.model, torch.float32, run.world)
    rows = read_metrics(run.folder / "metrics.jsonl") if run.world.is_main else []
    run.world.all_gather_object(None)
    return rows, {name: value.numpy() for name, value in (weights or {}).items()}, facts


@pytest.fixture(scope="module")
def alone(training_files):
    """The runs of one process that others are compared with, by name."""
    return {
        "rows": train(training_files, "alone-rows", *ROWS),
        "samples": train(training_files, "alone-samples", *SAMPLES, "stage.tune=[vision, projector, llm]"),
    }


def assert_same(ours, theirs):
    rows, weights, _ = ours
    others, reference, _ = theirs
    assert len(rows) == len(others) > 3
    for row, other in zip(rows, others, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert {k: row[k] for k in ("step", "tokens", "supervised", "images", "tokens_by_data_set")} == {
            k: other[k] for k in ("step", "tokens", "supervised", "images", "tokens_by_data_set")
        }
    assert weights.keys() == reference.keys()
    apart = {name: float(abs(weights[name] - reference[name]).max()) for name in weights}
    # A bias of the keys moves all scores of a query alike: its gradient is rounding noise, which Adam scales up.
    assert {name: value for name, value in apart.items() if value > 1e-5 and not name.endswith("k_proj.bias")} == {}


@pytest.mark.parametrize("micro", [2, 4])
def test_accumulation_does_not_change_the_run(training_files, alone, micro):
    assert_same(train(training_files, f"micro-{micro}", *ROWS, f"batch.micro={micro}"), alone["rows"])


@pytest.mark.parametrize(("world", "micro", "sharding"), [(2, 1, "full"), (2, 2, "replicate"), (4, 1, "full")])
def test_ranks_train_the_same_model_as_one_process(training_files, alone, world, micro, sharding):
    out = f"world-{world}-{sharding}"
    options = (*ROWS, f"batch.micro={micro}", f"compute.sharding={sharding}")
    results = run_ranks(world, train, training_files, out, *options)
    assert_same(results[0], alone["rows"])
    if sharding == "full":
        shares = [facts["bytes"] for _, _, facts in results]
        assert all(facts["sharded"] == facts["all"] for _, _, facts in results)
        # Sharded along the first dimension, which ranks cannot always share evenly.
        assert max(shares) < 1.15 * alone["rows"][2]["bytes"] / world


def test_two_nodes_that_hold_the_weights_each_train_the_same_model(training_files, alone):
    results = run_ranks(4, train, training_files, "hybrid", *ROWS, "compute.sharding=hybrid", nodes=2)
    assert_same(results[0], alone["rows"])
    shares = [facts["bytes"] for _, _, facts in results]
    # Sharded over the two of a node, not among all four.
    assert shares[0] + shares[1] == shares[2] + shares[3] == pytest.approx(alone["rows"][2]["bytes"], rel=0.01)


def test_nodes_that_stop_resume_in_another_layout(training_files, alone):
    options = (*ROWS, "compute.sharding=hybrid")
    assert run_ranks(4, stopped_after, training_files, 2, "hybrid-stopped", *options, nodes=2) == [0] * 4
    assert_same(train(training_files, "hybrid-stopped", *ROWS), alone["rows"])


def test_weights_that_stay_gathered_give_the_same(training_files, alone):
    options = (*ROWS, "compute.reshard=false", "compute.gradient_checkpointing=true", "compute.checkpoint_every=2")
    assert_same(run_ranks(2, train, training_files, "gathered", *options)[0], alone["rows"])


def test_ranks_that_do_not_fill_nodes_are_refused():
    with pytest.raises(ConfigError) as caught:
        _mesh(ProcessInfo(0, 6, 0, 4), "cpu", "hybrid")
    assert (caught.value.field, caught.value.value) == ("compute.sharding", "hybrid")


def test_a_rank_that_lacks_the_address_of_the_others_is_refused(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConfigError) as caught:
        open_world()
    assert caught.value.field == "MASTER_ADDR"


def test_ranks_without_images_take_part_and_change_nothing(training_files, alone):
    options = (*SAMPLES, "stage.tune=[vision, projector, llm]", "compute.gradient_checkpointing=true")
    results = run_ranks(2, train, training_files, "idle", *options)
    assert_same(results[0], alone["samples"])
    assert any(0 < row["images"] < 4 for row in results[0][0])


@pytest.mark.parametrize("tune", ["[projector]", "[projector, llm]"])
def test_ranks_without_images_take_part_in_every_stage(training_files, tune):
    options = (*SAMPLES, f"stage.tune={tune}", "stage.llm_parts=[]", "stage.tune_embeddings=true")
    results = run_ranks(2, train, training_files, f"idle-{tune}", *options)
    assert_same(results[0], train(training_files, f"idle-alone-{tune}", *options))


def stopped_after(training_files, step, out, *overrides):
    """Train, and stop every rank after a step as a batch system does."""

    def stop(trainer, facts):
        if facts["step"] == step and trainer.world.is_main:
            os.kill(os.getpid(), 15)

    try:
        build(tiny_recipe(training_files, out, *overrides), callbacks=[on_step(stop)]).train()
    except Interrupted as error:
        return error.exit_code
    return None


def test_another_number_of_ranks_resumes_with_the_same_samples(training_files, alone):
    codes = run_ranks(2, stopped_after, training_files, 2, "resharded", *ROWS)
    assert codes == [0, 0]
    halted = read_metrics(training_files / "resharded" / "metrics.jsonl")
    assert len(halted) in (2, 3)
    assert run_ranks(4, stopped_after, training_files, len(halted) + 1, "resharded", *ROWS) == [0, 0, 0, 0]
    assert_same(train(training_files, "resharded", *ROWS), alone["rows"])


def bfloat16_losses(training_files, out):
    recipe = tiny_recipe(training_files, out, *ROWS, "compute.dtype=bfloat16")
    run = build(recipe)
    types = {(p.dtype, p.requires_grad) for p in run.model.parameters()}
    run.train()
    return types, read_metrics(recipe.output.dir / "metrics.jsonl"), model_dir(recipe).is_dir()


def test_ranks_compute_in_bfloat16_on_float32_masters(training_files, alone):
    types, rows, written = run_ranks(2, bfloat16_losses, training_files, "bf16")[0]
    assert types == {(torch.float32, True), (torch.bfloat16, False)}
    assert written
    for row, other in zip(rows, alone["rows"][0], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=0.02)


def dies(training_files, out, step):
    def die(trainer, facts):
        if facts["step"] == step and not trainer.world.is_main:
            os._exit(9)

    build(tiny_recipe(training_files, out, *ROWS), callbacks=[on_step(die)]).train()


def test_if_a_rank_dies_the_others_stop_with_an_error(training_files):
    began = time.monotonic()
    error, code = run_ranks(2, dies, training_files, "dead", 2)
    assert isinstance(error, TrainingError)
    assert error.__cause__ is None or isinstance(error.__cause__, RuntimeError)
    assert code == 9
    assert time.monotonic() - began < 60


def test_a_sample_that_one_rank_cannot_read_stops_all_with_its_name(training_files, tmp_path):
    good = (training_files / "data.jsonl").read_text().splitlines()[2]
    bad = '{"id": "broken", "messages": [{"role": "user", "content": "?"}]}'
    (tmp_path / "data.jsonl").write_text("\n".join([good] * 7 + [bad]) + "\n")
    options = (*SAMPLES, f"data.mixture=[{{format: messages, path: {tmp_path / 'data.jsonl'}}}]", "budget.tokens=9000")
    errors = run_ranks(2, train, training_files, "unreadable", *options)
    assert all(isinstance(error, VilaError) and "broken" in str(error.record) for error in errors)
    assert sorted(error.rank is None for error in errors) == [False, True]
    assert [error.is_repeated for error in errors] == [False, True]


def test_a_batch_that_does_not_divide_is_refused_with_what_would(training_files):
    error, _ = run_ranks(2, train, training_files, "uneven", "batch.rows=3")
    assert isinstance(error, ConfigError)
    assert (error.field, error.value, error.expected) == ("batch", 3, "2 or 4")


def finished(training_files, out, *overrides):
    """Train to the end; return the metrics of the run."""
    recipe = tiny_recipe(training_files, out, *overrides)
    build(recipe).train()
    return read_json(recipe.output.dir / "finished.json")


def test_what_was_dropped_is_counted_over_all_ranks(training_files):
    options = (*SAMPLES, "data.max_length=22", "data.overlong=drop")
    alone, two = (
        finished(training_files, "drop-1", *options),
        run_ranks(2, finished, training_files, "drop-2", *options)[0],
    )
    assert alone["dropped"] == two["dropped"] > 0
