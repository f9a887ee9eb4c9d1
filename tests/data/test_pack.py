"""Lanes pack whole samples, lose none, repeat none, and resume anywhere."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vila.chat.tokenize import IGNORE, TokenizedSample
from vila.core.errors import ConfigError, DataError
from vila.core.types import Image
from vila.data.collate import collate
from vila.data.packing import (
    PackingPolicy,
    PackingStream,
    PackingStreams,
    compact,
    fill_longest_first,
    fill_sequence,
    fit_micro_batch,
    micro_batch_note,
    streams_of_rank,
)


def sample(position, length, images=0):
    ids = np.full(length, position)
    zeros = np.zeros(length, dtype=np.int64)
    media = tuple(Image(f"{position}-{n}.png") for n in range(images))
    return TokenizedSample(str(position), ids, ids, np.arange(length), zeros, zeros - 1, zeros, media)


def lengths(seed, longest=40):
    return lambda position: sample(position, 1 + (position * 2654435761 + seed * 97) % longest)


def lane(fetch, number=0, lanes=1, state=None, shorten=None, **policy):
    return PackingStream(number, lanes, fetch, PackingPolicy(**policy), state=state, shorten=shorten)


def ids(row):
    return [s.id for s in row]


# Lanes


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    lanes=st.integers(1, 5),
    look_ahead=st.integers(1, 20),
    packing=st.sampled_from(["rows", "grouped", "none"]),
)
def test_every_lane_shows_each_of_its_samples_once_and_no_row_overflows(seed, lanes, look_ahead, packing):
    for number in range(lanes):
        one = lane(lengths(seed), number, lanes, max_length=64, look_ahead=look_ahead, packing=packing)
        rows = [one.row() for _ in range(30)]
        assert all(sum(map(len, row)) <= 64 for row in rows)
        shown = [int(s.id) for row in rows for s in row]
        assert shown == [position for row in rows for position in row.positions]
        assert len(shown) == len(set(shown))
        assert all(position % lanes == number for position in shown)
        waiting = set(one.state.waiting)
        assert set(shown) | waiting == set(range(number, one.state.next_position, lanes))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    stop=st.integers(0, 20),
    packing=st.sampled_from(["rows", "grouped", "none"]),
    overlong=st.sampled_from(["drop", "truncate"]),
)
def test_a_resumed_lane_set_equals_one_that_ran_through(seed, stop, packing, overlong):
    policy = PackingPolicy(max_length=30, look_ahead=7, packing=packing, overlong=overlong)
    options = {"policy": policy, "shorten": lambda p, n: sample(p, n) if p % 2 else None}
    whole = PackingStreams(lengths(seed), 3, **options)
    steps = [[ids(row) for row in whole.step()] for _ in range(stop + 5)]
    first = PackingStreams(lengths(seed), 3, **options)
    for _ in range(stop):
        first.step()
    again = PackingStreams(lengths(seed), 3, states=first.states, **options)
    assert [[ids(row) for row in again.step()] for _ in range(5)] == steps[stop:]
    assert first.dropped + again.dropped == whole.dropped
    assert first.truncated + again.truncated == whole.truncated


def test_a_lane_reads_nothing_before_its_first_row():
    def fetch(position):
        raise AssertionError(position)

    assert lane(fetch, state=lane(lengths(0), max_length=64, look_ahead=4).state, max_length=64, look_ahead=4).state


def test_no_sample_waits_longer_than_the_look_ahead():
    # One sample that fits badly between many that fit perfectly.
    one = lane(lambda p: sample(p, 31 if p == 1 else 32), max_length=64, look_ahead=9)
    rows = [one.row() for _ in range(9)]
    assert any("1" in ids(row) for row in rows)


def test_rows_are_full():
    one = lane(lengths(1, 200), max_length=256, look_ahead=64)
    rows = [one.row() for _ in range(50)]
    # Taking always the longest that fits gave 0.985 here.
    assert sum(sum(map(len, row)) for row in rows) / (50 * 256) > 0.995


def test_grouping_gives_all_lanes_a_sample_of_similar_length_and_none_does_not():
    def spread(packing):
        rows = PackingStreams(
            lengths(1, 1000), 8, policy=PackingPolicy(max_length=1000, look_ahead=64, packing=packing)
        )
        steps = [[sum(map(len, row)) for row in rows.step()] for _ in range(128)]
        return sum(max(step) - sum(step) / 8 for step in steps) / 128

    assert spread("grouped") < 0.25 * spread("none")


def test_without_packing_each_row_is_one_sample_in_order():
    one = lane(lengths(1), 0, 2, max_length=64, look_ahead=9, packing="none")
    assert [ids(one.row()) for _ in range(3)] == [["0"], ["2"], ["4"]]


def test_a_row_holds_no_more_pictures_than_allowed():
    one = lane(lambda p: sample(p, 1 + p % 7, images=p % 4), max_length=64, look_ahead=30, max_images=5)
    rows = [one.row() for _ in range(40)]
    assert max(sum(len(s.media) for s in row) for row in rows) == 5
    shown = {position for row in rows for position in row.positions}
    assert shown | set(one.state.waiting) == set(range(one.state.next_position))


# Samples that are too long


def test_an_overlong_sample_is_an_error_that_names_it_or_is_dropped_and_counted():
    with pytest.raises(DataError, match="sample '0' has 9 tokens, rows hold 8") as raised:
        lane(lambda p: sample(p, 9), max_length=8, look_ahead=2).row()
    assert raised.value.field == "data.max_length" and "data.overlong=drop" in raised.value.hint
    one = lane(lambda p: sample(p, 9 if p % 2 else 8), max_length=8, look_ahead=2, overlong="drop")
    rows = [one.row() for _ in range(3)]
    assert [ids(row) for row in rows] == [["0"], ["2"], ["4"]]
    assert sum(row.dropped for row in rows) == 4
    with pytest.raises(DataError, match="10,000 samples in a row are longer than data.max_length=8"):
        lane(lambda p: sample(p, 9), max_length=8, look_ahead=2, overlong="drop").row()


def test_too_many_pictures_in_one_sample_are_an_error_that_says_so():
    with pytest.raises(DataError, match="sample '0' has 3 images, rows hold 2"):
        lane(lambda p: sample(p, 4, images=3), max_length=8, look_ahead=2, max_images=2).row()


def test_an_overlong_sample_is_cut_and_counted_or_dropped_when_it_cannot_be():
    one = lane(
        lambda p: sample(p, 9 if p % 2 else 3),
        shorten=lambda p, most: sample(p, most - 1) if p % 4 == 1 else None,
        max_length=8, look_ahead=4, overlong="truncate",
    )  # fmt: skip
    rows = [one.row() for _ in range(9)]
    shown = {int(s.id): len(s) for row in rows for s in row}
    assert {shown[p] for p in shown if p % 2} == {7}
    assert not [p for p in shown if p % 4 == 3]
    assert sum(row.truncated for row in rows) >= 4 <= sum(row.dropped for row in rows)


# Filling


@settings(max_examples=200, deadline=None)
@given(items=st.lists(st.integers(1, 12), max_size=9), room=st.integers(0, 40))
def test_the_chosen_set_fills_as_much_as_any_set_could(items, room):
    chosen = fill_sequence(items, room)
    assert len(chosen) == len(set(chosen))
    sums = [sum(c) for n in range(len(items) + 1) for c in itertools.combinations(items, n)]
    assert sum(items[i] for i in chosen) == max(s for s in sums if s <= room)


def test_long_samples_are_taken_before_short_ones_that_fill_as_well():
    assert sorted(fill_sequence([2, 3, 5, 4, 1], 5)) == [2]
    assert fill_sequence([4, 4, 4], 4) == [0]


def test_the_greedy_choice_keeps_to_tokens_and_pictures():
    assert fill_longest_first([5, 4, 3, 1], [1, 3, 1, 0], 9, 2) == [0, 2, 3]


# Dealing


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_together_see_the_rows_of_one_process(world):
    policy = PackingPolicy(max_length=64, look_ahead=5)
    alone = PackingStreams(lengths(3), 24, policy=policy)
    ranks = [PackingStreams(lengths(3), 24, policy=policy, rank=rank, world=world) for rank in range(world)]
    for _ in range(4):
        together = [ids(row) for rank in ranks for row in rank.step()]
        assert together == [ids(row) for row in alone.step()]
    assert [state for rank in ranks for state in rank.states] == alone.states
    # And the run goes on with another number of ranks.
    again = [PackingStreams(lengths(3), 24, policy=policy, rank=r, world=4, states=alone.states) for r in range(4)]
    assert [ids(row) for rank in again for row in rank.step()] == [ids(row) for row in alone.step()]


def test_a_rank_reads_its_own_lanes_only():
    read = []

    def fetch(position):
        read.append(position)
        return sample(position, 4)

    PackingStreams(fetch, 6, policy=PackingPolicy(max_length=8, look_ahead=3), rank=1, world=3).step()
    assert {position % 6 for position in read} == {2, 3}


def test_a_batch_that_cannot_be_dealt_is_refused_with_the_numbers_that_would_do():
    with pytest.raises(ConfigError) as caught:
        streams_of_rank(0, 5, 12)
    assert (caught.value.field, caught.value.value, caught.value.expected) == ("batch", 12, "10 or 15")


@pytest.mark.parametrize(
    ("world", "lanes", "micro", "fitting"),
    [(128, 128, 16, 1), (2, 12, 4, 3), (1, 10, 4, 2), (2, 8, 4, 4), (1, 7, 4, 1)],
)
def test_a_micro_batch_that_does_not_fit_the_share_of_a_rank_is_reduced(world, lanes, micro, fitting):
    assert fit_micro_batch(world, lanes, micro) == fitting
    assert bool(micro_batch_note(world, lanes, micro)) == (fitting != micro)


# Memory


def test_a_compact_sample_expands_to_itself_in_a_tenth_of_the_memory():
    is_placeholder = np.repeat([0, 1, 0, 0, 0], [3, 576, 400, 30, 30])
    segments = np.repeat([0, 0, 0, 1, 2], [3, 576, 400, 30, 30])
    tokens = np.where(is_placeholder, 32000, np.arange(1039) * 7 % 32000)
    starts = np.concatenate([np.arange(979), 979 + np.arange(30), 979 + np.arange(30)])
    labels = np.where(np.arange(1039) % 3 == 0, tokens, IGNORE)
    whole = TokenizedSample(
        "a", tokens, labels, starts, segments, np.where(segments > 0, 0, -1), is_placeholder, (Image("a.png"),)
    )
    small = compact(whole)
    again = small.expanded()
    for name in ("ids", "labels", "positions", "segments", "parents", "is_placeholder"):
        assert np.array_equal(getattr(again, name), getattr(whole, name)), name
        assert getattr(again, name).dtype == np.int64
    assert (again.id, again.media, len(small)) == ("a", whole.media, 1039)
    assert small.text_ids.nbytes + len(small.is_placeholder) + len(small.supervised) < 1039 * 48 / 10


# Batches


def test_collate_numbers_segments_through_a_row_and_pads_with_minus_one():
    branched = sample(7, 4)
    branched = TokenizedSample(
        "7", branched.ids, branched.labels, branched.positions, np.array([0, 0, 1, 2]), np.array([-1, -1, 0, 0]),
        branched.is_placeholder, (),
    )  # fmt: skip
    batch = collate([[sample(1, 2), branched, sample(2, 1)], [sample(3, 3)]])
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2, 3, 4], [0, 0, 0, -1, -1, -1, -1]]
    assert batch.parents.tolist() == [[-1, -1, -1, -1, 1, 1, -1], [-1] * 7]
    assert batch.num_tokens == 10
    assert batch.pixels is None
