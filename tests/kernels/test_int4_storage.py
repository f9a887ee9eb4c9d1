import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vila.core.errors import LayoutError
from vila.kernels.int4 import Int4Weight, concatenate, dequantize, pack_nibbles, quantize, unpack_nibbles


def published_rounding(weight, group_size):
    """The published rounding, one group at a time, in the dtype of `weight`: codes and values."""
    kind = weight.dtype.type
    codes, values = np.zeros(weight.shape, np.uint8), np.zeros_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group_size):
            group = weight[row, start : start + group_size]
            scale = kind(max(kind(group.max() - group.min()), kind(1e-5)) / kind(15))
            zero = min(max(-np.round(kind(group.min() / scale)), 0), 15)
            code = np.clip(np.round(group / scale) + zero, 0, 15)
            codes[row, start : start + group_size] = code
            values[row, start : start + group_size] = ((code - zero) * scale).astype(kind)
    return codes, values


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_quantize_is_the_published_rounding(kind, group_size):
    values = (np.random.default_rng(3).normal(size=(6, 256)) * 0.05).astype(kind)
    values[1] = abs(values[1]) + kind(0.01)
    values[2] = kind(0)
    values[3] *= kind(1e-5)
    weight = torch.from_numpy(values)
    ours = quantize(weight, group_size, dtype=weight.dtype)
    codes, rounded = published_rounding(values, group_size)
    assert np.array_equal(unpack_nibbles(ours.codes).numpy(), codes)
    assert np.array_equal(dequantize(ours, weight.dtype).numpy(), rounded)


def test_symmetric_codes_are_those_of_the_largest_value_over_seven():
    weight = torch.tensor([[-7.0, 3.4, 0.5, 1.5, 7.0, -0.5, 2.5, -6.6]])
    ours = quantize(weight, 8, symmetric=True, dtype=torch.float32)
    assert ours.scales.tolist() == [[1.0]] and ours.zeros.tolist() == [[8]]
    assert unpack_nibbles(ours.codes).tolist() == [[1, 11, 8, 10, 15, 8, 10, 1]]


def test_codes_agree_with_the_scales_that_are_stored():
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    for dtype in (torch.float16, torch.bfloat16):
        ours = quantize(weight, 64, dtype=dtype)
        scales = ours.scales.float().repeat_interleave(64, 1)
        zeros = ours.zeros.float().repeat_interleave(64, 1)
        assert torch.equal(unpack_nibbles(ours.codes).float(), ((weight / scales).round() + zeros).clamp(0, 15))


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_unpack_inverts_pack(rows, pairs, seed):
    codes = torch.randint(0, 16, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


def test_the_even_input_is_in_the_low_nibble():
    assert pack_nibbles(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]


def test_an_invalid_group_size_lists_valid_ones():
    with pytest.raises(LayoutError) as caught:
        quantize(torch.zeros(2, 576), 128)
    assert (caught.value.field, caught.value.value, caught.value.expected) == ("group_size", 128, "16, 32, 64")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e7])
def test_values_that_are_not_finite_are_refused(value):
    weight = torch.zeros(4, 64)
    weight[2, 5] = value
    with pytest.raises(LayoutError) as caught:
        quantize(weight, 32)
    assert "torch.float16" in caught.value.problem


def test_inconsistent_tensors_are_refused(make_weight):
    good = make_weight(8, 64, 32)
    with pytest.raises(LayoutError) as caught:
        Int4Weight(good.codes, good.scales, good.zeros, 64)
    assert caught.value.field == "scales"
    with pytest.raises(LayoutError) as caught:
        Int4Weight(good.codes, good.scales, good.zeros.int(), 32)
    assert caught.value.field == "zeros"
    with pytest.raises(LayoutError) as caught:
        Int4Weight(good.codes.int(), good.scales, good.zeros, 32)
    assert caught.value.field == "codes"


def test_concatenated_weights_have_the_values_of_their_parts(make_weight):
    parts = [make_weight(rows, 64, 32, seed=rows) for rows in (3, 5)]
    joined = concatenate(parts)
    assert torch.equal(dequantize(joined), torch.cat([dequantize(part) for part in parts]))
    assert torch.equal(dequantize(joined.rows(3, 8)), dequantize(parts[1]))
    with pytest.raises(LayoutError) as caught:
        concatenate([parts[0], make_weight(3, 64, 64)])
    assert len(caught.value.value) == 2


def test_a_weight_of_128_groups_takes_4_1875_bits_a_value(make_weight):
    weight = make_weight(16, 256, 128)
    assert weight.num_bytes * 8 / (16 * 256) == 4 + 16 / 128 + 8 / 128
