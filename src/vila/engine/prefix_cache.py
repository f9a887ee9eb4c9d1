"""Prefix cache of single conversations: reuses the KV cache of earlier ones with a common prefix."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vila.engine.kv_rows import common_length, content_keys
from vila.engine.vision_cache import Prompt

DEFAULT_BYTES = 2**30


class SequenceCache(Protocol):
    """KV cache of one sequence, in the format of a backend."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""

    def reset(self, length: int = 0) -> None:
        """Keep only the first `length` tokens."""

    def reserve(self, capacity: int) -> None:
        """Grow to a capacity of this many tokens."""

    def fork(self, length: int | None = None) -> Any:
        """Return a copy of the sequence, or of its first `length` tokens."""


@dataclass(frozen=True, eq=False)
class _Entry:
    keys: Sequence[int]
    sequence: Any


class PrefixCache:
    """The KV caches of the last conversations within a memory budget; the oldest are evicted first.

    A sequence that is taken is removed until it is put back, so threads never share one. The cache is valid only for
    unchanged weights of the model.
    """

    def __init__(self, budget: int = DEFAULT_BYTES) -> None:
        """budget: bytes of keys and values; 0 disables the cache."""
        self.budget = budget
        self.reused_tokens = 0
        """Prompt tokens found in the cache, over all conversations."""
        self._entries: list[_Entry] = []
        self._lock = threading.Lock()

    def take(self, prompt: Prompt) -> tuple[Any, int]:
        """Return the sequence with the longest common prefix, cut to that, and its length; (None, 0) without a match.

        At least one prompt token is left to compute, and an image is reused whole or not at all.
        """
        keys = content_keys(prompt)
        with self._lock:
            lengths = [_at_image_boundary(common_length(entry.keys, keys[:-1]), prompt) for entry in self._entries]
            length = max(lengths, default=0)
            if not length:
                return None, 0
            best = self._entries[lengths.index(length)]
            # A sequence of which only a small part matches is kept for its own conversation.
            if 2 * length < len(best.keys):
                sequence = best.sequence.fork(length)
            else:
                self._entries.remove(best)
                sequence = best.sequence
            self.reused_tokens += length
        sequence.reset(length)
        return sequence, length

    def put(self, keys: Sequence[int], sequence: SequenceCache) -> None:
        """Add a sequence with these content keys; one larger than the budget is not added."""
        sequence.reset(len(keys))
        with self._lock:
            self._entries.append(_Entry(keys, sequence))
            while sum(entry.sequence.nbytes for entry in self._entries) > self.budget:
                self._entries.pop(0)

    def clear(self) -> None:
        """Remove all entries; required after a change of the weights."""
        with self._lock:
            self._entries.clear()


def _at_image_boundary(length: int, prompt: Prompt) -> int:
    """Return `length`, or the start of the image inside which it ends."""
    return min([length, *(start for start, count in prompt.runs if start < length < start + count)])
