"""Prompt-lookup decoding: draft tokens copied from the text so far (inference with reference, arXiv 2304.04487)."""

from __future__ import annotations

from collections.abc import Sequence

_MAX_NGRAM, _MIN_NGRAM = 3, 2
"""The last three tokens are looked up in the text so far, then the last two."""
_INITIAL_DRAFT = 4
"""Draft tokens of the first step; later steps adapt to how many were accepted."""


class PromptLookup:
    """Index of the n-grams of a growing text, with the position that followed each most recently."""

    def __init__(self, ids: Sequence[int], max_draft: int) -> None:
        """ids: the prompt; negative ids are image placeholders and never drafted. max_draft: draft tokens per step."""
        self.max_draft = max_draft
        self._ids: list[int] = []
        self._next_position: dict[tuple[int, ...], int] = {}
        self._draft_length = min(_INITIAL_DRAFT, max_draft)
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Add a token of the text."""
        # An n-gram is indexed when the token after it is known.
        position = len(self._ids)
        for size in range(_MIN_NGRAM, _MAX_NGRAM + 1):
            if position >= size:
                self._next_position[tuple(self._ids[position - size :])] = position
        self._ids.append(token)

    def draft(self, limit: int) -> list[int]:
        """Return up to `limit` draft tokens; [] if the last tokens have not occurred before."""
        count = min(self._draft_length, limit)
        for size in range(_MAX_NGRAM, _MIN_NGRAM - 1, -1):
            start = self._next_position.get(tuple(self._ids[-size:])) if len(self._ids) >= size else None
            if start is not None:
                return self._copy(start, count)
        return []

    def update(self, drafted: int, accepted: int) -> None:
        """Adapt the draft length: double it after a fully accepted draft, else shorten it to accepted + 1."""
        if drafted:
            self._draft_length = min(self.max_draft, 2 * self._draft_length if accepted == drafted else accepted + 1)

    def _copy(self, start: int, count: int) -> list[int]:
        period = len(self._ids) - start
        found: list[int] = []
        while len(found) < count:
            # Past the end of the text the draft continues periodically.
            index = len(found)
            token = self._ids[start + index] if index < period else found[index - period]
            if token < 0:
                break
            found.append(token)
        return found
