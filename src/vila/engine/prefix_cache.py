"""What earlier conversations left behind: keys and values of their tokens, for those that begin alike."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vila.engine.kv_rows import common_length, content_keys
from vila.engine.vision_cache import Prompt

DEFAULT_BYTES = 2**30


class Sequential(Protocol):
    """The cache of one sequence, in whatever a backend keeps it."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""

    def reset(self, length: int = 0) -> None:
        """Go back to the first `length` tokens."""

    def reserve(self, capacity: int) -> None:
        """Make room for so many tokens in all."""

    def fork(self, length: int | None = None) -> Any:
        """A second sequence with the same tokens, or the first `length` of them."""


@dataclass(frozen=True, eq=False)
class _Kept:
    keys: Sequence[int]
    sequence: Any


class PrefixCache:
    """The sequences of the conversations that ended last, within a budget of bytes; the oldest go first.

    A sequence that is taken is gone until it is put back, so conversations in several threads do not meet in one. They
    are right as long as the model's weights are those that computed them.
    """

    def __init__(self, budget: int = DEFAULT_BYTES) -> None:
        """budget: bytes of keys and values; 0 keeps none."""
        self.budget = budget
        self.reused_tokens = 0
        """Tokens that did not have to be computed, over all conversations."""
        self._kept: list[_Kept] = []
        self._lock = threading.Lock()

    def take(self, prompt: Prompt) -> tuple[Any, int]:
        """The sequence with the longest beginning in common with a prompt, cut to that; None and 0 when there is none.

        One token at least is left to compute, and a image is shared whole or not at all.
        """
        keys = content_keys(prompt)
        with self._lock:
            lengths = [_whole(common_length(kept.keys, keys[:-1]), prompt) for kept in self._kept]
            length = max(lengths, default=0)
            if not length:
                return None, 0
            best = self._kept[lengths.index(length)]
            # What another conversation has only its opening in common with stays whole for its own next turn.
            if 2 * length < len(best.keys):
                sequence = best.sequence.fork(length)
            else:
                self._kept.remove(best)
                sequence = best.sequence
            self.reused_tokens += length
        sequence.reset(length)
        return sequence, length

    def put(self, keys: Sequence[int], sequence: Sequential) -> None:
        """Keep a sequence of these tokens; one that is larger than the budget alone is not kept."""
        sequence.reset(len(keys))
        with self._lock:
            self._kept.append(_Kept(keys, sequence))
            while sum(kept.sequence.nbytes for kept in self._kept) > self.budget:
                self._kept.pop(0)

    def clear(self) -> None:
        """Keep nothing of what was; needed after the weights have changed."""
        with self._lock:
            self._kept.clear()


def _whole(length: int, prompt: Prompt) -> int:
    """`length`, or the start of the image in the midst of which it ends."""
    return min([length, *(start for start, count in prompt.runs if start < length < start + count)])
