"""Training runs: trainable modules, exact resume, and errors."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.train.finish import on_step
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.core.errors import CheckpointError, DataError, Interrupted, RunChangedError, TrainingError
from vila.core.files import sha256_tree
from vila.train.build import build, is_finished, model_dir
from vila.train.metrics import read_metrics
from vila.train.report import write_report


@pytest.fixture(scope="module")
def training_files(tmp_path_factory):
    return write_training_files(tmp_path_factory.mktemp("train"))


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def stop_after(step):
    """A listener that asks the process to stop, as Ctrl-C does."""

    def listen(trainer, facts):
        if facts["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step(listen)


@pytest.fixture(scope="module")
def whole(training_files):
    recipe = tiny_recipe(training_files, "whole")
    build(recipe).train()
    return recipe


def test_the_loss_falls_and_the_model_is_written(whole):
    rows = read_metrics(whole.output.dir / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"]
    assert rows[-1]["tokens_seen"] >= whole.budget.tokens > rows[-2]["tokens_seen"]
    assert is_finished(whole)
    written = (whole.output.dir / "report.html").read_text()
    assert write_report(whole.output.dir).read_text() == written  # that of the finished run
    assert not (whole.output.dir / "checkpoint").exists()
    assert {f.name for f in model_dir(whole).iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stopped_run_resumes_bit_for_bit(training_files, dtype):
    through = tiny_recipe(training_files, f"through-{dtype}", f"compute.dtype={dtype}")
    build(through).train()
    stopped = tiny_recipe(training_files, f"stopped-{dtype}", f"compute.dtype={dtype}")
    for step in (2, 5):
        with pytest.raises(Interrupted) as caught:
            build(stopped, callbacks=[stop_after(step)]).train()
        assert caught.value.record == f"step {step}"
    build(stopped).train()
    assert sha256_tree(model_dir(stopped), "*.safetensors") == sha256_tree(model_dir(through), "*.safetensors")
    ours, theirs = (read_metrics(r.output.dir / "metrics.jsonl") for r in (stopped, through))
    keys = ("step", "tokens_seen", "loss", "grad_norm", "lr")
    assert [[row[k] for k in keys] for row in ours] == [[row[k] for k in keys] for row in theirs]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_split_into_micro_batches_does_not_change_the_run(training_files, micro):
    recipe = tiny_recipe(training_files, f"micro-{micro}", "batch.rows=4", f"batch.micro={micro}")
    build(recipe).train()
    one = read_metrics(recipe.output.dir / "metrics.jsonl")
    reference = tiny_recipe(training_files, "micro-ref", "batch.rows=4", "batch.micro=1")
    if not is_finished(reference):
        build(reference).train()
    for row, other in zip(one, read_metrics(reference.output.dir / "metrics.jsonl"), strict=True):
        # Worst of these runs: 2.4e-7 relative, fp32, torch 2.13.
        assert row["loss"] == pytest.approx(other["loss"], rel=2e-6)


@pytest.mark.parametrize(
    ("tune", "learns"),
    [
        ("[projector]", {"projector"}),
        ("[projector, llm]", {"projector", "language_model"}),
        ("[vision]", {"vision_tower"}),
    ],
)
def test_each_stage_changes_its_trainable_modules_and_nothing_else(training_files, tune, learns):
    recipe = tiny_recipe(
        training_files,
        f"tune-{tune}",
        f"stage.tune={tune}",
        "stage.tune_embeddings=true",
        "stage.llm_parts=[]",
        "budget.tokens=300",
    )
    build(recipe).train()
    # The written model is rounded to bfloat16, so the reference is too.
    before, after = load_file(training_files / "base" / "model.safetensors"), weights(recipe.output.dir)
    changed = {n.split(".")[0] for n in after if not torch.equal(after[n], before[n].to(torch.bfloat16))}
    assert changed == learns


def test_frozen_embeddings_stay(training_files):
    changes = ("stage.tune=[llm]", "stage.llm_parts=[]", "stage.tune_embeddings=false", "budget.tokens=300")
    recipe = tiny_recipe(training_files, "embeddings", *changes)
    build(recipe).train()
    name = "language_model.model.embed_tokens.weight"
    before = load_file(training_files / "base" / "model.safetensors")[name]
    assert torch.equal(weights(recipe.output.dir)[name], before.to(torch.bfloat16))


def test_only_the_named_parts_of_the_llm_are_trained(training_files):
    recipe = tiny_recipe(
        training_files, "parts", "stage.tune=[llm]", "stage.llm_parts=[self_attn]", "budget.tokens=300"
    )
    build(recipe).train()
    before, after = load_file(training_files / "base" / "model.safetensors"), weights(recipe.output.dir)
    changed = {n for n in after if not torch.equal(after[n], before[n].to(torch.bfloat16))}
    assert changed == {n for n in after if ".self_attn." in n}


def test_cached_features_give_the_same_training(training_files, monkeypatch, tmp_path, whole):
    monkeypatch.setenv("VILA_CACHE", str(tmp_path))
    recipe = tiny_recipe(training_files, "cached", "compute.feature_cache=true")
    build(recipe).train()
    for row, other in zip(*(read_metrics(r.output.dir / "metrics.jsonl") for r in (recipe, whole)), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_rows_are_full(whole):
    rows = read_metrics(whole.output.dir / "metrics.jsonl")
    assert min(row["fill"] for row in rows) > 0.8


def test_a_changed_recipe_is_refused_with_the_difference(training_files):
    recipe = tiny_recipe(training_files, "changed")
    with pytest.raises(Interrupted):
        build(recipe, callbacks=[stop_after(1)]).train()
    with pytest.raises(RunChangedError) as caught:
        build(tiny_recipe(training_files, "changed", "stage.lr=0.001"))
    assert caught.value.differences == [("stage.lr", "0.005", "0.001")]


def test_a_damaged_checkpoint_is_named_with_the_remedy(training_files):
    recipe = tiny_recipe(training_files, "damaged")
    with pytest.raises(Interrupted):
        build(recipe, callbacks=[stop_after(1)]).train()
    file = next((recipe.output.dir / "checkpoint").glob("*/*.distcp"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError) as caught:
        build(recipe)
    assert caught.value.file == str(file)


def test_a_kill_during_a_save_leaves_the_checkpoint_before_it(training_files, monkeypatch):
    import vila.train.checkpoint as checkpoint

    recipe = tiny_recipe(training_files, "killed", "output.checkpoint_every_steps=2", "output.async_save=false")
    real = checkpoint.write_json

    def die(path, value):
        if path.name == "state.json" and value["progress"]["step"] == 4:
            raise KeyboardInterrupt
        real(path, value)

    monkeypatch.setattr(checkpoint, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        build(recipe).train()
    monkeypatch.undo()
    assert [f.name for f in (recipe.output.dir / "checkpoint").iterdir()] == ["step-00000002"]
    assert build(recipe).trainer.progress.step == 2


def test_a_loss_that_is_not_finite_stops_with_the_ids(training_files):
    run = build(tiny_recipe(training_files, "nan"))
    with torch.no_grad():
        run.model.projector[0].weight.fill_(float("nan"))
    with pytest.raises(TrainingError) as caught:
        run.train()
    assert (caught.value.record, caught.value.field) == ("step 1", "loss")
    assert any(f"'{kind}{number}'" in caught.value.problem for kind in ("image", "text") for number in range(24))


def test_an_unreadable_sample_is_an_error_with_data_set_file_and_record(training_files, tmp_path):
    (tmp_path / "bad.jsonl").write_text(2 * (json.dumps({"messages": [{"role": "user", "content": "?"}]}) + "\n"))
    recipe = tiny_recipe(training_files, "bad", f"data.mixture=[{{format: messages, path: {tmp_path / 'bad.jsonl'}}}]")
    with pytest.raises(DataError) as caught:
        build(recipe).train()
    assert caught.value.record in ("data set 'bad', sample 'bad/0'", "data set 'bad', sample 'bad/1'")
    assert (caught.value.field, caught.value.expected) == ("messages[0]", "assistant")


def test_unfinished_lines_of_the_metrics_are_cut_on_resume(training_files):
    recipe = tiny_recipe(training_files, "metrics")
    with pytest.raises(Interrupted):
        build(recipe, callbacks=[stop_after(3)]).train()
    path = recipe.output.dir / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "loss": 1}\n{"step": 5, "lo')
    build(recipe)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
