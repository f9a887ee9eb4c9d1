"""The order of samples as a pure function of (seed, epoch, position); no index array is ever held."""

from __future__ import annotations

import hashlib

_ROUNDS = 4


def _round_key(seed: int, epoch: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{epoch}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mix(value: int, key: int) -> int:
    # The finaliser of SplitMix64: full avalanche over 64 bits.
    value = (value + key) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


class Permutation:
    """A pseudo-random bijection of range(size): a Feistel network over the next power of four, walked until inside."""

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self.size = size
        self._half_bits = max(1, ((max(size, 2) - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        self._keys = [_round_key(seed, epoch, number) for number in range(_ROUNDS)]

    def __getitem__(self, position: int) -> int:
        """Image of `position`. Raises IndexError outside range(size)."""
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} is outside range({self.size})")
        value = position
        while True:
            left, right = value >> self._half_bits, value & self._mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right, key) & self._mask)
            value = (left << self._half_bits) | right
            # Cycle walking: on average fewer than four steps, since the domain is at most four times the size.
            if value < self.size:
                return value
