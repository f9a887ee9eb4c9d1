"""A tokenised sample in little memory: look-ahead buffers and pipes hold thousands of them.

Of the six int64 arrays only the ids of text, one bit a token for "supervised" and one for "slot", and the bounds of
the parts are kept: some four bytes a text token and a quarter of a byte an image token, instead of 48.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vila.chat.tokenize import IGNORE, TokenizedSample
from vila.core.types import Image, Video


@dataclass(frozen=True, slots=True)
class CompactSample:
    """What `expanded` needs to rebuild a TokenizedSample exactly. Media are references, never pixels.

    pieces: for each part its number, length, first position and parent.
    """

    id: str
    length: int
    text_ids: np.ndarray[Any, np.dtype[np.int32]]
    slot_id: int
    slots: bytes
    supervised: bytes
    pieces: tuple[tuple[int, int, int, int], ...]
    media: tuple[Image | Video, ...]

    def __len__(self) -> int:
        return self.length

    def expanded(self) -> TokenizedSample:
        """The sample as it was before `compact`."""
        slots, supervised = _bools(self.slots, self.length), _bools(self.supervised, self.length)
        ids = np.full(self.length, self.slot_id, dtype=np.int64)
        ids[~slots] = self.text_ids
        number, lengths, starts, parents = (
            np.array(column, dtype=np.int64) for column in zip(*self.pieces, strict=True)
        )
        offsets = np.cumsum(lengths) - lengths
        return TokenizedSample(
            id=self.id,
            ids=ids,
            labels=np.where(supervised, ids, IGNORE),
            positions=np.arange(self.length) + np.repeat(starts - offsets, lengths),
            segments=np.repeat(number, lengths),
            parents=np.repeat(parents, lengths),
            slots=slots.astype(np.int64),
            media=self.media,
        )


def compact(sample: TokenizedSample) -> CompactSample:
    """The sample in little memory. Every label is the token's own id or is ignored."""
    slots = sample.slots.astype(bool)
    seams = np.flatnonzero(np.diff(sample.segments)) + 1
    firsts = np.concatenate([[0], seams])
    lengths = np.diff(np.concatenate([firsts, [len(sample)]]))
    pieces = zip(
        sample.segments[firsts].tolist(),
        lengths.tolist(),
        sample.positions[firsts].tolist(),
        sample.parents[firsts].tolist(),
        strict=True,
    )
    return CompactSample(
        id=sample.id,
        length=len(sample),
        text_ids=sample.ids[~slots].astype(np.int32),
        slot_id=int(sample.ids[slots][0]) if slots.any() else 0,
        slots=np.packbits(slots).tobytes(),
        supervised=np.packbits(sample.labels != IGNORE).tobytes(),
        pieces=tuple(pieces),
        media=sample.media,
    )


def _bools(bits: bytes, length: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=length).astype(bool)
