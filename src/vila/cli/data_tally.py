"""Whole numbers counted by value, and names seen before: what is kept of millions of samples in little memory."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from hashlib import blake2b
from itertools import accumulate

_BINS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_FIRST_SLOTS = 1024


class Seen:
    """Which names came before, as 8-byte hashes in one table: 12 to 24 bytes a name, and 8 KiB, however long it is.

    Two names share a hash once in 2^64; of a hundred million names that is a chance of 1 in 3,700 for one wrong answer.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * _FIRST_SLOTS))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, name: str) -> bool:
        key = _key(name)
        return self._slots[_place(self._slots, key)] == key

    @property
    def nbytes(self) -> int:
        """Memory of the table."""
        return len(self._slots) * self._slots.itemsize

    def add(self, name: str) -> bool:
        """Note a name; whether it is new."""
        key = _key(name)
        place = _place(self._slots, key)
        if self._slots[place]:
            return False
        self._slots[place] = key
        self._count += 1
        if 3 * self._count > 2 * len(self._slots):
            wider = array("Q", bytes(2 * self.nbytes))
            for one in self._slots:
                if one:
                    wider[_place(wider, one)] = one
            self._slots = wider
        return True


def _key(name: str) -> int:
    # 0 marks an empty slot.
    return int.from_bytes(blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(), "big") or 1


def _place(slots: array[int], key: int) -> int:
    """Where `key` is, or the empty slot that it belongs to."""
    mask = len(slots) - 1
    place = key & mask
    while slots[place] and slots[place] != key:
        place = (place + 1) & mask
    return place


def spread(counts: Mapping[int, int]) -> list[int]:
    """Smallest, median (the lower of two) and largest of values counted by value; nothing of nothing.

    >>> spread({5: 1, 1: 2, 9: 1})
    [1, 1, 9]
    """
    if not counts:
        return []
    values = sorted(counts)
    middle = (sum(counts.values()) + 1) // 2
    reached = accumulate(counts[value] for value in values)
    median = next(value for value, so_far in zip(values, reached, strict=True) if so_far >= middle)
    return [values[0], median, values[-1]]


def histogram(counts: Mapping[int, int]) -> dict[str, int]:
    """How many values are at most each bound and over the bound before; bounds double from 32.

    >>> histogram({10: 1, 40: 2, 9000: 1})
    {'32': 1, '64': 2, 'more': 1}
    """
    found: Counter[str] = Counter()
    for value, count in counts.items():
        found[next((str(bound) for bound in _BINS if value <= bound), "more")] += count
    return {name: found[name] for name in (*map(str, _BINS), "more") if found[name]}
