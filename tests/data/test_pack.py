"""Lanes pack whole samples, lose none, repeat none, and resume anywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vila.chat.tokenize import TokenizedSample
from vila.core.errors import DataError
from vila.data.batch import collate
from vila.data.pack import Lane, LaneSet


def sample(position, length):
    ids = np.full(length, position)
    zeros = np.zeros(length, dtype=np.int64)
    return TokenizedSample(str(position), ids, ids, np.arange(length), zeros, zeros - 1, zeros, ())


def lengths(seed, longest=40):
    return lambda position: sample(position, 1 + (position * 2654435761 + seed * 97) % longest)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), lanes=st.integers(1, 5), look_ahead=st.integers(1, 20))
def test_every_lane_shows_each_of_its_samples_once_and_no_row_overflows(seed, lanes, look_ahead):
    for number in range(lanes):
        lane = Lane(number, lanes, lengths(seed), max_length=64, look_ahead=look_ahead)
        rows = [lane.row() for _ in range(30)]
        assert all(sum(map(len, row)) <= 64 for row in rows)
        shown = [int(s.id) for row in rows for s in row]
        assert len(shown) == len(set(shown))
        assert all(position % lanes == number for position in shown)
        waiting = set(lane.state.waiting)
        assert set(shown) | waiting == set(range(number, lane.state.next_position, lanes))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), stop=st.integers(0, 20))
def test_a_resumed_lane_set_equals_one_that_ran_through(seed, stop):
    options = {"max_length": 64, "look_ahead": 7}
    whole = LaneSet(lengths(seed), 3, **options)
    steps = [[[s.id for s in row] for row in whole.step()] for _ in range(stop + 5)]
    first = LaneSet(lengths(seed), 3, **options)
    for _ in range(stop):
        first.step()
    again = LaneSet(lengths(seed), 3, states=first.states, **options)
    assert [[[s.id for s in row] for row in again.step()] for _ in range(5)] == steps[stop:]


def test_rows_are_filled_from_the_look_ahead():
    lane = Lane(0, 1, lengths(1), max_length=256, look_ahead=64)
    rows = [lane.row() for _ in range(50)]
    assert sum(sum(map(len, row)) for row in rows) / (50 * 256) > 0.98


def test_without_packing_each_row_is_one_sample_in_order():
    lane = Lane(0, 2, lengths(1), max_length=64, look_ahead=1, packed=False)
    assert [[s.id for s in lane.row()] for _ in range(3)] == [["0"], ["2"], ["4"]]


def test_an_overlong_sample_is_an_error_that_names_it_or_is_dropped_and_counted():
    with pytest.raises(DataError, match="sample '0' has 9 tokens, rows hold 8; raise data.max_length or set"):
        Lane(0, 1, lambda p: sample(p, 9), max_length=8, look_ahead=2).row()
    lane = Lane(0, 1, lambda p: sample(p, 9 if p % 2 else 8), max_length=8, look_ahead=2, overlong="drop")
    assert [lane.row()[0].id for _ in range(3)] == ["0", "2", "4"]
    assert lane.dropped == 4
    with pytest.raises(DataError, match="10000 samples in a row are longer than data.max_length=8"):
        Lane(0, 1, lambda p: sample(p, 9), max_length=8, look_ahead=2, overlong="drop").row()


def test_collate_numbers_segments_through_a_row_and_pads_with_minus_one():
    branched = sample(7, 4)
    branched = TokenizedSample(
        "7", branched.ids, branched.labels, branched.positions, np.array([0, 0, 1, 2]), np.array([-1, -1, 0, 0]),
        branched.slots, (),
    )  # fmt: skip
    batch = collate([[sample(1, 2), branched, sample(2, 1)], [sample(3, 3)]])
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2, 3, 4], [0, 0, 0, -1, -1, -1, -1]]
    assert batch.parents.tolist() == [[-1, -1, -1, -1, 1, 1, -1], [-1] * 7]
    assert batch.num_tokens == 10
