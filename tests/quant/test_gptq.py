"""Rounding with GPTQ: less error of the output than plain rounding, on the same storage."""

import pytest
import torch

from vila.core.errors import LayoutError
from vila.kernels.int4 import dequantize, quantize, unpack_nibbles
from vila.quant.gptq import gptq_round, refit_scales, second_moment

GROUP = 16


def output_error(weight_OI, values_OI, moments_II):
    """Squared output error, summed over channels, mean over tokens."""
    error_OI = values_OI - weight_OI
    return float(((error_OI @ moments_II) * error_OI).sum(dtype=torch.float64))


@pytest.fixture(params=range(3))
def case(request):
    """A weight [24, 64], its plain rounding, and the moments of inputs whose channels are much alike."""
    generator = torch.Generator().manual_seed(request.param)
    mixed_II = torch.randn(64, 64, generator=generator) / 8 + torch.eye(64)
    inputs_TI = torch.randn(400, 64, generator=generator) @ mixed_II + torch.randn(400, 1, generator=generator)
    weight_OI = torch.randn(24, 64, generator=generator)
    return weight_OI, quantize(weight_OI, GROUP), second_moment(inputs_TI)


def test_codes_chosen_by_gptq_leave_less_error_than_the_nearest(case):
    weight_OI, grid, moments_II = case
    before = output_error(weight_OI, dequantize(grid), moments_II)
    rounded = gptq_round(weight_OI, grid, moments_II)
    # Worst of three seeds: 0.40.
    assert output_error(weight_OI, dequantize(rounded), moments_II) < 0.6 * before
    assert torch.equal(rounded.scales, grid.scales)
    assert torch.equal(rounded.zeros, grid.zeros)


def test_refitted_scales_leave_less_error_on_the_same_codes(case):
    weight_OI, grid, moments_II = case
    rounded = gptq_round(weight_OI, grid, moments_II)
    fitted = refit_scales(weight_OI, rounded, moments_II)
    assert torch.equal(fitted.codes, rounded.codes)
    before, after = (output_error(weight_OI, dequantize(one), moments_II) for one in (rounded, fitted))
    assert after < before


def test_inputs_that_have_nothing_in_common_are_rounded_to_the_nearest(case):
    weight_OI, grid, _ = case
    rounded = gptq_round(weight_OI, grid, torch.diag(torch.rand(64) + 0.1))
    assert torch.equal(rounded.codes, grid.codes)


def test_one_column_takes_over_what_its_twin_lost():
    """Two inputs that are always equal: only the sum of their weights matters, and the second one makes up for it."""
    weight_OI = torch.tensor([[0.0, 15.0, 4.4, 4.4]])
    grid = quantize(weight_OI, 4)
    moments_II = torch.diag(torch.tensor([1.0, 1.0, 9.0, 9.0]))
    moments_II[2, 3] = moments_II[3, 2] = 9.0
    codes = unpack_nibbles(gptq_round(weight_OI, grid, moments_II, damping=1e-4).codes)
    assert unpack_nibbles(grid.codes).tolist() == [[0, 15, 4, 4]]
    assert codes.tolist() == [[0, 15, 4, 5]]


def test_a_token_counts_as_much_as_its_weight():
    inputs_TI = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    twice = torch.cat([inputs_TI, inputs_TI[:2]])
    torch.testing.assert_close(second_moment(inputs_TI, torch.tensor([2.0, 2, 1, 1, 1])), second_moment(twice))
    torch.testing.assert_close(second_moment(inputs_TI, torch.tensor([1.0, 1, 1, 0, 0])), second_moment(inputs_TI[:3]))


def test_fewer_tokens_than_inputs_are_enough(case):
    weight_OI, grid, _ = case
    few = second_moment(torch.randn(3, 64, generator=torch.Generator().manual_seed(1)))
    rounded = refit_scales(weight_OI, gptq_round(weight_OI, grid, few), few)
    assert bool(dequantize(rounded).isfinite().all())
    assert output_error(weight_OI, dequantize(rounded), few) < output_error(weight_OI, dequantize(grid), few)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(case, value):
    weight_OI, grid, moments_II = case
    with pytest.raises(LayoutError, match="not finite"):
        gptq_round(weight_OI, grid, moments_II + value)
