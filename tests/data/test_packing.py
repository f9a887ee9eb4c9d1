"""Packing streams pack whole samples, lose and repeat none, and resume at every step."""

import itertools
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vila.chat.tokenize import IGNORE, TokenizedSample, TokenSegment
from vila.core.errors import ConfigError, DataError
from vila.core.types import Image
from vila.data.collate import collate
from vila.data.packing import (
    PackingPolicy,
    PackingStream,
    PackingStreams,
    fill_longest_first,
    fill_sequence,
    fit_micro_batch,
    micro_batch_note,
    streams_of_rank,
)


def sample(position, length, images=0):
    ids, media = np.full(length, position, np.int32), tuple(Image(f"{position}-{n}.png") for n in range(images))
    return TokenizedSample(str(position), ids, np.ones(length, bool), (TokenSegment(length, 0, -1),), -1, media)


def lengths(seed, longest=40):
    return lambda position: sample(position, 1 + (position * 2654435761 + seed * 97) % longest)


def stream(fetch, number=0, count=1, state=None, shorten=None, **policy):
    return PackingStream(number, count, fetch, PackingPolicy(**policy), state=state, shorten=shorten)


def ids(sequence):
    return [s.id for s in sequence]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 5),
    look_ahead=st.integers(1, 20),
    packing=st.sampled_from(["rows", "grouped", "none"]),
)
def test_a_stream_gives_each_of_its_samples_once_and_no_sequence_is_too_long(seed, count, look_ahead, packing):
    for number in range(count):
        one = stream(lengths(seed), number, count, max_length=64, look_ahead=look_ahead, packing=packing)
        sequences = [one.next_sequence() for _ in range(30)]
        assert all(sum(map(len, sequence)) <= 64 for sequence in sequences)
        packed = [int(s.id) for sequence in sequences for s in sequence]
        assert packed == [position for sequence in sequences for position in sequence.positions]
        assert len(packed) == len(set(packed))
        assert all(position % count == number for position in packed)
        waiting = set(one.state.waiting)
        assert set(packed) | waiting == set(range(number, one.state.next_position, count))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    stop=st.integers(0, 20),
    packing=st.sampled_from(["rows", "grouped", "none"]),
    overlong=st.sampled_from(["drop", "truncate"]),
)
def test_resumed_streams_equal_uninterrupted_ones(seed, stop, packing, overlong):
    policy = PackingPolicy(max_length=30, look_ahead=7, packing=packing, overlong=overlong)
    options = {"policy": policy, "shorten": lambda p, n: sample(p, n) if p % 2 else None}
    whole = PackingStreams(lengths(seed), 3, **options)
    steps = [[ids(sequence) for sequence in whole.step()] for _ in range(stop + 5)]
    first = PackingStreams(lengths(seed), 3, **options)
    for _ in range(stop):
        first.step()
    again = PackingStreams(lengths(seed), 3, states=first.states, **options)
    assert [[ids(sequence) for sequence in again.step()] for _ in range(5)] == steps[stop:]
    assert first.dropped + again.dropped == whole.dropped
    assert first.truncated + again.truncated == whole.truncated


def test_a_stream_reads_nothing_before_its_first_sequence():
    def fetch(position):
        raise AssertionError(position)

    assert stream(fetch, state=stream(lengths(0), max_length=64, look_ahead=4).state, max_length=64, look_ahead=4).state


def test_no_sample_stays_in_the_buffer_longer_than_the_look_ahead():
    # One sample that fits badly between many that fit perfectly.
    one = stream(lambda p: sample(p, 31 if p == 1 else 32), max_length=64, look_ahead=9)
    sequences = [one.next_sequence() for _ in range(9)]
    assert any("1" in ids(sequence) for sequence in sequences)


def test_packing_efficiency_is_over_99_5_percent():
    one = stream(lengths(1, 200), max_length=256, look_ahead=64)
    sequences = [one.next_sequence() for _ in range(50)]
    # Always taking the longest sample that fits gives 0.985 here.
    assert sum(sum(map(len, sequence)) for sequence in sequences) / (50 * 256) > 0.995


def test_grouped_gives_all_streams_a_sample_of_similar_length():
    def imbalance(packing):
        sequences = PackingStreams(
            lengths(1, 1000), 8, policy=PackingPolicy(max_length=1000, look_ahead=64, packing=packing)
        )
        steps = [[sum(map(len, sequence)) for sequence in sequences.step()] for _ in range(128)]
        return sum(max(step) - sum(step) / 8 for step in steps) / 128

    assert imbalance("grouped") < 0.25 * imbalance("none")


def test_without_packing_each_sequence_is_one_sample_in_order():
    one = stream(lengths(1), 0, 2, max_length=64, look_ahead=9, packing="none")
    assert [ids(one.next_sequence()) for _ in range(3)] == [["0"], ["2"], ["4"]]


def test_a_sequence_has_at_most_max_images():
    one = stream(lambda p: sample(p, 1 + p % 7, images=p % 4), max_length=64, look_ahead=30, max_images=5)
    sequences = [one.next_sequence() for _ in range(40)]
    assert max(sum(len(s.media) for s in sequence) for sequence in sequences) == 5
    packed = {position for sequence in sequences for position in sequence.positions}
    assert packed | set(one.state.waiting) == set(range(one.state.next_position))


def test_an_overlong_sample_is_an_error_or_is_dropped_and_counted():
    with pytest.raises(DataError) as raised:
        stream(lambda p: sample(p, 9), max_length=8, look_ahead=2).next_sequence()
    assert (raised.value.field, raised.value.value, raised.value.expected) == ("data.max_length", 9, "at most 8")
    assert "sample '0'" in raised.value.problem and "data.overlong=drop" in raised.value.hint
    one = stream(lambda p: sample(p, 9 if p % 2 else 8), max_length=8, look_ahead=2, overlong="drop")
    sequences = [one.next_sequence() for _ in range(3)]
    assert [ids(sequence) for sequence in sequences] == [["0"], ["2"], ["4"]]
    assert sum(sequence.dropped for sequence in sequences) == 4
    with pytest.raises(DataError) as raised:
        stream(lambda p: sample(p, 9), max_length=8, look_ahead=2, overlong="drop").next_sequence()
    assert raised.value.field == "data.max_length" and "10,000" in raised.value.problem


def test_a_sample_with_too_many_images_is_an_error_with_their_number():
    with pytest.raises(DataError) as raised:
        stream(lambda p: sample(p, 4, images=3), max_length=8, look_ahead=2, max_images=2).next_sequence()
    assert (raised.value.field, raised.value.value, raised.value.expected) == ("data.max_images", 3, "at most 2")


def test_an_overlong_sample_is_cut_and_counted_or_dropped_if_it_cannot_be_cut():
    one = stream(
        lambda p: sample(p, 9 if p % 2 else 3),
        shorten=lambda p, most: sample(p, most - 1) if p % 4 == 1 else None,
        max_length=8, look_ahead=4, overlong="truncate",
    )  # fmt: skip
    sequences = [one.next_sequence() for _ in range(9)]
    packed = {int(s.id): len(s) for sequence in sequences for s in sequence}
    assert {packed[p] for p in packed if p % 2} == {7}
    assert not [p for p in packed if p % 4 == 3]
    assert sum(sequence.truncated for sequence in sequences) >= 4 <= sum(sequence.dropped for sequence in sequences)


@settings(max_examples=200, deadline=None)
@given(items=st.lists(st.integers(1, 12), max_size=9), room=st.integers(0, 40))
def test_fill_sequence_finds_the_largest_possible_sum(items, room):
    chosen = fill_sequence(items, room)
    assert len(chosen) == len(set(chosen))
    sums = [sum(c) for n in range(len(items) + 1) for c in itertools.combinations(items, n)]
    assert sum(items[i] for i in chosen) == max(s for s in sums if s <= room)


def test_fill_sequence_prefers_long_items_and_earlier_ones():
    assert sorted(fill_sequence([2, 3, 5, 4, 1], 5)) == [2]
    assert fill_sequence([4, 4, 4], 4) == [0]


def test_fill_longest_first_respects_tokens_and_images():
    assert fill_longest_first([5, 4, 3, 1], [1, 3, 1, 0], 9, 2) == [0, 2, 3]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_all_ranks_together_give_the_sequences_of_one_process(world):
    policy = PackingPolicy(max_length=64, look_ahead=5)
    alone = PackingStreams(lengths(3), 24, policy=policy)
    ranks = [PackingStreams(lengths(3), 24, policy=policy, rank=rank, world=world) for rank in range(world)]
    for _ in range(4):
        together = [ids(sequence) for rank in ranks for sequence in rank.step()]
        assert together == [ids(sequence) for sequence in alone.step()]
    assert [state for rank in ranks for state in rank.states] == alone.states
    # Resuming with another number of ranks.
    again = [PackingStreams(lengths(3), 24, policy=policy, rank=r, world=4, states=alone.states) for r in range(4)]
    assert [ids(sequence) for rank in again for sequence in rank.step()] == [ids(sequence) for sequence in alone.step()]


def test_a_rank_reads_the_samples_of_its_own_streams_only():
    read = []

    def fetch(position):
        read.append(position)
        return sample(position, 4)

    PackingStreams(fetch, 6, policy=PackingPolicy(max_length=8, look_ahead=3), rank=1, world=3).step()
    assert {position % 6 for position in read} == {2, 3}


def test_a_batch_that_the_ranks_do_not_divide_is_an_error_with_the_nearest_sizes():
    with pytest.raises(ConfigError) as caught:
        streams_of_rank(0, 5, 12)
    assert (caught.value.field, caught.value.value, caught.value.expected) == ("batch", 12, "10 or 15")


@pytest.mark.parametrize(
    ("world", "count", "micro", "fitting"),
    [(128, 128, 16, 1), (2, 12, 4, 3), (1, 10, 4, 2), (2, 8, 4, 4), (1, 7, 4, 1)],
)
def test_a_micro_batch_that_does_not_divide_the_sequences_of_a_rank_is_reduced(world, count, micro, fitting):
    assert fit_micro_batch(world, count, micro) == fitting
    assert bool(micro_batch_note(world, count, micro)) == (fitting != micro)


def test_arrays_of_a_sample_with_a_shared_prefix_are_computed_from_a_compact_form():
    is_placeholder = np.repeat([0, 1, 0, 0, 0], [3, 576, 400, 30, 30])
    ids = np.where(is_placeholder, 32000, np.arange(1039) * 7 % 32000).astype(np.int32)
    is_supervised = np.arange(1039) % 3 == 0
    segments = (TokenSegment(979, 0, -1), TokenSegment(30, 979, 0), TokenSegment(30, 979, 0))
    whole = TokenizedSample("a", ids, is_supervised, segments, 32000, (Image("a.png"),))
    assert np.array_equal(whole.is_placeholder, is_placeholder)
    assert np.array_equal(whole.labels, np.where(is_supervised, ids, IGNORE))
    assert np.array_equal(whole.positions, [*range(979), *range(979, 1009), *range(979, 1009)])
    assert np.array_equal(whole.segment_ids, np.repeat([0, 1, 2], [979, 30, 30]))
    assert np.array_equal(whole.parent_ids, np.repeat([-1, 0, 0], [979, 30, 30]))
    assert {getattr(whole, name).dtype for name in ("labels", "positions", "segment_ids", "parent_ids")} == {
        np.dtype(np.int64)
    }
    assert len(pickle.dumps(whole)) < 1039 * 48 / 7  # seven int64 arrays would take 1039 * 56 bytes


def test_collate_numbers_segments_through_a_sequence_and_pads_with_minus_one():
    segments = (TokenSegment(2, 0, -1), TokenSegment(1, 2, 0), TokenSegment(1, 2, 0))
    branched = replace(sample(7, 4), segments=segments)
    batch = collate([[sample(1, 2), branched, sample(2, 1)], [sample(3, 3)]])
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2, 3, 4], [0, 0, 0, -1, -1, -1, -1]]
    assert batch.parents.tolist() == [[-1, -1, -1, -1, 1, 1, -1], [-1] * 7]
    assert batch.num_tokens == 10
    assert batch.pixels is None
