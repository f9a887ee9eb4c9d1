"""Attention over packed rows that stays inside each sample: no mask of S x S, and no work between samples.

`attend_in_trees` makes the blocks of a decoder call `packed_attention`. Given a `Forest` it attends tree by tree;
without one, in evaluation and generation, it is the attention that the model had before.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vila.core.errors import DataError

# --- forest
# Who sees whom in a batch of packed rows, as lists of what is attended together instead of a mask of S x S.


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


# B rows  S sequence  P places (B x S)  H query heads  G key-value heads  D head width  N sequences  Q queries  K keys

NAME = "vila_packed"
"""By which transformers knows `packed_attention`."""

_WINDOWED = 256
"""Queries of a call in a sample that is longer than the window."""


def attend_in_trees(decoder: nn.Module) -> None:
    """Make the blocks of a transformers decoder heed a `forest=` that its forward is given, from now on.

    What reads the decoder's own config, such as the masks of generation and what is saved, finds it as it was. The
    blocks keep to this in the backward pass too, where gradient checkpointing calls them again.
    """
    config: Any = decoder.config
    changed = copy.copy(config)
    changed._attn_implementation_internal, changed.attends_else_by = NAME, config._attn_implementation
    for module in decoder.modules():
        if hasattr(module, "layer_idx") and getattr(module, "config", None) is config:
            module.config = changed


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    forest: Forest | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' blocks call it: query [B, H, S, D], key and value [B, G, S, D] to [B, S, H, D].

    sliding_window: tokens that a token sees, itself among them, counted along its conversation.
    forest:         the trees of the rows; `attention_mask` is then without meaning. Padding comes out finite.
    The pieces of a batch differ from step to step, so torch.compile leaves this function as it is.
    """
    if forest is None:
        attend = ALL_ATTENTION_FUNCTIONS.get(module.config.attends_else_by, sdpa_attention_forward)  # type: ignore[union-attr]
        facts = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **kwargs}
        return attend(module, query, key, value, attention_mask, **facts)
    query_PHD, key_PGD, value_PGD = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
    window = forest.narrow(sliding_window)
    fits = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0
    kernel = ragged_kernel() if fits and not dropout else None
    if kernel is not None:
        out_PHD = attend_ragged(query_PHD, key_PGD, value_PGD, forest, window, scaling, kernel)
    else:
        out_PHD = attend_sliced(query_PHD, key_PGD, value_PGD, forest, window, scaling, dropout)
    return out_PHD.unflatten(0, forest.shape), None


AttentionInterface.register(NAME, packed_attention)


def attend_sliced(
    query_PHD: Tensor,
    key_PGD: Tensor,
    value_PGD: Tensor,
    forest: Forest,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention piece by piece with SDPA, [P, H, D]; zeros at padding."""
    # One split and one cat: backward makes one tensor of all places, not one for every slice.
    queries, keys, values = (one.split(forest.sizes) for one in (query_PHD, key_PGD, value_PGD))
    out = []
    for number, (piece, query, key, value) in enumerate(zip(forest.pieces, queries, keys, values, strict=True)):
        if piece.kind == "padding":
            out.append(torch.zeros_like(query))
            continue
        if piece.kind == "branches":
            key, value = torch.cat((keys[piece.prefix], key)), torch.cat((values[piece.prefix], value))
            some = (query[None], key[None], value[None])
            attended = _sdpa(*some, forest.mask(number, window, query), scale, dropout)
        else:
            some = tuple(one.unflatten(0, (len(piece.lengths), -1)) for one in (query, key, value))
            attended = _chains(*some, forest, window, scale, dropout)
        out.append(attended.flatten(0, 1))
    return torch.cat(out)


def _chains(
    query_NQHD: Tensor,
    key_NQGD: Tensor,
    value_NQGD: Tensor,
    forest: Forest,
    window: int | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    if window is None or query_NQHD.shape[1] <= window:
        return _sdpa(query_NQHD, key_NQGD, value_NQGD, None, scale, dropout)
    queries, keys, values = (one.split(_WINDOWED, dim=1) for one in (query_NQHD, key_NQGD, value_NQGD))
    back = -(-(window - 1) // _WINDOWED)
    out = []
    for number, query in enumerate(queries):
        seen = slice(max(0, number - back), number + 1)
        key, value = torch.cat(keys[seen], dim=1), torch.cat(values[seen], dim=1)
        mask = forest.band(query.shape[1], key.shape[1], window, query)
        out.append(_sdpa(query, key, value, mask, scale, dropout))
    return torch.cat(out, dim=1)


def _sdpa(
    query_NQHD: Tensor,
    key_NKGD: Tensor,
    value_NKGD: Tensor,
    mask_QK: Tensor | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    query, key, value = (one.transpose(1, 2) for one in (query_NQHD, key_NKGD, value_NKGD))
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and mask_QK is not None and query.is_cuda:
        # There a mask and grouped heads together leave only the plain products, with all scores in memory.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        groups = 1
    out: Tensor = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask_QK, is_causal=mask_QK is None, dropout_p=dropout, scale=scale,
        enable_gqa=groups > 1,
    )  # fmt: skip
    return out.transpose(1, 2)


def attend_ragged(
    query_PHD: Tensor,
    key_PGD: Tensor,
    value_PGD: Tensor,
    forest: Forest,
    window: int | None,
    scale: float | None,
    kernel: Callable[..., Tensor],
) -> Tensor:
    """Attention of all segments in one call of a kernel for ragged sequences, [P, H, D]; padding sees itself.

    kernel: as `ragged_kernel` gives it; queries stand at the end of their keys.
    """
    bounds = forest.bounds(query_PHD.device)
    if bounds.keys is not None:
        key_PGD, value_PGD = key_PGD[bounds.keys], value_PGD[bounds.keys]
    left = -1 if window is None else window - 1
    return kernel(query_PHD, key_PGD, value_PGD, *bounds[:4], scale=scale, window_size=(left, 0))


def ragged_kernel() -> Callable[..., Tensor] | None:
    """PyTorch's kernel for ragged sequences with windows and grouped heads; None where this version has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"window_size", "scale"} <= known.keys():
        return None

    def attend(query: Tensor, key: Tensor, value: Tensor, *bounds: Any, **facts: Any) -> Tensor:
        if (groups := query.shape[1] // key.shape[1]) > 1:
            if "enable_gqa" in known:
                facts["enable_gqa"] = True
            else:
                key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out: Any = varlen_attn(query, key, value, *bounds, **facts)
        return out

    return attend
