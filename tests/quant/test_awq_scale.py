"""Candidates, statistics and losses of the scale search, and the rounding they are judged by."""

import pytest
import torch
from torch import nn

from vila.core.errors import LayoutError
from vila.kernels.int4 import dequantize, quantize
from vila.quant.apply import fake_quantize
from vila.quant.awq_scale import (
    candidates,
    linear_loss,
    mean_magnitude,
    module_loss,
    replaced_weights,
    search_scale,
    weight_magnitude,
)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_the_search_rounds_as_the_storage_does(symmetric, shift):
    torch.manual_seed(1)
    weight = torch.randn(64, 256) + shift
    weight[0] = 0
    before = weight.clone()
    stored = dequantize(quantize(weight, 32, symmetric=symmetric, dtype=torch.float32), torch.float32)
    assert torch.equal(fake_quantize(weight, 32, symmetric), stored)
    assert torch.equal(weight, before)


def test_the_published_grid_is_twenty_ratios_from_the_identity_on():
    mean = torch.tensor([1e-9, 0.5, 2.0, 8.0])
    tried = candidates(mean)
    assert [one.ratio for one in tried] == pytest.approx([step * 0.05 for step in range(20)])
    assert torch.equal(tried[0].scale_I, torch.ones(4))
    for one in tried:
        assert (one.scale_I.max() * one.scale_I.min()).item() == pytest.approx(1, rel=1e-5)
    # At ratio 0.75, 1e-9 comes to 1.8e-7 and is raised to 1e-4.
    middle = (1e-4 * 8**0.75) ** 0.5
    assert tried[15].scale_I.tolist() == pytest.approx(
        [1e-4 / middle, 0.5**0.75 / middle, 2**0.75 / middle, 8**0.75 / middle]
    )


def test_duo_scales_weigh_activations_against_weights():
    mean, weight = torch.tensor([1.0, 4.0]), torch.tensor([0.25, 1.0])
    tried = candidates(mean, weight, "duo")
    assert [one.duo for one in tried] == [False] + [True] * 19
    assert torch.equal(tried[0].scale_I, torch.ones(2))
    first, last = tried[1].scale_I, tried[-1].scale_I
    assert (first[0] / first[1]).item() == pytest.approx((1 / 0.2501) / (1 / 1.0001))
    assert (last[1] / last[0]).item() == pytest.approx(4.0)
    assert len(candidates(mean, weight, "both")) == 39


def test_inactive_channels_do_not_change_the_others():
    for one in candidates(torch.zeros(4), torch.zeros(4), "both"):
        assert torch.isfinite(one.scale_I).all()


def test_statistics():
    inputs = torch.tensor([[[1.0, -2.0], [3.0, 0.0]]])
    assert mean_magnitude(inputs).tolist() == [2.0, 1.0]
    assert mean_magnitude(inputs, torch.tensor([[3.0, 1.0]])).tolist() == [1.5, 1.5]
    weights = [torch.tensor([[1.0, -2.0, 4.0, 4.0]]), torch.tensor([[3.0, 3.0, 1.0, 0.0]])]
    assert weight_magnitude(weights, 2).tolist() == pytest.approx([0.75, 1.0, 1.0, 0.5], rel=1e-5)


@pytest.mark.parametrize("rows, tokens", [(1, 8), (6, 200)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_linear_alone_costs_the_same_by_either_way(rows, tokens, weighted):
    """With few tokens outputs are compared, with many the second moments are; a module of one Linear is the judge."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 24).double().requires_grad_(False)
    inputs = torch.randn(rows, tokens, 32, dtype=torch.float64) * torch.linspace(0.1, 5, 32)
    weights = torch.rand(rows, tokens) if weighted else None
    alone = linear_loss(linear, inputs, weights, 16, False)
    whole = module_loss([linear], linear, inputs, weights, 16, False, batch=4)
    for scale in (torch.ones(32, dtype=torch.float64), torch.linspace(0.5, 2, 32, dtype=torch.float64)):
        assert alone(scale) == pytest.approx(whole(scale), rel=1e-7)
    direct = (linear(inputs) - nn.functional.linear(inputs, fake_quantize(linear.weight, 16), linear.bias)).square()
    share = torch.ones(rows, tokens) if weights is None else weights
    expected = (direct.mean(-1) * share).sum() / share.sum()
    assert alone(torch.ones(32, dtype=torch.float64)) == pytest.approx(expected.item(), rel=1e-7)


def test_the_first_of_equal_losses_wins_and_no_number_never_does():
    tried = candidates(torch.tensor([1.0, 2.0]))[:4]
    losses = iter([3.0, float("nan"), 1.0, 1.0])
    chosen = search_scale(tried, lambda scale: next(losses))
    assert chosen.best is tried[2]
    with pytest.raises(LayoutError) as caught:
        search_scale(tried, lambda scale: float("nan"))
    assert caught.value.hint


def test_replaced_weights_come_back_also_after_an_error():
    linear = nn.Linear(4, 4)
    own = linear.weight
    with pytest.raises(RuntimeError), replaced_weights([linear], [torch.zeros(4, 4)]):
        assert not linear.weight.any()
        raise RuntimeError
    assert linear.weight is own
