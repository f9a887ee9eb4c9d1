"""Drafts of the next tokens, looked up in the text so far (inference with reference, arXiv 2304.04487)."""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST, _SHORTEST = 3, 2
"""Tokens that must agree: the last three where they stood before, else the last two."""
_FIRST = 4
"""Tokens of a draft before anything is known of how well they do."""


class PromptLookup:
    """A growing text that knows what followed each few tokens of it last time."""

    def __init__(self, ids: Sequence[int], most: int) -> None:
        """ids: the prompt; negative ones are no tokens and are never part of a draft. most: tokens of a draft."""
        self.most = most
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._width = min(_FIRST, most)
        for token in ids:
            self.take(token)

    def take(self, token: int) -> None:
        """One more token of the text."""
        # The last tokens are known by what follows them, so they are entered when something does.
        place = len(self._ids)
        for size in range(_SHORTEST, _LONGEST + 1):
            if place >= size:
                self._after[tuple(self._ids[place - size :])] = place
        self._ids.append(token)

    def draft(self, limit: int) -> list[int]:
        """Tokens that may come next, at most `limit`; [] when the last ones have not stood there before."""
        count = min(self._width, limit)
        for size in range(_LONGEST, _SHORTEST - 1, -1):
            start = self._after.get(tuple(self._ids[-size:])) if len(self._ids) >= size else None
            if start is not None:
                return self._from(start, count)
        return []

    def update(self, tried: int, accepted: int) -> None:
        """How a draft did: good ones make the next longer, bad ones shorter."""
        if tried:
            self._width = min(self.most, 2 * self._width if accepted == tried else accepted + 1)

    def _from(self, start: int, count: int) -> list[int]:
        period = len(self._ids) - start
        found: list[int] = []
        while len(found) < count:
            # Past the end of the text the draft repeats itself, as a text of that period would.
            place = len(found)
            token = self._ids[start + place] if place < period else found[place - period]
            if token < 0:
                break
            found.append(token)
        return found
