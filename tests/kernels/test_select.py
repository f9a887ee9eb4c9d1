"""Every backend against the matmul of the dequantized weight in float64, and backend selection."""

import pytest
import torch
from torch import nn

from tests.events import EventLog
from vila.core.errors import ConfigError, UnknownNameError
from vila.kernels.int4 import Int4Linear, dequantize
from vila.kernels.select import BACKENDS, unavailable_reason, use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Norm of the error over norm of the exact product, by the type of the activations. Worst measured over the shapes below
# on a CPU, torch 2.13, Triton 3.6: float32 7.4e-7 (aten; 1.1e-6 at 4096 x 4096), float16 3.3e-4 (aten), bfloat16 2.7e-3
# (torch, aten) and 6.1e-3 (triton, whose interpreter cuts bits off where a GPU rounds).
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}

# rows, outputs, inputs, group size, bias: tiles that are not full, one row and many, single outputs, odd groups.
SHAPES = [
    (1, 40, 256, 64, False),
    (1, 1, 128, 128, False),
    (3, 7, 96, 32, True),
    (8, 24, 128, 128, False),
    (2, 33, 384, 128, True),
    (5, 24, 2048, 64, False),
    (9, 33, 256, 128, True),
    (17, 70, 96, 32, False),
    (70, 130, 64, 32, True),
]


def error_of(name, dtype, shape, make_weight):
    rows, outputs, inputs, group_size, has_bias = shape
    generator = torch.Generator().manual_seed(5)
    bias = torch.randn(outputs, generator=generator).half() if has_bias else None
    layer = Int4Linear.from_weight(make_weight(outputs, inputs, group_size), bias).to(DEVICE)
    x = torch.randn(rows, inputs, generator=generator).to(DEVICE, dtype)
    if has_bias:
        x[:, 3] *= 50
    if why := unavailable_reason(name, DEVICE, dtype):
        pytest.skip(why)
    layer.use_backend(BACKENDS[name], dtype)
    got = layer(x)
    assert got.dtype == dtype and got.shape == (rows, outputs)
    exact = x.double() @ dequantize(layer.weight, torch.float64).T
    if layer.bias is not None:
        exact += layer.bias.double()
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_backends_equal_float64(name, dtype, shape, make_weight):
    assert error_of(name, dtype, shape, make_weight) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", BACKENDS)
def test_empty_input_gives_empty_output(name, make_weight):
    if why := unavailable_reason(name, DEVICE, torch.bfloat16):
        pytest.skip(why)
    layer = Int4Linear.from_weight(make_weight(8, 64, 32)).to(DEVICE)
    layer.use_backend(BACKENDS[name], torch.bfloat16)
    assert layer(torch.zeros(0, 64, dtype=torch.bfloat16, device=DEVICE)).shape == (0, 8)


def model_of(make_weight, *group_sizes):
    return nn.ModuleDict({f"g{size}": Int4Linear.from_weight(make_weight(8, 96 * size, size)) for size in group_sizes})


def test_auto_selects_aten_on_a_cpu_and_logs_it(make_weight):
    model, events = model_of(make_weight, 32, 64), EventLog()
    choice = use_backend(model, dtype=torch.float32, events=events)
    assert choice.name == "aten" and {layer.backend for layer in model.values()} == {"aten"}
    assert events.lines == ["int4: aten on cpu, float32 activations, 2 layers"]


def test_auto_uses_the_reference_for_unsupported_layers(make_weight):
    model = model_of(make_weight, 32, 48)
    choice = use_backend(model, dtype=torch.float32)
    assert (model["g32"].backend, model["g48"].backend) == ("aten", "torch")
    ((layer, reason),) = choice.fallbacks
    assert layer == "g48" and "48" in reason
    assert len(choice.describe().splitlines()) == 2


def test_auto_reports_skipped_backends(make_weight):
    choice = use_backend(model_of(make_weight, 32), dtype=torch.float64)
    assert choice.name == "torch"
    assert [name for name, _ in choice.skipped] == ["aten"]
    assert len(choice.describe().splitlines()) == 2


def test_a_requested_backend_is_never_replaced(make_weight):
    model = model_of(make_weight, 32, 48)
    with pytest.raises(ConfigError) as caught:
        use_backend(model, "aten", dtype=torch.float32)
    assert "g48" in caught.value.problem and "g32" not in caught.value.problem
    with pytest.raises(ConfigError) as caught:
        use_backend(model, "aten", dtype=torch.float64)
    assert caught.value.value == "aten" and "float64" in caught.value.problem
    assert {layer.backend for layer in model.values()} == {"torch"}


def test_an_unknown_backend_is_refused_with_the_known_ones(make_weight):
    with pytest.raises(UnknownNameError) as caught:
        use_backend(model_of(make_weight, 32), "tritn", dtype=torch.float32)
    assert caught.value.near == ["triton"]


def test_a_model_without_int4_layers_has_no_choice():
    assert use_backend(nn.Linear(4, 4), dtype=torch.float32) is None


def test_layers_on_several_device_types_are_refused(make_weight):
    model = model_of(make_weight, 32)
    model["meta"] = Int4Linear(64, 8, group_size=32, device="meta")
    with pytest.raises(ConfigError) as caught:
        use_backend(model, dtype=torch.float32)
    assert caught.value.value == ["cpu", "meta"]
