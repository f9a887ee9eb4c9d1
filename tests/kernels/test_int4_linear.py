import copy

import pytest
import torch
from torch import nn

from vila.core.errors import ConfigError, LayoutError
from vila.kernels import int4
from vila.kernels.aten import BACKEND as ATEN
from vila.kernels.int4 import Int4Linear, dequantize, fuse, quantize


def linear(num_inputs, num_outputs, *, bias=False, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(num_inputs, num_outputs, bias=bias)


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_equals_a_linear_with_rounded_weights(bias):
    full = linear(96, 40, bias=bias)
    layer = Int4Linear.from_linear(full, 32)
    x = torch.randn(2, 3, 96)
    rounded = layer.to_linear()
    assert torch.equal(rounded.weight, dequantize(quantize(full.weight, 32)))
    assert torch.allclose(layer(x), rounded(x), atol=1e-6)
    assert layer(x).shape == (2, 3, 40)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_output_has_the_dtype_of_the_input(dtype):
    layer = Int4Linear.from_linear(linear(64, 8, bias=True), 32)
    x = torch.randn(5, 64, dtype=dtype)
    want = layer.to_linear(dtype)(x)
    assert layer(x).dtype == dtype
    assert torch.allclose(layer(x).float(), want.float(), atol=2e-2)


def test_outputs_are_computed_in_chunks_of_bounded_size(monkeypatch):
    layer = Int4Linear.from_linear(linear(64, 50), 32)
    x = torch.randn(3, 64)
    whole, sizes = layer(x), []
    monkeypatch.setattr(int4, "MAX_DEQUANTIZED_VALUES", 64 * 7)
    real = int4.dequantize
    monkeypatch.setattr(int4, "dequantize", lambda w, t: sizes.append(w.num_outputs) or real(w, t))
    assert torch.allclose(layer(x), whole, atol=1e-6)
    assert sizes == [7, 7, 7, 7, 7, 7, 7, 1]


def test_the_state_has_stable_names_and_loads_on_the_meta_device():
    layer = Int4Linear.from_linear(linear(64, 16, bias=True), 32)
    state = layer.state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        "codes": [16, 32],
        "scales": [16, 2],
        "zeros": [16, 2],
        "bias": [16],
    }
    empty = Int4Linear(64, 16, group_size=32, bias=True, device="meta")
    empty.load_state_dict(state, assign=True)
    x = torch.randn(2, 64)
    assert torch.equal(empty(x), layer(x))


def test_casting_a_model_does_not_round_the_scales_again():
    layer = Int4Linear.from_linear(linear(64, 16, bias=True), 32)
    before = dequantize(layer.weight)
    model = nn.Sequential(layer, nn.Linear(16, 4)).to(torch.bfloat16)
    assert layer.scales.dtype == torch.float16 and model[1].weight.dtype == torch.bfloat16
    assert torch.equal(dequantize(layer.weight), before)


@pytest.mark.parametrize("biases", [(False, False, False), (True, False, True)])
def test_a_fused_layer_equals_its_parts(biases):
    parts = [
        Int4Linear.from_linear(linear(64, width, bias=bias, seed=width), 32)
        for width, bias in zip((16, 8, 24), biases, strict=True)
    ]
    fused, x = fuse(parts), torch.randn(2, 5, 64)
    assert fused.splits == (16, 8, 24)
    for got, part in zip(fused.split(x), parts, strict=True):
        assert torch.allclose(got, part(x), atol=1e-6)


def test_layers_with_different_group_sizes_do_not_fuse():
    with pytest.raises(LayoutError) as caught:
        fuse([Int4Linear.from_linear(linear(64, 8), 32), Int4Linear.from_linear(linear(64, 8), 64)])
    assert len(caught.value.value) == 2
    with pytest.raises(LayoutError) as caught:
        Int4Linear(64, 8, group_size=32, splits=(3, 4))
    assert (caught.value.field, caught.value.value) == ("splits", (3, 4))


def test_prepared_tensors_are_not_saved_and_follow_new_weights():
    layer = Int4Linear.from_linear(linear(64, 24, seed=1), 32)
    other = Int4Linear.from_linear(linear(64, 24, seed=2), 32)
    x = torch.randn(2, 64)
    layer.use_backend(ATEN, torch.float32)
    assert layer.backend == "aten" and set(layer.state_dict()) == {"codes", "scales", "zeros"}
    layer.load_state_dict(other.state_dict())
    assert torch.allclose(layer(x), other(x), atol=1e-5)
    layer.use_backend(int4.BACKEND, torch.float32)
    assert torch.equal(layer(x), other(x)) and len(list(layer.buffers())) == 3


def test_a_prepared_layer_survives_casts_and_copies():
    layer = Int4Linear.from_linear(linear(64, 24, bias=True), 32)
    x, want = torch.randn(2, 64), None
    want = layer(x)
    layer.use_backend(ATEN, torch.float32)
    copied = copy.deepcopy(layer).to(torch.float16)
    assert torch.allclose(copied(x), want, atol=2e-3)


def test_a_backend_that_does_not_support_the_layer_is_refused():
    layer = Int4Linear.from_linear(linear(96, 8), 48)
    with pytest.raises(ConfigError) as caught:
        layer.use_backend(ATEN, torch.float32)
    assert caught.value.value == "aten" and "48" in caught.value.problem
    assert layer.backend == "torch"


def test_the_compiled_layer_gives_the_same_output():
    layer = Int4Linear.from_linear(linear(64, 24, bias=True), 32)
    x = torch.randn(2, 64)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)
    want = layer(x)
    layer.use_backend(ATEN, torch.float32)
    assert torch.allclose(torch.compile(layer, backend="eager", fullgraph=True)(x), want, atol=1e-5)


def test_gradients_reach_the_input_through_the_reference():
    layer = Int4Linear.from_linear(linear(64, 24), 32)
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, dequantize(layer.weight).sum(0).expand(2, -1), atol=1e-5)
