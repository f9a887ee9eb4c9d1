"""Transforms of logits are transformers' own to the bit; draws follow the distribution and never leave it."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vila.engine.sampler import (
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    most_likely,
    penalize_repetition,
    report_logprobs,
    row_generator,
    scale_temperature,
    shape_logits,
)
from vila.engine.sampling_params import SamplingParams

B, V = 6, 500


def random_logits(seed, ties=False):
    logits = torch.randn(B, V, generator=torch.Generator().manual_seed(seed)) * 4
    return logits.round() if ties else logits


def random_text(seed):
    """Ids [B, 40] of a text so far, and which tokens they are."""
    ids = torch.randint(0, V, (B, 40), generator=torch.Generator().manual_seed(seed))
    return ids, torch.zeros(B, V, dtype=torch.bool).scatter(1, ids, True)


CUTS = [
    *((keep_top_k, TopKLogitsWarper, value) for value in (1, 7, V, 10 * V)),
    *((keep_top_p, TopPLogitsWarper, value) for value in (0.001, 0.3, 0.9, 0.999)),
    *((keep_min_p, MinPLogitsWarper, value) for value in (0.01, 0.2, 1.0)),
    *((scale_temperature, TemperatureLogitsWarper, value) for value in (0.3, 1.0, 2.5)),
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("ours", "theirs", "value"), CUTS)
def test_each_cut_is_that_of_transformers(ours, theirs, value, ties):
    for seed in range(10):
        logits = random_logits(seed, ties)
        assert torch.equal(ours(logits, value), theirs(value)(None, logits))


@pytest.mark.parametrize("p", [0.25, 0.5, 0.75])
def test_a_mass_of_exactly_p_is_cut_as_transformers_cuts_it(p):
    even = torch.zeros(1, 4)
    assert torch.equal(keep_top_p(even, p), TopPLogitsWarper(p)(None, even))
    assert keep_top_p(even, p).isfinite().sum() == 4 * p


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    for seed in range(10):
        logits, (ids, seen) = random_logits(seed), random_text(seed)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
        assert torch.equal(penalize_repetition(logits, seen, penalty), expected)


def test_all_transforms_together_are_applied_in_the_order_of_transformers():
    sampling = SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.2)
    chain = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(40),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.05),
        ]
    )
    for seed in range(20):
        logits, (ids, seen) = random_logits(seed), random_text(seed)
        assert torch.equal(shape_logits(logits, seen, sampling), chain(ids, logits))


def test_greedy_choice_is_shaped_by_the_penalty_alone():
    logits, (_, seen) = random_logits(0), random_text(0)
    sampling = SamplingParams(top_k=3, top_p=0.1, repetition_penalty=1.5)
    assert torch.equal(shape_logits(logits, seen, sampling), penalize_repetition(logits, seen, 1.5))
    assert shape_logits(logits, None, SamplingParams()) is logits


def test_draws_have_the_frequencies_of_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.25, 0.2, 0.05])
    count = 20_000
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = draw(probabilities.log().expand(count, -1), uniform)
    found = torch.bincount(drawn, minlength=5) / count
    assert (found - probabilities).abs().max() < 0.012  # four standard deviations are 0.014 at p = 0.5
    assert found[1] == 0


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_tokens_that_are_possible(number):
    logits = torch.tensor([[-torch.inf, -torch.inf, 1.0, 3.0, 0.1, -torch.inf]])
    assert draw(logits, torch.tensor([number], dtype=torch.float64)).tolist() == [2 if number == 0 else 4]


def test_a_row_draws_the_same_beside_any_neighbours():
    logits = random_logits(3)
    uniform = torch.linspace(0, 0.99, B, dtype=torch.float64)
    together = draw(logits, uniform).tolist()
    assert together == [draw(logits[row : row + 1], uniform[row : row + 1]).item() for row in range(B)]


def test_the_numbers_of_a_row_come_from_its_seed_and_place():
    def number(seed, row):
        return torch.rand((), generator=row_generator(seed, row)).item()

    assert number(1, 2) == number(1, 2)
    assert len({number(seed, row) for seed in (0, 1, 2**63 - 1) for row in range(4)}) == 12


def test_reported_log_probabilities_are_those_of_the_whole_vocabulary():
    logits, ids = random_logits(1), torch.arange(B)
    expected = logits.log_softmax(-1)
    for row, report in enumerate(report_logprobs(logits, ids, 4)):
        assert (report.id, report.logprob) == (row, expected[row, row].item())
        best = expected[row].topk(4)
        assert report.top == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    assert len(report_logprobs(logits, ids, V + 5)[0].top) == V


def test_most_likely_tokens_and_whether_they_are_finite():
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = torch.nan
    logits[2, 8] = torch.inf
    logits[3] = 1.0  # ties: the first
    logits[4] = -torch.inf
    ids, finite = most_likely(logits)
    assert ids == logits.argmax(-1).tolist()
    assert ids[1:4] == [7, 8, 0]
    assert finite == [True, False, False, True, False, True]
    assert most_likely(logits[:0]) == ([], [])
