"""Gradient checkpointing and compiled blocks change neither losses nor weights."""

import functools

import pytest
import torch

from tests.train.finish import finish
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.train.build import build
from vila.train.fsdp import decoder_blocks, tower_blocks

STAGES = {
    "1": ("stage.tune=[projector]", "stage.llm_parts=[]"),
    "3": ("stage.tune=[vision, projector, llm]", "stage.llm_parts=[]", "stage.tune_embeddings=true"),
}
SHORT = ("budget.tokens=600", "compute.gradient_checkpointing=false")


@pytest.fixture(scope="module")
def training_files(tmp_path_factory):
    return write_training_files(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def plain(training_files):
    """Losses and weights of each stage, nothing recomputed or compiled."""
    return {stage: finish(training_files, f"plain-{stage}", (*SHORT, *changes)) for stage, changes in STAGES.items()}


def assert_same(ours, theirs, rel):
    rows, weights = ours
    others, reference = theirs
    assert len(rows) == len(others) > 3
    for row, other in zip(rows, others, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=rel)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * rel)
    for name, value in weights.items():
        if name.endswith("k_proj.bias"):
            continue  # A softmax does not see it: its gradient is rounding noise, which Adam scales up.
        assert abs(value - reference[name]).max() < 1e-5, name


def count_passes(block, counts, name):
    inner = next(block.children())
    inner.register_forward_pre_hook(lambda module, inputs: counts.update({name: counts.get(name, 0) + 1}))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_give_the_same_and_frozen_ones_are_recomputed_too(training_files, plain, stage, every):
    counts = {}

    def watch(run):
        for kind, blocks in (("llm", decoder_blocks(run.model)), ("vision", tower_blocks(run.model))):
            for number, block in enumerate(blocks):
                count_passes(block, counts, f"{kind} {number}")

    options = (*SHORT, *STAGES[stage], "compute.gradient_checkpointing=true", f"compute.checkpoint_every={every}")
    ours = finish(training_files, f"recomputed-{stage}-{every}", options, watch)
    assert_same(ours, plain[stage], 1e-6)
    steps = len(ours[0])
    micro = 2 * steps  # two rows a step, one at a time
    assert {name: counts[name] for name in ("llm 0", "llm 1")} == {"llm 0": 2 * micro, "llm 1": (2 // every) * micro}
    shown = counts["vision 1"] // (2 // every if stage == "3" else 1)
    assert counts["vision 0"] == (2 * shown if stage == "3" else shown)


def test_recomputing_keeps_dropout_of_frozen_parts_off(training_files):
    run = build(tiny_recipe(training_files, "modes", *STAGES["1"], "compute.gradient_checkpointing=true"))
    for block in decoder_blocks(run.model):
        assert block.training
        assert not any(module.training for module in block.modules() if module is not block)


def test_compiled_blocks_give_the_same(training_files, plain, monkeypatch):
    graphs = []

    def run_as_it_is(graph, inputs):
        """A backend that needs no compiler: what was taken apart is put together again."""
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=run_as_it_is))
    ours = finish(training_files, "compiled", (*SHORT, *STAGES["3"], "compute.compile=true"))
    assert_same(ours, plain["3"], 1e-5)
    assert graphs


@pytest.mark.slow
def test_blocks_that_are_compiled_to_machine_code_give_the_same(training_files, plain):
    ours = finish(training_files, "machine-code", (*SHORT, *STAGES["3"], "compute.compile=true"))
    assert_same(ours, plain["3"], 1e-5)
