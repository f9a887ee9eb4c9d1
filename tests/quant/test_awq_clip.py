"""Clip limits equal those of a brute-force search; sampled tokens; clipped Linears."""

import numpy as np
import pytest
import torch

from tests.quant import brute_force
from vila.quant.apply import fake_quantize
from vila.quant.awq_scale import is_linear_clipped, sample_tokens, search_limits, second_moments


@pytest.mark.parametrize("tokens", [100, 1100])
@pytest.mark.parametrize("outputs", [24, 1100])
def test_limits_are_those_of_brute_force(tokens, outputs):
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randn(min(outputs, 40), 64, generator=generator, dtype=torch.float64) ** 3
    weight = weight.repeat(-(-outputs // len(weight)), 1)[:outputs]
    inputs = torch.randn(tokens, 64, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, 64)
    moments = second_moments(sample_tokens(inputs)[0], 16)
    found = search_limits(weight, moments)
    expected = brute_force.best_limits(inputs.numpy(), weight[:40].numpy(), 16)
    np.testing.assert_allclose(found[:40], expected, rtol=1e-12)
    # Rows are independent of each other, however they are cut.
    assert torch.equal(found[40:], found[: outputs - 40] if outputs > 40 else found[40:])


@pytest.mark.parametrize("symmetric", [False, True])
def test_limits_never_make_the_partial_outputs_worse(symmetric):
    torch.manual_seed(0)
    weight, inputs = torch.randn(64, 128), torch.randn(600, 128)
    limits = search_limits(weight, second_moments(inputs, 64), symmetric)
    clamped = torch.maximum(torch.minimum(weight.unflatten(-1, (2, 64)), limits[..., None]), -limits[..., None])

    def errors(values):
        difference = (fake_quantize(values, 64, symmetric) - weight).unflatten(-1, (2, 64))
        return torch.einsum("tgk,ogk->tog", inputs.unflatten(-1, (2, 64)), difference).square().mean(0)

    plain, limited = errors(weight), errors(clamped.flatten(-2))
    assert (limited <= plain * (1 + 1e-5)).all()
    assert limited.mean() < 0.95 * plain.mean()


@pytest.mark.parametrize("tokens, taken", [(1, 1), (511, 511), (512, 512), (1023, 1023), (1024, 512), (1535, 768)])
def test_every_nth_token_is_taken(tokens, taken):
    inputs = torch.arange(tokens, dtype=torch.float32)[:, None]
    sample, _ = sample_tokens(inputs)
    assert len(sample) == taken
    assert torch.equal(sample, inputs[:: max(1, tokens // 512)])


def test_tokens_that_count_nothing_are_not_sampled_and_weights_are_repetitions():
    inputs = torch.randn(6, 32)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 1.0])
    sample, kept = sample_tokens(inputs, weights)
    assert torch.equal(sample, inputs[[0, 2, 3, 5]])
    repeated = inputs[[0, 2, 2, 3, 5]]
    torch.testing.assert_close(second_moments(sample, 16, kept), second_moments(repeated, 16))


def test_queries_and_keys_are_not_clipped_as_published():
    names = [f"self_attn.{letter}_proj" for letter in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert [name for name in names if is_linear_clipped(name, "published")] == names[2:]
    assert [name for name in names if is_linear_clipped(name, "all")] == names
    assert not any(is_linear_clipped(name, "none") for name in names)
