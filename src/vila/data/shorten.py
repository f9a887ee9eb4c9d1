"""Cutting a sample that is too long: whole exchanges from the end, or whole branches. A picture is never cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vila.chat.tokenize import TokenizedSample
from vila.core.types import Sample


def shorten_sample(
    sample: Sample, tokenise: Callable[[Sample], TokenizedSample], max_length: int
) -> TokenizedSample | None:
    """The longest beginning of a sample that has at most `max_length` tokens and ends with an answer of the assistant.

    Of a sample with branches, branches are left out from the end; what they share stays whole.
    Returns None when not even the first exchange, or the first branch, fits, or when there is no answer to end with.
    """
    shorter = _beginnings(sample)
    low, high = 0, len(shorter)
    best: TokenizedSample | None = None
    # Longer beginnings have more tokens, so bisection tokenises a few of them instead of all.
    while low < high:
        middle = (low + high) // 2
        tokens = tokenise(shorter[middle])
        if len(tokens) <= max_length:
            best, low = tokens, middle + 1
        else:
            high = middle
    return best


def _beginnings(sample: Sample) -> list[Sample]:
    """Proper beginnings, from the shortest."""
    if sample.branches:
        return [replace(sample, branches=sample.branches[:count]) for count in range(1, len(sample.branches))]
    ends = [number for number, message in enumerate(sample.messages, start=1) if message.role == "assistant"]
    return [replace(sample, messages=sample.messages[:end]) for end in ends if end < len(sample.messages)]
