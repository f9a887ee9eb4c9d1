"""The order of samples is a pure function of seed, epoch and position."""

from collections import Counter
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vila.core.errors import DataError
from vila.core.types import Message, Sample
from vila.data.mixture import Mixture, MixtureDataset, Permutation


class Numbers:
    def __init__(self, size, tag="n"):
        self.size, self.tag = size, tag

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return Sample(f"{self.tag}{index}", (Message.of("user", str(index)),))

    unread = MappingProxyType({})
    files = ()

    def location(self, index):
        return self.tag, index


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 500), seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
def test_every_permutation_is_a_bijection(size, seed, epoch):
    order = Permutation(size, seed, epoch)
    assert sorted(order[i] for i in range(size)) == list(range(size))


def test_every_seed_and_epoch_has_its_own_order():
    orders = {tuple(Permutation(50, s, e)[i] for i in range(50)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_a_distant_position_costs_no_more_than_a_near_one():
    assert 0 <= Permutation(10**12, 0, 0)[10**11] < 10**12


def test_a_position_outside_the_range_is_an_index_error():
    with pytest.raises(IndexError):
        Permutation(5, 0, 0)[5]


def ids(mixture, start, stop):
    return [mixture[p][1].id for p in range(start, stop)]


def test_an_epoch_has_every_sample_once():
    mixture = Mixture([MixtureDataset("a", Numbers(7, "a")), MixtureDataset("b", Numbers(5, "b"))], seed=1)
    assert len(set(ids(mixture, 0, 12))) == 12
    assert sorted(ids(mixture, 0, 12)) == sorted(ids(mixture, 12, 24))
    assert ids(mixture, 0, 12) != ids(mixture, 12, 24)


def test_repeats_are_exact_and_fractions_rotate_through_the_whole_set():
    mixture = Mixture(
        [MixtureDataset("a", Numbers(6, "a"), repeat=2), MixtureDataset("b", Numbers(10, "b"), repeat=0.5)], seed=1
    )
    assert mixture.epoch_length == 17
    counts = Counter(ids(mixture, 0, 34))
    assert all(counts[f"a{i}"] == 4 for i in range(6))
    assert all(counts[f"b{i}"] == 1 for i in range(10))


def test_reading_in_another_order_changes_nothing():
    mixture = Mixture([MixtureDataset("a", Numbers(9))], seed=3)
    forward = ids(mixture, 0, 30)
    assert [mixture[p][1].id for p in reversed(range(30))] == forward[::-1]


def test_an_empty_mixture_is_an_error():
    with pytest.raises(DataError):
        Mixture([MixtureDataset("a", Numbers(0))], seed=0)
