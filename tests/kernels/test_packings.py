"""Packings are compared with independent formulas on single values, and with writers that share no code with ours."""

import numpy as np
import pytest
import torch

from tests.model.layouts import int4_reference
from vila.core.errors import LayoutError
from vila.kernels.group_size import num_zero_words
from vila.kernels.int4 import Int4Weight, dequantize, pack_nibbles, unpack_nibbles
from vila.kernels.packings import (
    UNPACKERS,
    pack_compressed,
    pack_gemm,
    pack_modelopt,
    pack_tinychat,
    pack_tinychatengine_blocks,
    pack_tinychatengine_cuda,
)

PACKERS = {"gemm": pack_gemm, "tinychat": pack_tinychat}
SIZES = pytest.mark.parametrize(("num_outputs", "num_inputs"), [(8, 128), (16, 384), (40, 640)])
GROUP_SIZES = pytest.mark.parametrize("group_size", [32, 64, 128])


def nibble(word, index):
    return (int(word) >> (4 * index)) & 15


def written(name, num_outputs, num_inputs, group_size):
    """A random weight, and its tensors from the independent writer of a packing."""
    codes, zeros, scales = int4_reference.random_weight(1, num_outputs, num_inputs, group_size)
    tensors = getattr(int4_reference, f"write_{name}")(codes, zeros, scales)
    packed_codes, zeros = (torch.from_numpy(part.astype(np.uint8)) for part in (codes, zeros))
    weight = Int4Weight(pack_nibbles(packed_codes), torch.from_numpy(scales), zeros, group_size)
    return weight, {key: torch.from_numpy(tensor) for key, tensor in tensors.items()}


@GROUP_SIZES
@SIZES
@pytest.mark.parametrize("name", UNPACKERS)
def test_tensors_of_an_independent_writer_are_unpacked(name, group_size, num_outputs, num_inputs):
    weight, tensors = written(name, num_outputs, num_inputs, group_size)
    found = UNPACKERS[name](tensors, group_size)
    assert torch.equal(found.codes, weight.codes) and torch.equal(found.zeros, weight.zeros)
    assert torch.equal(dequantize(found), dequantize(weight))


@GROUP_SIZES
@SIZES
@pytest.mark.parametrize("name", PACKERS)
def test_packed_tensors_equal_those_of_an_independent_writer(name, group_size, num_outputs, num_inputs):
    weight, wanted = written(name, num_outputs, num_inputs, group_size)
    found = PACKERS[name](weight)
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        assert tensor.dtype == wanted[key].dtype and torch.equal(tensor, wanted[key]) and tensor.is_contiguous()


def test_gemm_words_hold_outputs_in_the_published_order():
    codes = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 32)
    weight = Int4Weight(pack_nibbles(codes), torch.ones(8, 1).half(), torch.full((8, 1), 8, dtype=torch.uint8), 32)
    assert set(pack_gemm(weight)["qweight"].flatten().tolist()) == {0x75316420}


@pytest.mark.parametrize(("group_size", "words"), [(128, 1), (64, 2), (32, 4)])
def test_rows_of_zeros_have_whole_words(group_size, words):
    assert num_zero_words(640, group_size) == words


@pytest.mark.parametrize(("num_inputs", "group_size"), [(96, 16), (96, 48), (100, 64)])
def test_other_group_sizes_are_refused(num_inputs, group_size):
    with pytest.raises(LayoutError) as caught:
        num_zero_words(num_inputs, group_size)
    assert (caught.value.field, caught.value.value) == ("group_size", group_size)


def test_tinychat_zeros_may_carry_autoawqs_name_and_are_checked(make_weight):
    weight = make_weight(8, 128, 128)
    packed = pack_tinychat(weight)
    packed["qzeros"] = packed.pop("scaled_zeros")
    assert torch.equal(UNPACKERS["tinychat"](packed, 128).zeros, weight.zeros)
    packed["qzeros"] = packed["qzeros"] * 20
    with pytest.raises(LayoutError) as caught:
        UNPACKERS["tinychat"](packed, 128)
    assert caught.value.field == "scaled_zeros"


@pytest.mark.parametrize("run", [64, 32])
def test_engine_bytes_pair_an_input_with_the_one_half_a_run_later(run, make_weight):
    weight = make_weight(2, 128, 32, symmetric=True)
    packed = pack_tinychatengine_blocks(weight, run=run)
    codes, half = unpack_nibbles(weight.codes), run // 2
    for n in range(2):
        for byte in range(64):
            first = byte // half * run + byte % half
            assert packed["weight_int4"][n, byte] == codes[n, first] | codes[n, first + half] << 4
    assert packed["zero_point_int4"].tolist() == [8.0] and not packed["offset_int4"].any()


def test_engine_cuda_zero_points_are_words_of_eights(make_weight):
    packed = pack_tinychatengine_cuda(make_weight(4, 1152, 128, symmetric=True))
    assert packed["zero_point_int4"].shape == (4, 2)
    assert set(packed["zero_point_int4"].numpy().view(np.uint32).ravel().tolist()) == {0x88888888}
    assert packed["scaling_factor_int4"].shape == (4, 16)


def test_modelopt_bytes_hold_two_outputs_in_twos_complement(make_weight):
    weight = make_weight(6, 64, 32, symmetric=True)
    signed = unpack_nibbles(weight.codes).int() - 8
    packed = pack_modelopt(weight)["weight"].int()
    for r in range(3):
        assert torch.equal(packed[r], (signed[2 * r] & 15) | (signed[2 * r + 1] & 15) << 4)


def test_compressed_zero_points_are_packed_along_outputs(make_weight):
    weight = make_weight(16, 64, 32)
    packed = pack_compressed(weight, symmetric=False)
    codes = unpack_nibbles(weight.codes)
    assert all(nibble(packed["weight_packed"][n, k // 8], k % 8) == codes[n, k] for n in range(16) for k in range(64))
    for n in range(16):
        for g in range(2):
            assert nibble(packed["weight_zero_point"][n // 8, g], n % 8) == weight.zeros[n, g]
    assert pack_compressed(weight, symmetric=True).keys() == {"weight_packed", "weight_scale"}


@pytest.mark.parametrize("pack", [pack_modelopt, pack_tinychatengine_cuda, pack_tinychatengine_blocks])
def test_symmetric_packings_refuse_other_zeros(pack, make_weight):
    options = {"run": 32} if pack is pack_tinychatengine_blocks else {}
    with pytest.raises(LayoutError) as caught:
        pack(make_weight(8, 128, 128), **options)
    assert caught.value.field == "zeros"


def test_a_scale_outside_float16_is_refused(make_weight):
    good = make_weight(8, 128, 128, dtype=torch.float32)
    weight = Int4Weight(good.codes, good.scales * 1e9, good.zeros, 128)
    with pytest.raises(LayoutError) as caught:
        pack_gemm(weight)
    assert caught.value.field == "scales"
