"""Training LoRA adapters: exact resume, sharding, and a directory that loads."""

import os
import signal

import pytest
import torch

from tests.train.finish import on_step
from tests.train.ranks import run_ranks
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.core.errors import Interrupted
from vila.core.files import sha256_tree
from vila.model.loading import load_model
from vila.train.build import build, model_dir
from vila.train.metrics import read_metrics

LORA = ("stage.lora.rank=4", "stage.lora.dropout=0.1", "stage.llm_parts=[]", "batch.rows=4", "budget.tokens=3000")


@pytest.fixture(scope="module")
def training_files(tmp_path_factory):
    return write_training_files(tmp_path_factory.mktemp("train"))


def killed_after(training_files, step, out):
    """Train, and die after a step without a word, as a node that is switched off does."""

    def die(trainer, facts):
        if facts["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    build(tiny_recipe(training_files, out, *LORA, "output.checkpoint_every_steps=1"), callbacks=[on_step(die)]).train()


def test_adapters_with_dropout_resume_bit_for_bit_after_a_kill(training_files):
    through, stopped = (tiny_recipe(training_files, out, *LORA) for out in ("through", "stopped"))
    build(through).train()
    assert run_ranks(1, killed_after, training_files, 4, "stopped") == [-9]
    build(tiny_recipe(training_files, "stopped", *LORA, "output.checkpoint_every_steps=1")).train()
    losses = [[row["loss"] for row in read_metrics(r.output.dir / "metrics.jsonl")] for r in (through, stopped)]
    assert losses[0] == losses[1]
    assert len(losses[0]) > 5
    assert sha256_tree(model_dir(through), "*.safetensors") == sha256_tree(model_dir(stopped), "*.safetensors")


def trained(training_files, out):
    recipe = tiny_recipe(training_files, out, *LORA, "stage.lora.dropout=0")
    build(recipe).train()
    return [row["loss"] for row in read_metrics(recipe.output.dir / "metrics.jsonl")]


def test_two_ranks_train_the_adapters_of_one(training_files):
    assert run_ranks(2, trained, training_files, "two")[0] == pytest.approx(trained(training_files, "one"), rel=1e-6)
    ours, theirs = (load_model(training_files / out / "model", dtype="float32")[0] for out in ("two", "one"))
    for name, weight in ours.state_dict().items():
        assert torch.allclose(weight, theirs.state_dict()[name], atol=1e-5), name


def test_only_adapters_and_projector_are_trained(training_files):
    recipe = tiny_recipe(training_files, "learns", *LORA, "budget.tokens=600")
    run = build(recipe)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train()
    changed = {n for n, value in run.model.state_dict().items() if not torch.equal(value, before[n].to(value.dtype))}
    assert all(".lora_" in name or name.startswith("projector.") for name in changed)
    assert any(".lora_B." in name for name in changed) and any(name.startswith("projector.") for name in changed)


def test_a_stop_leaves_nothing_but_a_checkpoint(training_files):
    def stop(trainer, facts):
        if facts["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    recipe = tiny_recipe(training_files, "stop", *LORA)
    with pytest.raises(Interrupted):
        build(recipe, callbacks=[on_step(stop)]).train()
    assert not model_dir(recipe).exists()
    tensors = build(recipe).trainer.checkpointer.writer.folder / "step-00000002"
    assert tensors.is_dir()
