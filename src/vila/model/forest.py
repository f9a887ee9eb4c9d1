"""Who sees whom in a batch of packed rows, as lists of what is attended together instead of a mask of S x S."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vila.core.errors import DataError

# B rows  S sequence  N segments  Q queries  K keys

_BRANCHES = 128
"""Tokens of short branches that share one call: they waste the products of one with another, and save calls."""


class Segment(NamedTuple):
    """Tokens in a line: `prefix` is the number of the segment that they continue, -1 for none."""

    length: int
    prefix: int
    padding: bool


class Piece(NamedTuple):
    """Neighbouring segments that are attended in one call.

    lengths: of its segments; equal in `chains`, which continue nothing; `branches` all continue piece `prefix`.
    """

    kind: Literal["padding", "chains", "branches"]
    lengths: tuple[int, ...]
    prefix: int = -1


class Bounds(NamedTuple):
    """The segments as kernels for ragged sequences take them: int32 [N + 1] where each begins among queries and keys.

    keys: int64 places of the keys, those of a shared prefix once for each branch; None when they are the queries'.
    """

    queries: Tensor
    ends: Tensor
    longest_queries: int
    longest_keys: int
    keys: Tensor | None


@dataclass(frozen=True)
class Forest:
    """The trees of a batch of packed rows, row after row: each a chain of tokens, or a prefix with branches.

    Built once a batch on the processor, and given to every block. What depends on a device is made there when it is
    first asked for, and kept.
    """

    shape: tuple[int, int]
    segments: tuple[Segment, ...]
    pieces: tuple[Piece, ...]
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sizes(self) -> list[int]:
        """Places of each piece."""
        return [sum(piece.lengths) for piece in self.pieces]

    def narrow(self, window: int | None) -> int | None:
        """The window, or None when every token of the batch sees back to its beginning through it."""
        return None if window is None or window >= self._keep("longest", self._longest) else window

    def mask(self, number: int, window: int | None, like: Tensor) -> Tensor:
        """What the branches of a piece add to their scores, [Q, K]: keys are the prefix, then the branches."""
        piece = self.pieces[number]
        prefix = sum(self.pieces[piece.prefix].lengths)
        seen = partial(_branches_see, prefix, piece.lengths, window)
        return self._keep((number, window, like.dtype, like.device), lambda: _added(seen(), like))

    def band(self, queries: int, keys: int, window: int, like: Tensor) -> Tensor:
        """What the last `queries` of `keys` tokens in a line add to their scores, [Q, K]."""
        seen = partial(_within, torch.arange(keys - queries, keys), torch.arange(keys), window)
        return self._keep(("band", queries, keys, window, like.dtype, like.device), lambda: _added(seen(), like))

    def bounds(self, device: torch.device) -> Bounds:
        """The segments on a device."""
        return self._keep(("bounds", device), lambda: _bounds(self.segments, device))

    def _longest(self) -> int:
        before = [self.segments[one.prefix].length if one.prefix >= 0 else 0 for one in self.segments]
        return max(a + one.length for a, one in zip(before, self.segments, strict=True))

    def _keep(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def forest_of(segments_BS: Tensor, parents_BS: Tensor) -> Forest:
    """The trees that `segments` and `parents` of a batch describe; padding carries segment -1.

    Raises DataError for a segment in two places, and for one that continues another than the prefix before it.
    """
    found: list[Segment] = []
    for row, (segments, parents) in enumerate(zip(segments_BS.tolist(), parents_BS.tolist(), strict=True)):
        root, seen = (-1, -1), set()
        for number, parent, length in _runs(segments, parents):
            if number in seen:
                raise DataError(f"row {row}: segment {number} has tokens in two places; a segment is one run of tokens")
            seen.add(number)
            if number >= 0 and parent >= 0 and parent != root[0]:
                raise DataError(f"row {row}: segment {number} continues {parent}, which is not the prefix before it")
            if number >= 0 > parent:
                root = number, len(found)
            found.append(Segment(length, root[1] if number >= 0 and parent >= 0 else -1, number < 0))
    return Forest((segments_BS.shape[0], segments_BS.shape[1]), tuple(found), tuple(_pieces(found)))


def _runs(segments: list[int], parents: list[int]) -> Iterator[tuple[int, int, int]]:
    start = 0
    for place in range(1, len(segments) + 1):
        if place == len(segments) or segments[place] != segments[start]:
            yield segments[start], parents[start], place - start
            start = place


def _pieces(segments: list[Segment]) -> list[Piece]:
    prefixes = {one.prefix for one in segments}
    out: list[Piece] = []
    place: dict[int, int] = {}
    for number, one in enumerate(segments):
        last = out[-1] if out else None
        if one.padding:
            piece = Piece("padding", (one.length,))
            joins = last is not None and last.kind == "padding"
        elif one.prefix < 0:
            piece = Piece("chains", (one.length,))
            alike = last is not None and last.kind == "chains" and last.lengths[0] == one.length
            joins = alike and number not in prefixes
        else:
            piece = Piece("branches", (one.length,), place[one.prefix])
            joins = last is not None and last.prefix == piece.prefix and sum(last.lengths) + one.length <= _BRANCHES
        if joins and last is not None:
            out[-1] = last._replace(lengths=last.lengths + piece.lengths)
        else:
            place[number] = len(out)
            out.append(piece)
    return out


def _branches_see(prefix: int, lengths: tuple[int, ...], window: int | None) -> Tensor:
    own = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    owner = torch.cat((torch.full((prefix,), -1), own))
    positions = torch.cat([torch.arange(prefix), *(torch.arange(prefix, prefix + length) for length in lengths)])
    return _within(positions[prefix:], positions, window) & ((owner < 0) | (owner == own[:, None]))


def _within(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Keys that are not later than the query, and in its window: bool [Q, K]."""
    age = query_positions[:, None] - key_positions
    return age >= 0 if window is None else (age >= 0) & (age < window)


def _added(seen_QK: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(seen_QK.shape, dtype=like.dtype).masked_fill_(~seen_QK, -torch.inf).to(like.device)


def _bounds(segments: tuple[Segment, ...], device: torch.device) -> Bounds:
    starts = [0]
    for one in segments:
        starts.append(starts[-1] + one.length)
    keys = []
    for number, one in enumerate(segments):
        before = [torch.arange(starts[one.prefix], starts[one.prefix + 1])] if one.prefix >= 0 else []
        keys.append(torch.cat([*before, torch.arange(starts[number], starts[number + 1])]))
    ends = torch.tensor([0, *map(len, keys)]).cumsum(0)
    plain = all(one.prefix < 0 for one in segments)
    return Bounds(
        torch.tensor(starts, dtype=torch.int32, device=device),
        ends.to(device, torch.int32),
        max(one.length for one in segments),
        max(map(len, keys)),
        None if plain else torch.cat(keys).to(device),
    )
