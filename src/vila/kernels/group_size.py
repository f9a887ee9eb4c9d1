"""Valid group sizes of INT4 weights, in the layers and in the packings of other programs. Imports no torch."""

from __future__ import annotations

from vila.core.errors import LayoutError

CODES_PER_WORD = 8
"""Codes in a 32-bit word."""


def check_group_size(num_inputs: int, group_size: int) -> None:
    """Raise LayoutError unless the group size is even and divides the number of inputs; lists group sizes that do."""
    if group_size >= 2 and group_size % 2 == 0 and num_inputs >= group_size and num_inputs % group_size == 0:
        return
    divisors = [size for size in (16, 32, 64, 128, 256) if num_inputs >= size and num_inputs % size == 0]
    raise LayoutError(
        f"{num_inputs} inputs cannot be divided into groups of {group_size}",
        field="group_size",
        value=group_size,
        expected=", ".join(map(str, divisors)) or None,
    )


def num_zero_words(num_inputs: int, group_size: int) -> int:
    """Words (eight groups each) per row of zeros in gemv and TinyChat files: even for G=64, a multiple of 4 for G=32.

    Raises LayoutError for group sizes that these files do not support.
    """
    check_group_size(num_inputs, group_size)
    unit = 1 if group_size >= 128 else {64: 2, 32: 4}.get(group_size, 0)
    if not unit:
        problem = "not supported by gemv and tinychat files"
        raise LayoutError(problem, field="group_size", value=group_size, expected="32, 64, 128 or more")
    return -(-num_inputs // (group_size * CODES_PER_WORD * unit)) * unit
