"""Positions and attention masks of a batch's KV cache columns.

Rows are padded on the right in each phase, so real tokens and padding alternate along a row. Sliding windows count
positions of real tokens, not columns, so a row's result does not depend on the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vila.core.errors import ConfigError
from vila.model.modeling import cached_mask

# B batch rows  Q columns of a step  K filled columns  C capacity

PADDING = -1
"""Position of a padding column."""


class CachePositions:
    """Positions of a batch: `places_BC` has the position of each column's token in its row, -1 for padding."""

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.places_BC = torch.full((rows, capacity), PADDING, dtype=torch.long, device=device)
        self.lengths_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.filled = 0
        self.padded = False
        """Whether any filled column is padding."""
        self._last_whole = True

    def append(self, counts: Sequence[int]) -> Tensor:
        """Append `counts[b]` tokens to row b. Returns their positions [B, Q]; those of padding are unused."""
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
        """Remove the last `count` columns, in which every row has a token."""
        self.filled -= count
        self.places_BC[:, self.filled : self.filled + count] = PADDING
        self.lengths_B = self.lengths_B - count

    def select(self, rows: Tensor) -> None:
        """Make row i a copy of the old row rows[i]."""
        self.places_BC, self.lengths_B = self.places_BC[rows], self.lengths_B[rows]
        self.padded = self.padded and bool((self.places_BC[:, : self.filled] == PADDING).any())

    def mask(self, width: int, window: int | None = None) -> Tensor | None:
        """Return the mask of the last `width` columns as queries: bool [B, 1, Q, K], True: attend.

        Queries attend to the real tokens up to themselves, with a sliding window to the last `window` of them. None if
        there is no padding: plain causal attention.
        """
        if not self.padded:
            return None
        keys_BK = self.places_BC[:, : self.filled]
        real_BK = keys_BK != PADDING
        is_single = width == 1 and self._last_whole
        seen = real_BK[:, None, None] if is_single else cached_mask(real_BK, width)
        if window is not None:
            seen = seen & (keys_BK[:, None, None] > keys_BK[:, None, self.filled - width :, None] - window)
        return seen

    def masks(self, width: int, text_config: Any) -> Tensor | dict[str, Tensor | None] | None:
        """Return the LLM's attention mask: one for all layers, or one per layer type."""
        window = getattr(text_config, "sliding_window", None)
        layer_types = getattr(text_config, "layer_types", None)
        if not self.padded or not layer_types:
            return self.mask(width, window)
        return {
            layer_type: self.mask(width, window if layer_type == "sliding_attention" else None)
            for layer_type in set(layer_types)
        }


def check_attention(text_config: Any) -> None:
    """Raise ConfigError for an LLM whose attention these masks do not support."""
    problems = []
    if (implementation := getattr(text_config, "_attn_implementation", None)) not in ("sdpa", None):
        problems.append(f"attention {implementation!r} is not supported; load the model with 'sdpa'")
    unknown = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        problems.append(f"layers with {', '.join(sorted(unknown))}: only full and sliding attention are supported")
    if problems:
        raise ConfigError.collect("engine", problems)
