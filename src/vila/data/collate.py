"""The batch: packed rows as tensors, and the three readings of who sees whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vila.chat.tokenize import IGNORE, TokenizedSample
from vila.core.types import Image, Video
from vila.data.packing import PackedSequence
from vila.data.workers import SharedPixels

# B rows  S tokens of a row  N media items  H,W pixels


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of whole samples. All tensors are int64 [B, S], except
    `is_placeholder`, bool, and `pixels`, float32 [N, 3, H, W].

    labels:    supervised ids, -100 elsewhere; the label at place t is predicted from place t - 1 of the same segment.
    positions: restart at 0 in every sample, and after a shared prefix go on from its end in every branch.
    segments:  numbers the parts of a row; padding is -1.
    parents:   the one segment that a token's segment also sees, -1 for none.
    media:     all pictures in reading order, row by row.
    pixels:    the same pictures decoded; None when there are none, or when they were not decoded with the rows.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor
    parents: Tensor
    is_placeholder: Tensor
    media: tuple[Image | Video, ...]
    pixels: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segments >= 0).sum())

    @property
    def num_supervised(self) -> int:
        """Labels that count in the loss."""
        return int((self.labels != IGNORE).sum())


def empty_batch() -> Batch:
    """One token that is no label and no image, for a process without samples that takes part in a forward pass."""
    zero, none = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), -1, dtype=torch.int64)
    return Batch(zero, torch.full_like(zero, IGNORE), zero, zero, none, zero.bool(), ())


def collate(rows: Sequence[Sequence[TokenizedSample]], pad_id: int = 0, *, pin: bool = False) -> Batch:
    """Rows of samples as one batch, padded on the right to the longest row.

    pin: put all tensors into page-locked memory, from which a GPU copies while the processor goes on.
    """
    width = max(sum(map(len, row)) for row in rows)
    fields = {name: np.zeros((len(rows), width), dtype=np.int64) for name in ("ids", "positions", "is_placeholder")}
    fields["ids"] += pad_id
    fields["labels"] = np.full((len(rows), width), IGNORE, dtype=np.int64)
    fields["segments"] = np.full((len(rows), width), -1, dtype=np.int64)
    fields["parents"] = np.full((len(rows), width), -1, dtype=np.int64)
    for number, row in enumerate(rows):
        start = numbered = 0
        for sample in row:
            here = slice(start, start + len(sample))
            for name in ("ids", "labels", "positions", "is_placeholder"):
                fields[name][number, here] = getattr(sample, name)
            fields["segments"][number, here] = sample.segments + numbered
            fields["parents"][number, here] = np.where(sample.parents >= 0, sample.parents + numbered, -1)
            start += len(sample)
            numbered += int(sample.segments[-1]) + 1
    tensors = {name: torch.from_numpy(array) for name, array in fields.items()}
    tensors["is_placeholder"] = tensors["is_placeholder"].bool()
    media = tuple(item for row in rows for sample in row for item in sample.media)
    pixels = stack_pixels(rows)
    if pixels is not None:
        tensors["pixels"] = pixels
    if pin:
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return Batch(**tensors, media=media)


def stack_pixels(rows: Sequence[Sequence[TokenizedSample]]) -> Tensor | None:
    """The decoded pictures of rows, float32 [N, 3, H, W]; None without any. Those of workers are normalised into it."""
    blocks = [
        row.pixels for row in rows if isinstance(row, PackedSequence) and row.pixels is not None and len(row.pixels)
    ]
    if not blocks:
        return None
    first = blocks[0].squares[0] if isinstance(blocks[0], SharedPixels) else blocks[0][0]
    out = np.empty((sum(map(len, blocks)), *first.shape), np.float32)
    start = 0
    for block in blocks:
        here = out[start : start + len(block)]
        if isinstance(block, SharedPixels):
            block.write(here)
        else:
            np.stack(block, out=here)
        start += len(block)
    return torch.from_numpy(out)


def split_conversations(row: Sequence[TokenizedSample]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The conversations of a row one by one as (ids, places in the row): each branch behind its prefix.

    The reference for "a row equals its parts".
    """
    out = []
    start = 0
    for sample in row:
        places = np.arange(start, start + len(sample))
        parent_of = dict(zip(sample.segments.tolist(), sample.parents.tolist(), strict=True))
        # A segment that others see is their beginning, not a conversation of its own.
        for number in sorted(parent_of.keys() - set(parent_of.values())):
            own = (sample.segments == number) | (sample.segments == parent_of[number])
            out.append((sample.ids[own], places[own]))
        start += len(sample)
    return out
