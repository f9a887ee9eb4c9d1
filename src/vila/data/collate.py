"""Collation: packed sequences to padded tensors, with segment ids for block-diagonal attention."""

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

# B sequences  S tokens of a sequence  N images  H,W pixels


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of packed sequences. All tensors are int64 [B, S], except `pixels`, float32 [N, 3, H, W].

    labels:    ids of supervised tokens, -100 elsewhere; a label is predicted from the token before it.
    positions: position ids; they restart in every sample, and continue after a shared prefix in every branch.
    segments:  segment id of each token, numbered through the sequence; -1 at padding.
    parents:   id of the one other segment that a token's segment attends to, -1 for none.
    media:     all images in reading order, sequence by sequence.
    pixels:    the same images decoded; None if there are none, or if images are not decoded by the loader.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor
    parents: Tensor
    media: tuple[Image | Video, ...]
    pixels: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens without padding."""
        return int((self.segments >= 0).sum())

    @property
    def num_supervised(self) -> int:
        """Number of labels that count in the loss."""
        return int((self.labels != IGNORE).sum())


def empty_batch() -> Batch:
    """Return a batch of one unsupervised text token, for a rank without samples that must join a forward pass."""
    zero, none = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), -1, dtype=torch.int64)
    return Batch(zero, torch.full_like(zero, IGNORE), zero, zero, none, ())


def collate(sequences: Sequence[Sequence[TokenizedSample]], pad_id: int = 0, *, pin: bool = False) -> Batch:
    """Return the sequences as one batch, padded on the right to the longest one.

    pin: allocate the tensors in page-locked memory, from which copies to a GPU are asynchronous.
    """
    width = max(sum(map(len, sequence)) for sequence in sequences)
    fill = {"ids": pad_id, "labels": IGNORE, "positions": 0, "segments": -1, "parents": -1}
    arrays = {name: np.full((len(sequences), width), value, dtype=np.int64) for name, value in fill.items()}
    for number, sequence in enumerate(sequences):
        start = num_segments = 0
        for sample in sequence:
            here = number, slice(start, start + len(sample))
            parents = sample.parent_ids
            arrays["ids"][here] = sample.ids
            arrays["labels"][here] = np.where(sample.is_supervised, sample.ids, IGNORE)
            arrays["positions"][here] = sample.positions
            arrays["segments"][here] = sample.segment_ids + num_segments
            arrays["parents"][here] = np.where(parents >= 0, parents + num_segments, -1)
            start += len(sample)
            num_segments += len(sample.segments)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    pixels = _batch_pixels(sequences)
    if pixels is not None:
        tensors["pixels"] = pixels
    if pin:
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    media = tuple(item for sequence in sequences for sample in sequence for item in sample.media)
    return Batch(**tensors, media=media)


def _batch_pixels(sequences: Sequence[Sequence[TokenizedSample]]) -> Tensor | None:
    """Return the decoded images of the sequences, float32 [N, 3, H, W], None without any.

    Images from workers are normalised directly into the tensor.
    """
    blocks = [one.pixels for one in sequences if isinstance(one, PackedSequence) and one.pixels]
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
