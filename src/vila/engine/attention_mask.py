"""Which token stands in which column of the cache, and which columns a step may see.

Rows are padded on the right inside each phase, so real tokens and padding alternate along a row. Distances are counted
in positions of real tokens, never in columns: a row's numbers do not depend on how its neighbours pad it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vila.core.errors import ConfigError
from vila.model.modeling import cached_mask

# B rows  Q columns of a step  K filled columns  C capacity

PADDING = -1
"""In place of a token's position."""


class CachePositions:
    """The columns of a batch: `places_BC` has the position of each column's token in its row, -1 for padding."""

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.places_BC = torch.full((rows, capacity), PADDING, dtype=torch.long, device=device)
        self.lengths_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.filled = 0
        self.padded = False
        """Whether any filled column of any row is padding."""
        self._last_whole = True

    def append(self, counts: Sequence[int]) -> Tensor:
        """Take up a phase of `counts[b]` tokens in row b. Returns its positions [B, Q]; those of padding are unused."""
        width = max(counts)
        steps_Q = torch.arange(width, device=self.places_BC.device)
        positions_BQ = self.lengths_B[:, None] + steps_Q
        new = self.places_BC[:, self.filled : self.filled + width]
        self._last_whole = min(counts) == width
        if self._last_whole:
            new.copy_(positions_BQ)
            self.lengths_B = self.lengths_B + width
        else:
            counts_B = torch.tensor(counts, device=self.places_BC.device)
            new.copy_(positions_BQ.masked_fill(steps_Q >= counts_B[:, None], PADDING))
            self.lengths_B = self.lengths_B + counts_B
            self.padded = True
        self.filled += width
        return positions_BQ

    def drop(self, count: int) -> None:
        """Take back the last `count` columns, in which every row has a token."""
        self.filled -= count
        self.places_BC[:, self.filled : self.filled + count] = PADDING
        self.lengths_B = self.lengths_B - count

    def select(self, rows: Tensor) -> None:
        """Make row i the old row rows[i]."""
        self.places_BC, self.lengths_B = self.places_BC[rows], self.lengths_B[rows]
        self.padded = self.padded and bool((self.places_BC[:, : self.filled] == PADDING).any())

    def mask(self, width: int, window: int | None = None) -> Tensor | None:
        """Mask of the last `width` columns as queries: bool [B, 1, Q, K], True = may attend.

        Queries see the real tokens before them and themselves, at most `window` in all when there is one. None when
        no column is padding: plain causal attention, which the model knows best itself.
        """
        if not self.padded:
            return None
        keys_BK = self.places_BC[:, : self.filled]
        real_BK = keys_BK != PADDING
        alone = width == 1 and self._last_whole
        seen = real_BK[:, None, None] if alone else cached_mask(real_BK, width)
        if window is not None:
            seen = seen & (keys_BK[:, None, None] > keys_BK[:, None, self.filled - width :, None] - window)
        return seen

    def masks(self, width: int, text_config: Any) -> Tensor | dict[str, Tensor | None] | None:
        """What the LLM takes as its attention mask: one for all layers, or one for each kind of layer."""
        window = getattr(text_config, "sliding_window", None)
        kinds = getattr(text_config, "layer_types", None)
        if not self.padded or not kinds:
            return self.mask(width, window)
        return {kind: self.mask(width, window if kind == "sliding_attention" else None) for kind in set(kinds)}


def check_attention(text_config: Any) -> None:
    """Raises ConfigError for an LLM whose attention these masks do not describe."""
    problems = []
    if (implementation := getattr(text_config, "_attn_implementation", None)) not in ("sdpa", None):
        problems.append(f"attention {implementation!r}: masks are made for 'sdpa'; load the model with that")
    unknown = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        problems.append(f"layers with {', '.join(sorted(unknown))}: only full and sliding attention are supported")
    if problems:
        raise ConfigError.collect("engine", problems)
