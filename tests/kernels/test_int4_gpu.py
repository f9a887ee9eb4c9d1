"""The CUDA backends at the sizes of 7B and 13B models, compiled, and replayed from a graph."""

import pytest
import torch

from vila.kernels.int4 import Int4Linear, dequantize, quantize
from vila.kernels.select import BACKENDS, unavailable_reason

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# outputs, inputs: attention, fused q/k/v, gate/up and down of LLaMA 7B and 13B, and a ragged one.
SHAPES = [
    (4096, 4096),
    (12288, 4096),
    (22016, 4096),
    (4096, 11008),
    (5120, 5120),
    (27648, 5120),
    (5120, 13824),
    (577, 1152),
]
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2}


def layer_and_rows(name, dtype, shape, rows):
    if why := unavailable_reason(name, "cuda", dtype):
        pytest.skip(why)
    torch.manual_seed(0)
    layer = Int4Linear.from_weight(quantize(torch.randn(*shape, device="cuda") * 0.02, 128))
    layer.use_backend(BACKENDS[name], dtype)
    return layer, torch.randn(rows, shape[1], device="cuda", dtype=dtype)


def error(got, layer, x):
    exact = x.double() @ dequantize(layer.weight, torch.float64).T
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 64, 640])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["triton", "aten"])
def test_backends_equal_float64_at_real_sizes(name, dtype, rows, shape):
    layer, x = layer_and_rows(name, dtype, shape, rows)
    assert error(layer(x), layer, x) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["triton", "aten"])
def test_a_compiled_layer_gives_the_same_output(name):
    layer, x = layer_and_rows(name, torch.bfloat16, (4096, 4096), 1)
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("name", ["triton", "aten"])
def test_a_cuda_graph_replays_with_new_input(name, rows):
    layer, x = layer_and_rows(name, torch.bfloat16, (4096, 4096), rows)
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, layer(x))
