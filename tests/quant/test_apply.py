"""Folding, clipping and rounding a model; a search that does not fit changes nothing."""

import copy

import pytest
import torch
from torch import nn

from tests.quant.models import logits, loud, random_rows
from vila.core.errors import ConfigError, LayoutError
from vila.kernels.int4 import dequantize
from vila.quant.apply import apply_search, clip_weight, fake_quantize, fold_scale, quantize_model
from vila.quant.awq_cache import AwqSearch, ChannelScale, WeightClip
from vila.quant.awq_search import search_model
from vila.quant.quant_config import QuantConfig

UP = "language_model.model.layers.0.mlp.up_proj"


def test_a_norm_is_divided_by_the_scale_of_its_linears():
    norm, linear = nn.LayerNorm(4), nn.Linear(4, 3)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    inputs = torch.randn(5, 4)
    before = linear(norm(inputs))
    fold_scale(norm, [linear], torch.tensor([0.5, 1.0, 2.0, 4.0]))
    torch.testing.assert_close(linear(norm(inputs)), before)


def test_of_a_longer_linear_the_last_outputs_are_divided():
    first, second = nn.Linear(3, 6), nn.Linear(4, 2)
    inputs = torch.randn(5, 3)
    before = second(first(inputs)[:, -4:])
    head = first(inputs)[:, :2]
    fold_scale(first, [second], torch.tensor([0.5, 1.0, 2.0, 4.0]))
    torch.testing.assert_close(second(first(inputs)[:, -4:]), before)
    torch.testing.assert_close(first(inputs)[:, :2], head)


def test_memory_mapped_weights_are_replaced_not_written():
    linear, norm = nn.Linear(4, 4), nn.LayerNorm(4)
    mapped = linear.weight.detach()
    before = mapped.clone()
    fold_scale(norm, [linear], torch.full((4,), 2.0))
    assert torch.equal(mapped, before)
    assert not torch.equal(linear.weight, before)


def test_limits_clamp_both_sides_of_each_group():
    clipped = clip_weight(torch.tensor([[3.0, -3.0, 3.0, -3.0]]), torch.tensor([[1.0, 2.0]]))
    assert clipped.tolist() == [[1.0, -1.0, 2.0, -2.0]]


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_takes_all_linears_of_the_decoder_and_nothing_else(symmetric):
    model, _ = loud(layers=2)
    before = copy.deepcopy(model.state_dict())
    rounded = quantize_model(model, None, 16, symmetric)
    expected = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and name.startswith("language_model.")
    }
    assert rounded.keys() == expected and len(expected) == 14
    for name, weight in rounded.items():
        # The scales are stored in float16: a step moves by 5e-4 of itself at most, and a code at a boundary by one.
        step = weight.scales.float().repeat_interleave(16, 1)
        plain = fake_quantize(before[f"{name}.weight"], 16, symmetric)
        assert ((dequantize(weight) - plain).abs() <= step * 1.01).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_search_beats_plain_rounding():
    """On the calibration sequences, over all logits."""
    rows, options = random_rows(4), QuantConfig(group_size=32)
    model, _ = loud(layers=2)
    exact = logits(model, rows)
    errors = {}
    for name, search in (("plain", None), ("awq", search_model(model, rows, options))):
        tried = copy.deepcopy(model)
        rounded = quantize_model(tried, search, 32)
        for module, weight in rounded.items():
            tried.get_submodule(module).weight.data = dequantize(weight)
        errors[name] = (logits(tried, rows) - exact).square().mean().item()
    assert errors["awq"] < 0.8 * errors["plain"]


def test_released_weights_hold_no_memory():
    model, _ = loud()
    rounded = quantize_model(model, None, 16, release=True)
    for name in rounded:
        assert model.get_submodule(name).weight.is_meta
    assert not model.get_output_embeddings().weight.is_meta
    with pytest.raises(LayoutError) as caught:
        quantize_model(model, None, 16)
    assert caught.value.field.endswith("q_proj")


def test_an_llm_alone_is_quantized_too():
    model, _ = loud()
    whole = quantize_model(model, None, 16)
    alone = quantize_model(model.language_model, None, 16)
    assert [f"language_model.{name}" for name in alone] == list(whole)


def test_a_search_that_does_not_fit_changes_nothing():
    model, _ = loud()
    before = copy.deepcopy(model.state_dict())
    good = search_model(model, random_rows(), QuantConfig(group_size=16))
    layer = "model.layers.0"
    wrong = {
        f"{layer}.norm9": ChannelScale(f"{layer}.norm9", (f"{layer}.mlp.up_proj",), torch.ones(32)),
        f"{layer}.mlp.out": ChannelScale(f"{layer}.input_layernorm", (f"{layer}.mlp.out",), torch.ones(32)),
        f"{layer}.mlp.up_proj": ChannelScale(f"{layer}.input_layernorm", (f"{layer}.mlp.up_proj",), torch.ones(16)),
        f"{layer}.input_layernorm": ChannelScale(
            f"{layer}.input_layernorm", (f"{layer}.mlp.up_proj",), torch.zeros(32)
        ),
    }
    for name, scale in wrong.items():
        with pytest.raises(LayoutError) as caught:
            apply_search(model, AwqSearch((*good.scales, scale), good.clips))
        assert caught.value.field == name
    with pytest.raises(LayoutError) as caught:
        apply_search(model, AwqSearch(good.scales, (WeightClip(f"{layer}.mlp.up_proj", torch.ones(32, 2)),)))
    assert caught.value.field == f"{layer}.mlp.up_proj"
    assert "64x32" in caught.value.problem and "32x2" in caught.value.problem
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_search_for_another_rounding_is_refused():
    model, _ = loud()
    found = search_model(model, random_rows(), QuantConfig(group_size=16))
    with pytest.raises(ConfigError) as caught:
        quantize_model(model, found, 32)
    assert (caught.value.field, caught.value.value, caught.value.expected) == ("group_size", 32, "16")
    with pytest.raises(ConfigError) as caught:
        quantize_model(model, found, 16, True)
    assert (caught.value.field, caught.value.value, caught.value.expected) == ("symmetric", True, "False")


def test_sizes_that_a_group_does_not_divide_are_named_with_those_that_fit():
    model, _ = loud(hidden_size=96, intermediate_size=192, num_attention_heads=4, layers=2)
    with pytest.raises(ConfigError) as caught:
        quantize_model(model, None, 128)
    assert (caught.value.field, caught.value.value, caught.value.expected) == ("group_size", 128, "32")
    for part in ("96", "model.layers.0.self_attn.q_proj", "192", "model.layers.0.mlp.down_proj"):
        assert part in caught.value.problem


def test_damaged_weights_are_named():
    model, _ = loud(layers=2)
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.gate_proj.weight[3, 5] = float("nan")
    for work in (
        lambda: quantize_model(model, None, 16),
        lambda: search_model(model, random_rows(), QuantConfig(group_size=16)),
    ):
        with pytest.raises(LayoutError) as caught:
            work()
        assert caught.value.field == "model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.input_layernorm", "language_model.model.norm.weight", "language_model.model.embed_tokens.weight"],
)
def test_damaged_norms_and_embeddings_are_named_too(name):
    model, _ = loud()
    inside = name if name.startswith("language_model") else f"language_model.{name}.weight"
    with torch.no_grad():
        model.get_parameter(inside).view(-1)[3] = float("inf")
    with pytest.raises(LayoutError) as caught:
        quantize_model(model, None, 16)
    assert caught.value.field == name


def test_limits_below_zero_are_refused():
    model, _ = loud()
    clip = WeightClip("model.layers.0.mlp.up_proj", torch.full((model.get_submodule(UP).out_features, 2), -0.1))
    with pytest.raises(LayoutError) as caught:
        apply_search(model, AwqSearch((), (clip,)))
    assert caught.value.field == "model.layers.0.mlp.up_proj"


def test_a_quantized_model_is_refused():
    model, _ = loud()

    class Packed(nn.Module):
        pass

    model.get_decoder().layers[0].self_attn.o_proj = Packed()
    with pytest.raises(LayoutError) as caught:
        quantize_model(model, None, 16)
    assert caught.value.field == "model.layers.0.self_attn.o_proj"
    assert caught.value.value == "Packed"


def test_a_family_without_a_card_is_refused_with_those_that_have_one():
    model, _ = loud()
    model.get_decoder().config.model_type = "gemma"
    with pytest.raises(LayoutError) as caught:
        quantize_model(model, None, 16)
    assert caught.value.value == "gemma"
    assert {"llama", "mistral", "qwen2"} <= set(caught.value.expected.split(", "))
