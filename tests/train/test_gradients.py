"""The gradient of a step is that of a plain computation: one conversation at a time, nothing packed or recomputed."""

import json

import pytest
import torch
from torch.nn import functional

from tests.train.ranks import run_ranks
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.chat.templates import find_template
from vila.chat.tokenize import tokenize_sample
from vila.core.types import Image, Message, Sample, Text
from vila.model.loading import load_model
from vila.train.build import build
from vila.train.fsdp import full_tensor

STEP = ("batch.rows=4", "batch.micro=1", "stage.tune=[vision, projector, llm]", "stage.llm_parts=[]")
RECOMPUTED = ("compute.gradient_checkpointing=true", "stage.tune_embeddings=true")


@pytest.fixture(scope="module")
def training_files(tmp_path_factory):
    return write_training_files(tmp_path_factory.mktemp("train"))


def gradients_of_a_step(folder, out, overrides):
    """The loss of the first step, the samples that it saw, and its gradient by parameter, before clipping."""
    run = build(tiny_recipe(folder, out, *STEP, *overrides))
    seen, kept = [], {}
    read, update = run.trainer.data.streams.step, run.trainer.state.optimizer.step

    def keep_rows():
        rows = read()
        seen.extend(sample.id for row in rows for sample in row)
        return rows

    def keep_gradients(factor, norm):
        names = [name for group in run.trainer.state.optimizer.groups for name in group.names]
        gradients = run.trainer.state.optimizer.gradients()
        kept.update({name: full_tensor(value).numpy().copy() for name, value in zip(names, gradients, strict=True)})
        update(factor, norm)

    run.trainer.data.streams.step, run.trainer.state.optimizer.step = keep_rows, keep_gradients
    facts, shares = run.trainer.step()
    return facts["loss"], [one for share in run.world.all_gather_object(seen) for one in share], kept, len(shares)


def conversations(folder, ids):
    """Each as messages of its own: what branches share is repeated in all of them."""
    rows = {row["id"]: row for row in map(json.loads, (folder / "data.jsonl").read_text().splitlines())}
    for sample in ids:
        trunk, *branches = (
            tuple(message(folder, one) for one in messages)
            for messages in [rows[sample]["messages"], *rows[sample].get("branches", [])]
        )
        for messages in Sample(sample, trunk, tuple(branches)).conversations():
            yield Sample(sample, messages)


def message(folder, row):
    content = row["content"]
    parts = (
        [Text(content)] if isinstance(content, str) else [Image((folder / one["path"]).read_bytes()) for one in content]
    )
    return Message(row["role"], tuple(parts))


def plain_gradients(folder, ids):
    """Loss and gradient of the mean cross entropy over all supervised tokens of these samples."""
    model, processor = load_model(folder / "base", dtype="float32")
    model.requires_grad_(True).eval()
    template, spec = find_template("starter_qa"), processor.spec
    total, supervised = 0.0, 0
    for one in conversations(folder, ids):
        tokens = tokenize_sample(one, template, processor.span_tokenizer, lambda medium: spec.tokens_per_image)
        text = torch.from_numpy(tokens.ids).long()
        is_placeholder = torch.from_numpy(tokens.is_placeholder)
        embeds = torch.zeros(len(text), model.config.text_config.hidden_size)
        embeds[~is_placeholder] = model.get_input_embeddings()(text[~is_placeholder])
        if tokens.media:
            pixels = processor.pixels([item for item in tokens.media if isinstance(item, Image)])
            embeds[is_placeholder] = model.projector(model.vision_features(pixels)).flatten(0, 1)
        logits = model.language_model(inputs_embeds=embeds[None], use_cache=False).logits[0]
        labels = torch.from_numpy(tokens.labels)[1:]
        total = total + functional.cross_entropy(logits[:-1], labels, reduction="sum")
        supervised += int((labels != -100).sum())
    (total / supervised).backward()
    return (total / supervised).item(), {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("sharding", ["full", "replicate"])
def test_gradients_equal_a_plain_reference(training_files, sharding):
    results = run_ranks(2, gradients_of_a_step, training_files, sharding, (*RECOMPUTED, f"compute.sharding={sharding}"))
    loss, ids, ours, ranks = results[0]
    assert ranks == 2
    assert len(ids) > 4  # several samples a row, two rows a rank
    assert any(one.startswith("text") for one in ids)
    reference, plain = plain_gradients(training_files, ids)
    assert loss == pytest.approx(reference, rel=1e-6)
    trained = {name for name, value in plain.items() if value is not None}
    assert trained <= ours.keys()
    assert not any(value.any() for name, value in ours.items() if name not in trained)
    largest = max(float(value.abs().max()) for value in plain.values() if value is not None)
    for name in trained:
        apart = float((torch.from_numpy(ours[name]) - plain[name]).abs().max())
        # Worst: 1.6e-6 of a parameter's largest gradient, fp32, torch 2.13; those of key biases are rounding noise.
        assert apart < 1e-5 * max(float(plain[name].abs().max()), 1e-3 * largest), name
