"""Counting in little memory: the same answers as from whole lists and sets."""

import random
from collections import Counter
from statistics import median_low

from vila.data.stats import NameSet, histogram, min_median_max


def test_names_are_known_again_whatever_their_number():
    seen, known = NameSet(), set()
    draw = random.Random(0)
    for _ in range(20_000):
        name = f"picture {draw.randrange(12_000)} \u00e9\ud800"
        assert (name in seen) == (name in known)
        assert seen.add(name) == (name not in known)
        known.add(name)
    assert len(seen) == len(known)


def test_a_name_takes_at_most_24_bytes_however_long_it_is():
    seen = NameSet()
    for number in range(1, 6000):
        seen.add(f"{number:01000d}")
        assert 12 * number <= seen.nbytes <= 24 * number + 8192


def test_spread_is_that_of_the_single_values():
    draw = random.Random(1)
    for size in (1, 2, 3, 10, 101):
        values = [draw.randrange(20) for _ in range(size)]
        assert min_median_max(Counter(values)) == [min(values), median_low(values), max(values)]
    assert min_median_max({}) == []


def test_a_histogram_has_bounds_that_double():
    assert histogram(Counter([10, 32, 33, 64, 9000])) == {"32": 2, "64": 2, "more": 1}
