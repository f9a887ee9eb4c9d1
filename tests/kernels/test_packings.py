"""Every packing is verified by independent formulas on single values."""

import numpy as np
import pytest
import torch

from vila.core.errors import MISSING, LayoutError, UnknownNameError
from vila.kernels.int4 import Int4Weight, dequantize, pack_nibbles, unpack_nibbles
from vila.kernels.packings import FORMATS, find_format

NAMES = [each.name for each in FORMATS]
SYMMETRIC = {"qm_x86", "qm_arm", "qm_metal", "qm_cuda", "modelopt"}


def weight_for(name, make_weight, num_outputs, num_inputs, group_size):
    if name in {"qm_x86", "qm_arm", "qm_metal"}:
        group_size = 32
    return make_weight(num_outputs, num_inputs, group_size, symmetric=name in SYMMETRIC)


def coded(codes):
    """A weight with the given codes and group size 32."""
    codes = torch.as_tensor(codes, dtype=torch.uint8)
    groups = (codes.shape[0], codes.shape[1] // 32)
    return Int4Weight(pack_nibbles(codes), torch.ones(groups).half(), torch.full(groups, 8, dtype=torch.uint8), 32)


def nibble(word, index):
    return (int(word) >> (4 * index)) & 15


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(8, 128), (16, 384), (40, 640)])
def test_unpack_inverts_pack(name, group_size, num_outputs, num_inputs, make_weight):
    weight = weight_for(name, make_weight, num_outputs, num_inputs, group_size)
    form = find_format(name)
    back = form.unpack(form.pack(weight), weight.group_size)
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.zeros, weight.zeros)
    assert torch.equal(dequantize(back), dequantize(weight))


@pytest.mark.parametrize("name", NAMES)
def test_packed_tensors_are_contiguous_and_have_the_published_names(name, make_weight):
    form = find_format(name)
    packed = form.pack(weight_for(name, make_weight, 16, 256, 64))
    assert set(form.tensors) <= set(packed)
    assert all(tensor.is_contiguous() for tensor in packed.values())


def test_gemm_words_hold_outputs_in_the_published_order(make_weight):
    # Outputs valued 0..7 make the word 0x75316420.
    weight = coded(torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 32))
    packed = find_format("gemm").pack(weight)
    assert packed["qweight"].dtype == torch.int32 and packed["qweight"].shape == (32, 1)
    assert set(packed["qweight"].flatten().tolist()) == {0x75316420}
    weight = make_weight(24, 96, 32)
    packed = find_format("gemm").pack(weight)
    codes, order = unpack_nibbles(weight.codes), (0, 2, 4, 6, 1, 3, 5, 7)
    for k in range(0, 96, 7):
        for n in range(24):
            at = order.index(n % 8)
            assert nibble(packed["qweight"][k, n // 8], at) == codes[n, k]
            assert nibble(packed["qzeros"][k // 32, n // 8], at) == weight.zeros[n, k // 32]
    assert torch.equal(packed["scales"], weight.scales.T)


@pytest.mark.parametrize(("group_size", "words"), [(128, 1), (64, 2), (32, 4)])
def test_gemv_is_in_natural_order_and_padded_with_zeros(group_size, words, make_weight):
    weight = make_weight(4, 640, group_size)
    packed = find_format("gemv").pack(weight)
    codes, groups = unpack_nibbles(weight.codes), 640 // group_size
    assert packed["qweight"].shape == (4, 80) and packed["qzeros"].shape == (4, words)
    assert all(nibble(packed["qweight"][n, k // 8], k % 8) == codes[n, k] for n in range(4) for k in range(640))
    zeros = [[nibble(packed["qzeros"][n, g // 8], g % 8) for g in range(words * 8)] for n in range(4)]
    assert zeros == [[*weight.zeros[n].tolist(), *[0] * (words * 8 - groups)] for n in range(4)]
    assert packed["scales"].shape == (4, words * 8) and not packed["scales"][:, groups:].any()


def test_tinychat_words_follow_the_published_steps(make_weight):
    weight = make_weight(8, 192, 64)
    packed = find_format("tinychat").pack(weight)
    codes = unpack_nibbles(weight.codes).numpy()
    inside_run = np.array([(p % 4) * 8 + p // 4 for p in range(32)])
    assert inside_run[:9].tolist() == [0, 8, 16, 24, 1, 9, 17, 25, 2]
    columns = np.concatenate([run + inside_run for run in range(0, 192, 32)])
    shuffled = codes[:, columns].astype(np.int64)
    words = packed["qweight"].numpy().view(np.uint16)
    for quad in range(2):
        for tile in range(3):
            values = [shuffled[4 * quad + row, 64 * tile + column] for row in range(4) for column in range(64)]
            for index in range(64):
                want = sum(int(value) << (4 * i) for i, value in enumerate(values[4 * index : 4 * index + 4]))
                assert words[quad, 64 * tile + index] == want
    assert packed["scales"].shape == (16, 8) and not packed["scaled_zeros"][3:].any()
    assert torch.equal(packed["scaled_zeros"][:3], -(weight.scales * weight.zeros).T)


def test_tinychat_zeros_may_carry_autoawqs_name(make_weight):
    form, weight = find_format("tinychat"), make_weight(8, 128, 128)
    packed = form.pack(weight)
    packed["qzeros"] = packed.pop("scaled_zeros")
    assert torch.equal(form.unpack(packed, 128).zeros, weight.zeros)
    packed["qzeros"] = packed["qzeros"] * 20
    with pytest.raises(LayoutError) as caught:
        form.unpack(packed, 128)
    assert caught.value.field == "scaled_zeros"


@pytest.mark.parametrize(("name", "run"), [("qm_x86", 64), ("qm_arm", 32), ("qm_metal", 8)])
def test_engine_bytes_pair_an_input_with_the_one_half_a_run_later(name, run, make_weight):
    weight = make_weight(2, 128, 32, symmetric=True)
    packed = find_format(name).pack(weight)
    codes, half = unpack_nibbles(weight.codes), run // 2
    for n in range(2):
        for byte in range(64):
            first = byte // half * run + byte % half
            assert packed["weight_int4"][n, byte] == codes[n, first] | codes[n, first + half] << 4
    assert packed["zero_point_int4"].tolist() == [8.0] and not packed["offset_int4"].any()


def test_engine_cuda_zero_points_are_words_of_eights(make_weight):
    packed = find_format("qm_cuda").pack(make_weight(4, 1152, 128, symmetric=True))
    assert packed["zero_point_int4"].shape == (4, 2)
    assert set(packed["zero_point_int4"].numpy().view(np.uint32).ravel().tolist()) == {0x88888888}
    assert packed["scaling_factor_int4"].shape == (4, 16)


def test_modelopt_bytes_hold_two_outputs_in_twos_complement(make_weight):
    weight = make_weight(6, 64, 32, symmetric=True)
    signed = unpack_nibbles(weight.codes).int() - 8
    packed = find_format("modelopt").pack(weight)["weight"].int()
    for r in range(3):
        assert torch.equal(packed[r], (signed[2 * r] & 15) | (signed[2 * r + 1] & 15) << 4)


def test_compressed_zero_points_are_packed_along_outputs(make_weight):
    weight = make_weight(16, 64, 32)
    packed = find_format("compressed").pack(weight)
    for n in range(16):
        for g in range(2):
            assert nibble(packed["weight_zero_point"][n // 8, g], n % 8) == weight.zeros[n, g]
    assert packed["weight_shape"].tolist() == [16, 64]
    assert "weight_zero_point" not in find_format("compressed").pack(make_weight(16, 64, 32, symmetric=True))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_onnxruntime_multiplies_with_what_is_packed_for_it(group_size, make_weight):
    onnxruntime, helper = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx").helper
    weight = make_weight(24, 384, group_size, dtype=torch.float32)
    packed = {name: tensor.numpy() for name, tensor in find_format("onnx").pack(weight).items()}
    constants = [helper.make_tensor(n, helper.np_dtype_to_tensor_dtype(t.dtype), t.shape, t) for n, t in packed.items()]
    facts = {"K": 384, "N": 24, "bits": 4, "block_size": group_size}
    node = helper.make_node("MatMulNBits", ["x", *packed], ["y"], domain="com.microsoft", **facts)
    x = helper.make_tensor_value_info("x", 1, [3, 384])
    y = helper.make_tensor_value_info("y", 1, [3, 24])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], constants), opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = torch.randn(3, 384, generator=torch.Generator().manual_seed(1))
    (got,) = session.run(None, {"x": inputs.numpy()})
    expected = inputs @ dequantize(weight).T
    assert torch.allclose(torch.from_numpy(got), expected, atol=5e-6)  # worst of the three: 6.3e-7


@pytest.mark.parametrize(
    ("name", "shape", "value"),
    [
        ("gemm", (12, 128, 128), 12),
        ("gemv", (8, 96, 16), 16),
        ("tinychat", (8, 96, 32), 96),
        ("tinychat", (12, 128, 128), 12),
        ("onnx", (8, 96, 48), 48),
        ("qm_x86", (8, 96, 32), MISSING),
        ("compressed", (12, 64, 32), 12),
    ],
)
def test_unsupported_shapes_are_refused(name, shape, value, make_weight):
    with pytest.raises(LayoutError) as caught:
        find_format(name).pack(make_weight(*shape))
    assert caught.value.field and (caught.value.value is value or caught.value.value == value)


def test_symmetric_formats_refuse_unsupported_sizes(make_weight):
    with pytest.raises(LayoutError) as caught:
        find_format("qm_x86").pack(make_weight(8, 96, 32, symmetric=True))
    assert caught.value.value == 96
    with pytest.raises(LayoutError) as caught:
        find_format("qm_arm").pack(make_weight(8, 128, 64, symmetric=True))
    assert (caught.value.field, caught.value.value) == ("group_size", 64)
    with pytest.raises(LayoutError) as caught:
        find_format("modelopt").pack(make_weight(5, 64, 32, symmetric=True))
    assert caught.value.value == 5


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_group_size_or_a_missing_tensor_is_named(name, make_weight):
    form = find_format(name)
    packed = form.pack(weight_for(name, make_weight, 16, 1024, 128))
    with pytest.raises(LayoutError):
        form.unpack(packed, 64)
    del packed[form.tensors[0]]
    with pytest.raises(LayoutError) as caught:
        form.unpack(packed, 128)
    assert caught.value.field == form.tensors[0]


def test_a_scale_outside_float16_is_refused(make_weight):
    good = make_weight(8, 128, 128, dtype=torch.float32)
    weight = Int4Weight(good.codes, good.scales * 1e9, good.zeros, 128)
    with pytest.raises(LayoutError) as caught:
        find_format("gemm").pack(weight)
    assert caught.value.field == "scales"


def test_an_unknown_packing_is_refused_with_the_known_ones():
    with pytest.raises(UnknownNameError) as caught:
        find_format("gemn")
    assert set(caught.value.near) == {"gemv", "gemm"}
