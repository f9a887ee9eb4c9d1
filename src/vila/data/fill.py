"""Which waiting samples fill a row: a subset sum over lengths, by bit sets in Python integers."""

from __future__ import annotations

from collections.abc import Sequence


def best_fill(lengths: Sequence[int], room: int) -> list[int]:
    """Indices of the items whose lengths add up to the most that is at most `room`; each item once.

    Among the sets that fill equally, longer items win, and of equal lengths the earlier item: short ones are kept to
    fill later rows. Bit s of a set says that the sum s can be reached; one shift and one `or` an item.
    """
    order = sorted((i for i, length in enumerate(lengths) if length <= room), key=lambda i: (lengths[i], -i))
    window = (1 << (room + 1)) - 1
    reachable = [1]
    for item in order:
        last = reachable[-1]
        reachable.append((last | last << lengths[item]) & window)
    target = reachable[-1].bit_length() - 1
    chosen = []
    for place in range(len(order) - 1, -1, -1):
        rest = target - lengths[order[place]]
        if rest >= 0 and reachable[place] >> rest & 1:
            chosen.append(order[place])
            target = rest
    return chosen


def longest_first(lengths: Sequence[int], images: Sequence[int], room: int, max_images: int) -> list[int]:
    """Indices of items taken greedily, longest first, while both their tokens and their images fit."""
    chosen = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[item] <= room and images[item] <= max_images:
            chosen.append(item)
            room -= lengths[item]
            max_images -= images[item]
    return chosen
