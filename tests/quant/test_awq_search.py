"""The AWQ search equals an independent brute-force script; invariances of its result."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.quant import brute_force
from tests.quant.models import logits, loud, random_rows
from vila.core.errors import CheckpointError, ConfigError, DataError, LayoutError
from vila.quant.apply import apply_search
from vila.quant.awq_cache import load_search, save_search
from vila.quant.awq_search import search_model
from vila.quant.calibration import Calibration, CalibrationSequence
from vila.quant.quant_config import QuantConfig

CASES = {
    "one key head per query head": ("llama", {"num_key_value_heads": 4}),
    "grouped key heads": ("llama", {}),
    "biases": ("qwen2", {"num_key_value_heads": 4}),
    "a sliding window": ("mistral", {"num_key_value_heads": 4}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [250, 550])
def test_a_block_is_searched_as_brute_force_does_it(case, length):
    family, changes = CASES[case]
    model, _ = loud(family, **changes)
    rows = random_rows(2, length)
    found = search_model(model, rows, QuantConfig(group_size=16, dtype=torch.float64))
    config = model.config.text_config
    block = model.get_decoder().layers[0]
    embedded = model.get_input_embeddings()(torch.tensor([row.ids for row in rows.sequences])).detach().numpy()
    scales, losses, limits, _ = brute_force.search(
        embedded,
        {name: value.numpy() for name, value in block.state_dict().items()},
        16,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        theta=config.rope_parameters["rope_theta"],
        window=getattr(config, "sliding_window", None) if family == "mistral" else None,
    )
    assert [scale.fold for scale in found.scales] == [f"model.layers.0.{fold}" for fold in scales]
    for scale in found.scales:
        fold = scale.fold.removeprefix("model.layers.0.")
        np.testing.assert_allclose(scale.metadata["losses"], losses[fold], rtol=1e-5)
        np.testing.assert_allclose(scale.scale_I.numpy(), scales[fold], rtol=1e-5)
    assert {clip.linear for clip in found.clips} == {f"model.layers.0.{name}" for name in limits}
    # A group cut on both sides has its zero at 7.5 exactly: the last digit of a scale decides where it goes, and
    # transformers computes norms and rotations in float32. On the same input all limits are equal: test_awq_clip.py.
    same = [
        np.isclose(clip.limit_OG, limits[clip.linear.removeprefix("model.layers.0.")], rtol=1e-5).mean()
        for clip in found.clips
    ]
    assert min(same) >= 0.95


@pytest.mark.parametrize("num_key_value_heads", [4, 2])
def test_the_search_in_float32_finds_what_it_finds_in_float64(num_key_value_heads):
    model, _ = loud(layers=2, num_key_value_heads=num_key_value_heads)
    wide, narrow = (
        search_model(model, random_rows(2, 300), QuantConfig(group_size=16, dtype=dtype))
        for dtype in (torch.float64, torch.float32)
    )
    for one, other in zip(wide.scales, narrow.scales, strict=True):
        assert (one.fold, one.metadata["ratio"]) == (other.fold, other.metadata["ratio"])
        torch.testing.assert_close(one.scale_I, other.scale_I, rtol=1e-5, atol=0)
    same = [torch.isclose(a.limit_OG, b.limit_OG, rtol=1e-4) for a, b in zip(wide.clips, narrow.clips, strict=True)]
    # A group cut on both sides has its zero at 7.5 exactly, and the last digit of its scale decides: 0.986 measured.
    assert torch.cat([one.flatten() for one in same]).float().mean() > 0.97


def test_the_model_is_not_changed_and_every_block_is_searched_on_unrounded_activations():
    model, _ = loud(layers=2)
    before = copy.deepcopy(model.state_dict())
    rows = random_rows()
    found = search_model(model, rows, QuantConfig(group_size=16))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    first = search_model(model, rows, QuantConfig(group_size=16))
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.down_proj.weight.mul_(1.5)
    second = search_model(model, rows, QuantConfig(group_size=16))
    assert torch.equal(first.scales[0].scale_I, found.scales[0].scale_I)
    assert torch.equal(second.scales[0].scale_I, found.scales[0].scale_I)
    assert second.scales[3].metadata["losses"] != found.scales[3].metadata["losses"]


def test_how_many_rows_run_at_once_does_not_matter():
    model, _ = loud("mistral", layers=2)
    whole = search_model(model, random_rows(6), QuantConfig(group_size=16, dtype=torch.float64))
    each = search_model(model, random_rows(6), QuantConfig(group_size=16, dtype=torch.float64, batch_tokens=1))
    for one, other in zip(whole.scales, each.scales, strict=True):
        torch.testing.assert_close(one.scale_I, other.scale_I, rtol=1e-6, atol=0)
        np.testing.assert_allclose(one.metadata["losses"], other.metadata["losses"], rtol=1e-6)


def test_padding_counts_nothing():
    model, _ = loud(layers=2)
    short, long = random_rows(1, 40), random_rows(1, 64, seed=1)
    both = Calibration("both", "1" * 64, short.sequences + long.sequences)
    options = QuantConfig(group_size=16, dtype=torch.float64)
    padded = search_model(model, both, options)
    alone = [search_model(model, one, options).scales[0] for one in (short, long)]
    # A mean over the tokens of both rows lies between those over each, weighted by their lengths.
    shares = (40 / 104, 64 / 104)
    expected = sum(share * np.array(one.metadata["losses"][0]) for share, one in zip(shares, alone, strict=True))
    assert padded.scales[0].metadata["losses"][0] == pytest.approx(expected, rel=1e-6)


def test_token_weights_are_shares_of_the_mean():
    """Weight 3 on an image's tokens is as if the model had seen each of them three times."""
    model, processor = loud()
    calibration = image_sequences(model, processor)
    losses = {
        weight: search_model(
            model, calibration, QuantConfig(group_size=16, image_weight=weight, dtype=torch.float64), **used
        )
        .scales[0]
        .metadata["losses"][0]
        for used in [{"processor": processor}]
        for weight in (1.0, 3.0, 1e9)
    }
    length, num_image_tokens = len(calibration.sequences[0].ids), 4
    total = losses[1.0] * length
    images = losses[1e9] * num_image_tokens
    assert losses[3.0] == pytest.approx((total + 2 * images) / (length + 2 * num_image_tokens), rel=1e-6)


def image_sequences(model, processor):
    from tests import tiny
    from vila.core.types import Message
    from vila.quant.calibration import sample_calibration

    conversation = [Message.of("user", tiny.image(1), "what is it?"), Message.of("assistant", "noise")]
    return sample_calibration([conversation], processor, name="images")


def test_images_pass_through_the_whole_model():
    model, processor = loud()
    seen = image_sequences(model, processor)
    options = QuantConfig(group_size=16)
    before = search_model(model, seen, options, processor=processor)
    with torch.no_grad():
        next(model.projector.parameters()).mul_(2)
    after = search_model(model, seen, options, processor=processor)
    assert before.scales[0].metadata["losses"] != after.scales[0].metadata["losses"]


@pytest.mark.parametrize("clipping, clipped", [("none", 0), ("published", 5), ("all", 7)])
def test_clipping_chooses_the_linears(clipping, clipped):
    model, _ = loud()
    found = search_model(model, random_rows(), QuantConfig(group_size=16, clipping=clipping))
    assert len(found.clips) == clipped


@pytest.mark.parametrize("scaling, tried", [("activation", 20), ("duo", 20), ("both", 39)])
def test_every_scaling_keeps_the_identity_and_none_is_worse_than_it(scaling, tried):
    model, _ = loud()
    found = search_model(model, random_rows(), QuantConfig(group_size=16, scaling=scaling))
    plain = search_model(model, random_rows(), QuantConfig(group_size=16))
    for scale, published in zip(found.scales, plain.scales, strict=True):
        losses = scale.metadata["losses"]
        assert len(losses) == tried
        assert losses[0] == published.metadata["losses"][0]
        assert min(losses) <= losses[0]


def test_a_search_that_stopped_resumes_to_the_same_bytes(tmp_path):
    model, _ = loud(layers=3)
    options = QuantConfig(group_size=16)
    whole = search_model(model, random_rows(), options)
    save_search(whole, tmp_path / "whole.safetensors")

    class Stopping:
        def advanced(self, task, amount=1, **facts):
            raise KeyboardInterrupt

        started = log = finished = lambda self, *args, **kwargs: None

    target, kept = tmp_path / "again.safetensors", tmp_path / "blocks"
    with pytest.raises(KeyboardInterrupt):
        search_model(model, random_rows(), options, resume_dir=kept, events=Stopping())
    (first,) = kept.iterdir()
    written = first.stat().st_mtime_ns
    with pytest.raises(KeyboardInterrupt):
        search_model(model, random_rows(), options, resume_dir=kept, events=Stopping())
    assert first.stat().st_mtime_ns == written
    save_search(search_model(model, random_rows(), options, resume_dir=kept), target)
    assert target.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert load_search(target).settings["calibration"]["name"] == "random"


def test_resume_state_of_another_run_are_refused(tmp_path):
    model, _ = loud(layers=2)
    options = QuantConfig(group_size=16)
    search_model(model, random_rows(), options, resume_dir=tmp_path)
    others = {
        "calibration": (model, random_rows(seed=1), options),
        "settings": (model, random_rows(), dataclasses.replace(options, clipping="all")),
        "model": (loud(layers=2, seed=1)[0], random_rows(), options),
    }
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_decoder().layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    others["a weight"] = (changed, random_rows(), options)
    for one in others.values():
        with pytest.raises(CheckpointError) as caught:
            search_model(*one, resume_dir=tmp_path)
        assert Path(caught.value.file).parent == tmp_path
    search_model(model, random_rows(), options, resume_dir=tmp_path)


def test_folding_keeps_what_the_model_computes():
    for family in ("llama", "qwen2", "mistral"):
        model, _ = loud(family, layers=2, num_key_value_heads=4)
        before = logits(model, random_rows())
        apply_search(model, search_model(model, random_rows(), QuantConfig(group_size=16, clipping="none")))
        # Worst of the families: 7e-6 of logits up to 20, float32.
        torch.testing.assert_close(logits(model, random_rows()), before, rtol=1e-4, atol=1e-4)


def test_ids_of_another_tokenizer_are_refused():
    model, _ = loud()
    foreign = Calibration("foreign", "2" * 64, (CalibrationSequence((3, 4, 999)),))
    with pytest.raises(DataError) as caught:
        search_model(model, foreign, QuantConfig(group_size=16))
    assert (caught.value.file, caught.value.record, caught.value.value) == ("foreign", "sequence 0", 999)
    assert "259" in caught.value.expected
    with pytest.raises(DataError) as caught:
        search_model(model, Calibration("f", "", (CalibrationSequence((-1,)),)), QuantConfig(group_size=16))
    assert caught.value.value == -1
    with pytest.raises(DataError) as caught:
        search_model(model, Calibration("f", "", ()), QuantConfig(group_size=16))
    assert caught.value.file == "f"


def test_activations_that_overflow_are_named():
    model, _ = loud()
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.up_proj.weight.mul_(1e20)
        model.get_decoder().layers[0].mlp.down_proj.weight.mul_(1e20)
    with pytest.raises(LayoutError) as caught:
        search_model(model, random_rows(), QuantConfig(group_size=16))
    assert caught.value.field == "model.layers.0"


def test_impossible_settings_are_listed():
    with pytest.raises(ConfigError) as caught:
        QuantConfig(scaling="duet", clipping="some", image_weight=-1)
    for part in ("scaling", "'duet'", "clipping", "'some'", "image_weight", "-1"):
        assert part in str(caught.value)
