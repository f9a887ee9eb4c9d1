"""Rows of the pool: who gets which, what is shared, and that nothing is lost when the pool is divided anew."""

import random

import pytest
import torch

from tests import tiny
from vila.engine.kv_cache_pool import KVCachePool
from vila.engine.kv_rows import KVRows, common_length, content_keys
from vila.engine.vision_cache import HashedImage, Prompt


def make(tokens=256, most=4):
    return KVRows(KVCachePool(2, 1, 2, tokens, dtype=torch.float32, device=torch.device("cpu")), most)


def numbers(*bounds):
    return list(range(*bounds))


def fill(slots, slot, keys):
    """Do as the model: compute what is not there yet, here each token's key as its number."""
    for column in range(len(slot.content), len(keys)):
        for layer in range(2):
            slots.pool.keys[layer][slot.row, :, column] = float(keys[column])
            slots.pool.values[layer][slot.row, :, column] = -float(keys[column])
    slot.content = list(keys)


def is_right(slots, slot):
    wanted = torch.tensor(slot.content, dtype=torch.float32)
    return all(
        torch.equal(slots.pool.keys[layer][slot.row, 0, : len(wanted), 1], wanted)
        and torch.equal(slots.pool.values[layer][slot.row, 0, : len(wanted), 0], -wanted)
        for layer in range(2)
    )


def test_common_length_is_that_of_a_plain_walk():
    draw = random.Random(0)
    for _ in range(200):
        one, other = ([draw.randrange(2) for _ in range(draw.randrange(9))] for _ in range(2))
        agree = [a == b for a, b in zip(one, other, strict=False)]
        assert common_length(one, other) == next((i for i, same in enumerate(agree) if not same), len(agree))


def test_keys_tell_pictures_apart_and_know_equal_ones():
    def keys(*pictures):
        media = tuple(HashedImage(image.key(), image) for image in map(tiny.image, pictures))
        return content_keys(Prompt([9, 5, 5, 8, 5, 5], ((1, 2), (4, 2)), media))

    assert keys(1, 2) == keys(1, 2)
    assert common_length(keys(1, 2), keys(1, 3)) == 4
    assert common_length(keys(2, 1), keys(1, 2)) == 1
    assert [key for key in keys(1, 2) if key >= 0] == [9, 8]


def test_what_a_finished_request_left_is_shared_by_the_next_that_begins_alike():
    slots = make()
    first = slots.allocate(numbers(40), 50)
    fill(slots, first, numbers(40))
    slots.release(first)
    second = slots.allocate([*range(30), 7], 50)
    assert second.content == numbers(30)
    assert second.row != first.row
    assert is_right(slots, second) and is_right(slots, first)
    assert (slots.tokens_owned, slots.tokens_cached) == (30, 40)


def test_one_token_of_a_prompt_is_always_computed():
    slots = make()
    first = slots.allocate(numbers(40), 50)
    fill(slots, first, numbers(40))
    slots.release(first)
    assert len(slots.allocate(numbers(40), 50).content) == 39


def test_a_conversation_goes_on_in_its_own_row():
    slots = make()
    first = slots.allocate(numbers(20), 50)
    fill(slots, first, numbers(30))
    slots.release(first)
    again = slots.allocate(numbers(40), 50)
    assert (again.row, len(again.content)) == (first.row, 30)


def test_a_running_neighbour_shares_what_it_has_and_is_waited_for_when_it_is_about_to_have_more():
    slots = make()
    first = slots.allocate(numbers(40), 50)
    assert slots.allocate([*range(39), 7], 50) is None
    fill(slots, first, numbers(24))
    assert slots.allocate([*range(39), 7], 50).content == numbers(24)
    assert slots.allocate([99, *range(39)], 50).content == []


def test_rows_used_longest_ago_are_given_away_first():
    slots = make(most=2)
    for begin in (100, 200):
        slot = slots.allocate(numbers(begin, begin + 40), 50)
        fill(slots, slot, numbers(begin, begin + 40))
        slots.release(slot)
    touched = slots.allocate(numbers(100, 140), 50)
    slots.release(touched)
    slots.allocate(numbers(300, 340), 50)
    assert slots.allocate(numbers(200, 240), 50).content == []


def test_a_long_request_gets_longer_rows_and_the_running_ones_move_with_what_they_hold():
    slots = make(tokens=256, most=8)
    assert (slots.pool.rows, slots.pool.columns) == (8, 32)
    short = [slots.allocate(numbers(begin, begin + 20), 32) for begin in (100, 200)]
    for slot, begin in zip(short, (100, 200), strict=True):
        fill(slots, slot, numbers(begin, begin + 20))
    long = slots.allocate(numbers(60), 80)
    assert slots.pool.columns >= 80
    fill(slots, long, numbers(60))
    assert all(is_right(slots, slot) for slot in (*short, long))
    assert len({slot.row for slot in (*short, long)}) == 3
    assert slots.allocate(numbers(400, 420), 32) is None
    slots.release(long)
    assert slots.allocate(numbers(400, 420), 32) is not None


def test_after_a_long_request_there_are_as_many_rows_again():
    slots = make(tokens=256, most=8)
    long = slots.allocate(numbers(200), 250)
    assert slots.pool.rows == 1
    fill(slots, long, numbers(200))
    slots.release(long)
    placed = [slots.allocate([begin, *range(20)], 32) for begin in range(1000, 1008)]
    assert None not in placed
    assert len({slot.row for slot in placed}) == 8


def test_a_request_fits_or_it_never_will():
    slots = make(tokens=100)
    assert slots.fits_ever(96)
    assert not slots.fits_ever(97)


def test_what_is_not_to_be_trusted_is_not_shared_and_does_not_stay_in_memory():
    slots = make()
    first = slots.allocate(numbers(40), 50)
    fill(slots, first, numbers(40))
    slots.pool.values[1][first.row, 0, 3] = torch.nan
    slots.forget(first)
    assert all(tensor.isfinite().all() for tensor in slots.pool.values)
    assert slots.allocate(numbers(40), 50).content == []


@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_and_goes_every_row_holds_what_it_says(seed):
    draw = random.Random(seed)
    slots = make(tokens=draw.choice([100, 256, 400]), most=draw.randrange(1, 6))
    running = []
    for _ in range(150):
        if running and draw.random() < 0.5:
            slot = running.pop(draw.randrange(len(running)))
            slots.forget(slot) if draw.random() < 0.1 else slots.release(slot)
        begin = draw.choice([0, 0, 100, 200])
        keys = [*range(begin, begin + draw.randrange(1, 60)), draw.randrange(1000)]
        columns = len(keys) + draw.randrange(1, 20)
        if slots.fits_ever(columns) and (slot := slots.allocate(keys, columns)) is not None:
            assert slot.content == keys[: len(slot.content)]
            assert len(slot.content) < len(keys)
            assert slots.pool.columns >= columns
            fill(slots, slot, keys)
            running.append(slot)
        assert all(is_right(slots, slot) for slot in slots.rows)
        rows = [slot.row for slot in slots.rows]
        assert rows == list(range(slots.pool.rows))
        assert {id(slot) for slot in running} == {id(slot) for slot in slots.rows if slot.reserved}
        assert slots.pool.rows * slots.pool.columns <= slots.pool.tokens
