"""Block-diagonal attention over packed sequences, with shared prefixes; no S x S mask is materialised.

`enable_packed_attention` switches the blocks of a decoder to `packed_attention`. Called with an `AttentionLayout`, it
attends within each sample only; without one (evaluation, generation) it calls the model's original attention.
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

# B packed sequences  S sequence length  P positions (B x S)  N segments or sequences  Q queries  K keys
# H query heads  G key-value heads  D head width

ATTENTION_NAME = "vila_packed"
"""Name of `packed_attention` in transformers' attention registry."""

_MAX_BRANCH_TOKENS = 128
"""Short branches are batched into one call of at most this many tokens: some masked scores, but fewer calls."""
_WINDOW_CHUNK = 256
"""Queries per call in a sample that is longer than the sliding window."""


class Segment(NamedTuple):
    """Consecutive tokens of one sample or branch. prefix: index of the segment that it continues, -1 for none."""

    length: int
    prefix: int
    padding: bool


class AttentionBlock(NamedTuple):
    """Neighbouring segments that are attended in one call.

    kind:    `chains` are independent segments of equal length; `branches` all continue the block `prefix`.
    lengths: length of each segment.
    """

    kind: Literal["padding", "chains", "branches"]
    lengths: tuple[int, ...]
    prefix: int = -1


class VarlenMetadata(NamedTuple):
    """Arguments of a variable-length attention kernel.

    cu_seqlens_q, cu_seqlens_k: int32 [N + 1], cumulative lengths of queries and keys.
    key_index: int64 [number of keys], position of each key, with a shared prefix once per branch; None if keys and
               queries are the same positions.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    key_index: Tensor | None


@dataclass(frozen=True)
class AttentionLayout:
    """Block-diagonal attention layout of a packed batch: independent samples, and prefixes with branches.

    Built once per batch on the CPU and passed to every decoder block. Masks and kernel arguments are created on first
    use and cached per device.
    """

    shape: tuple[int, int]
    segments: tuple[Segment, ...]
    blocks: tuple[AttentionBlock, ...]
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def block_sizes(self) -> list[int]:
        """Number of positions of each block."""
        return [sum(block.lengths) for block in self.blocks]

    def effective_window(self, window: int | None) -> int | None:
        """Return the sliding window, or None if no sample of the batch is longer than it."""
        return None if window is None or window >= self._cached("longest", self._longest_sample) else window

    def branch_mask(self, index: int, window: int | None, like: Tensor) -> Tensor:
        """Return the additive mask [Q, K] of a block of branches: keys are the prefix, then the branches."""
        block = self.blocks[index]
        prefix_length = sum(self.blocks[block.prefix].lengths)
        visible = partial(_visible_in_branches, prefix_length, block.lengths, window)
        return self._cached((index, window, like.dtype, like.device), lambda: _additive(visible(), like))

    def window_mask(self, num_queries: int, num_keys: int, window: int, like: Tensor) -> Tensor:
        """Return the additive mask [Q, K] for the last `num_queries` of `num_keys` consecutive tokens."""
        visible = partial(_visible, torch.arange(num_keys - num_queries, num_keys), torch.arange(num_keys), window)
        key = ("window", num_queries, num_keys, window, like.dtype, like.device)
        return self._cached(key, lambda: _additive(visible(), like))

    def varlen(self, device: torch.device) -> VarlenMetadata:
        """Return the kernel arguments on a device."""
        return self._cached(("varlen", device), lambda: _varlen_metadata(self.segments, device))

    def _longest_sample(self) -> int:
        prefix_lengths = [self.segments[one.prefix].length if one.prefix >= 0 else 0 for one in self.segments]
        return max(prefix + one.length for prefix, one in zip(prefix_lengths, self.segments, strict=True))

    def _cached(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


def attention_layout(segments_BS: Tensor, parents_BS: Tensor) -> AttentionLayout:
    """Build the layout of a batch from its segment ids and parent segment ids; padding has segment id -1.

    Raises DataError for a segment id that is not one consecutive run, and for a parent that is not the preceding
    prefix.
    """
    found: list[Segment] = []
    for row, (segments, parents) in enumerate(zip(segments_BS.tolist(), parents_BS.tolist(), strict=True)):
        root_id, root_index, visited = -1, -1, set()
        for id_, parent, length in _runs(segments, parents):
            if id_ in visited:
                raise DataError("the segment is not one consecutive run", record=row, field="segments", value=id_)
            visited.add(id_)
            has_parent = id_ >= 0 and parent >= 0
            if has_parent and parent != root_id:
                problem = f"the parent of segment {id_} is not the preceding prefix"
                raise DataError(problem, record=row, field="parents", value=parent, expected=str(root_id))
            if id_ >= 0 and not has_parent:
                root_id, root_index = id_, len(found)
            found.append(Segment(length, root_index if has_parent else -1, id_ < 0))
    return AttentionLayout((segments_BS.shape[0], segments_BS.shape[1]), tuple(found), tuple(_blocks(found)))


def _runs(segments: list[int], parents: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield segment id, parent id and length of each run of equal segment ids."""
    start = 0
    for position in range(1, len(segments) + 1):
        if position == len(segments) or segments[position] != segments[start]:
            yield segments[start], parents[start], position - start
            start = position


def _blocks(segments: list[Segment]) -> list[AttentionBlock]:
    prefixes = {one.prefix for one in segments}
    out: list[AttentionBlock] = []
    block_of_segment: dict[int, int] = {}
    for number, one in enumerate(segments):
        last = out[-1] if out else None
        if one.padding:
            block = AttentionBlock("padding", (one.length,))
            joins = last is not None and last.kind == "padding"
        elif one.prefix < 0:
            block = AttentionBlock("chains", (one.length,))
            alike = last is not None and last.kind == "chains" and last.lengths[0] == one.length
            joins = alike and number not in prefixes
        else:
            block = AttentionBlock("branches", (one.length,), block_of_segment[one.prefix])
            fits = last is not None and sum(last.lengths) + one.length <= _MAX_BRANCH_TOKENS
            joins = fits and last is not None and last.prefix == block.prefix
        if joins and last is not None:
            out[-1] = last._replace(lengths=last.lengths + block.lengths)
        else:
            block_of_segment[number] = len(out)
            out.append(block)
    return out


def _visible_in_branches(prefix_length: int, lengths: tuple[int, ...], window: int | None) -> Tensor:
    branch = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    key_branch = torch.cat((torch.full((prefix_length,), -1), branch))
    ranges = (torch.arange(prefix_length, prefix_length + length) for length in lengths)
    positions = torch.cat([torch.arange(prefix_length), *ranges])
    in_branch = (key_branch < 0) | (key_branch == branch[:, None])
    return _visible(positions[prefix_length:], positions, window) & in_branch


def _visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Causal sliding-window mask: bool [Q, K], True where the key may be attended."""
    distance = query_positions[:, None] - key_positions
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _additive(visible_QK: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(visible_QK.shape, dtype=like.dtype).masked_fill_(~visible_QK, -torch.inf).to(like.device)


def _varlen_metadata(segments: tuple[Segment, ...], device: torch.device) -> VarlenMetadata:
    starts = [0]
    for one in segments:
        starts.append(starts[-1] + one.length)
    keys = []
    for number, one in enumerate(segments):
        prefix = [torch.arange(starts[one.prefix], starts[one.prefix + 1])] if one.prefix >= 0 else []
        keys.append(torch.cat([*prefix, torch.arange(starts[number], starts[number + 1])]))
    key_ends = torch.tensor([0, *map(len, keys)]).cumsum(0)
    return VarlenMetadata(
        torch.tensor(starts, dtype=torch.int32, device=device),
        key_ends.to(device, torch.int32),
        max(one.length for one in segments),
        max(map(len, keys)),
        None if all(one.prefix < 0 for one in segments) else torch.cat(keys).to(device),
    )


def wrap_attention(decoder: nn.Module, name: str, previous: str) -> None:
    """Make the blocks of a transformers decoder use the registered attention function `name`.

    previous: field of the blocks' config for the implementation before, to which `name` passes calls that are not its
              own, so that several functions can be stacked.

    The blocks get a copy of their config; the decoder's own config, which generation masks and saving read, stays
    unchanged.
    """
    changed: dict[int, Any] = {}
    for module in decoder.modules():
        config: Any = getattr(module, "config", None)
        if config is None or not isinstance(getattr(module, "layer_idx", None), int) or hasattr(config, previous):
            continue
        if id(config) not in changed:
            changed[id(config)] = copy.copy(config)
            setattr(changed[id(config)], previous, config._attn_implementation)
            changed[id(config)]._attn_implementation_internal = name
        module.config = changed[id(config)]


def enable_packed_attention(decoder: nn.Module) -> None:
    """Switch the blocks of a transformers decoder to `packed_attention`, which reads `attention_layout=` of forward.

    Gradient checkpointing, which calls the blocks again in backward, uses the same attention.
    """
    wrap_attention(decoder, ATTENTION_NAME, "unpacked_attn_implementation")


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
    attention_layout: AttentionLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with the signature of transformers: query [B, H, S, D], key and value [B, G, S, D] to [B, S, H, D].

    sliding_window:   number of tokens that a token attends to, itself included, within its sample.
    attention_layout: layout of the packed batch; `attention_mask` is ignored then. Outputs at padding are finite.
    torch.compile skips this function, because the blocks of a batch differ from step to step.
    """
    if attention_layout is None:
        attend = ALL_ATTENTION_FUNCTIONS.get(module.config.unpacked_attn_implementation, sdpa_attention_forward)  # type: ignore[union-attr]
        options = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **kwargs}
        return attend(module, query, key, value, attention_mask, **options)
    layout = attention_layout
    query_PHD, key_PGD, value_PGD = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
    window = layout.effective_window(sliding_window)
    supported = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0
    kernel = varlen_kernel() if supported and not dropout else None
    if kernel is not None:
        out_PHD = attend_varlen(query_PHD, key_PGD, value_PGD, layout, window, scaling, kernel)
    else:
        out_PHD = attend_sdpa(query_PHD, key_PGD, value_PGD, layout, window, scaling, dropout)
    return out_PHD.unflatten(0, layout.shape), None


AttentionInterface.register(ATTENTION_NAME, packed_attention)


def attend_sdpa(
    query_PHD: Tensor,
    key_PGD: Tensor,
    value_PGD: Tensor,
    layout: AttentionLayout,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention block by block with SDPA, [P, H, D]; zeros at padding."""
    # One split and one cat: backward allocates one gradient of all positions, not one per slice.
    queries, keys, values = (one.split(layout.block_sizes) for one in (query_PHD, key_PGD, value_PGD))
    out = []
    for number, (block, query, key, value) in enumerate(zip(layout.blocks, queries, keys, values, strict=True)):
        if block.kind == "padding":
            out.append(torch.zeros_like(query))
            continue
        if block.kind == "branches":
            key, value = torch.cat((keys[block.prefix], key)), torch.cat((values[block.prefix], value))
            mask_QK = layout.branch_mask(number, window, query)
            attended = _sdpa(query[None], key[None], value[None], mask_QK, scale, dropout)
        else:
            query, key, value = (one.unflatten(0, (len(block.lengths), -1)) for one in (query, key, value))
            attended = _attend_chains(query, key, value, layout, window, scale, dropout)
        out.append(attended.flatten(0, 1))
    return torch.cat(out)


def _attend_chains(
    query_NQHD: Tensor,
    key_NQGD: Tensor,
    value_NQGD: Tensor,
    layout: AttentionLayout,
    window: int | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Causal attention of N samples of equal length, in chunks of queries where a sliding window applies."""
    if window is None or query_NQHD.shape[1] <= window:
        return _sdpa(query_NQHD, key_NQGD, value_NQGD, None, scale, dropout)
    queries, keys, values = (one.split(_WINDOW_CHUNK, dim=1) for one in (query_NQHD, key_NQGD, value_NQGD))
    chunks_back = -(-(window - 1) // _WINDOW_CHUNK)
    out = []
    for number, query in enumerate(queries):
        visible = slice(max(0, number - chunks_back), number + 1)
        key, value = torch.cat(keys[visible], dim=1), torch.cat(values[visible], dim=1)
        mask_QK = layout.window_mask(query.shape[1], key.shape[1], window, query)
        out.append(_sdpa(query, key, value, mask_QK, scale, dropout))
    return torch.cat(out, dim=1)


def _sdpa(
    query_NQHD: Tensor,
    key_NKGD: Tensor,
    value_NKGD: Tensor,
    mask_QK: Tensor | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """SDPA with heads after positions; causal if there is no mask."""
    query, key, value = (one.transpose(1, 2) for one in (query_NQHD, key_NKGD, value_NKGD))
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and mask_QK is not None and query.is_cuda:
        # With both a mask and grouped heads, CUDA falls back to the math backend, which keeps all scores in memory.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        groups = 1
    out: Tensor = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask_QK, is_causal=mask_QK is None, dropout_p=dropout, scale=scale,
        enable_gqa=groups > 1,
    )  # fmt: skip
    return out.transpose(1, 2)


def attend_varlen(
    query_PHD: Tensor,
    key_PGD: Tensor,
    value_PGD: Tensor,
    layout: AttentionLayout,
    window: int | None,
    scale: float | None,
    kernel: Callable[..., Tensor],
) -> Tensor:
    """Attention of all segments in one call of a variable-length kernel, [P, H, D]; padding attends to itself.

    kernel: see `varlen_kernel`; the queries of a segment are the last ones of its keys.
    """
    varlen = layout.varlen(query_PHD.device)
    if varlen.key_index is not None:
        key_PGD, value_PGD = key_PGD[varlen.key_index], value_PGD[varlen.key_index]
    left = -1 if window is None else window - 1
    return kernel(query_PHD, key_PGD, value_PGD, *varlen[:4], scale=scale, window_size=(left, 0))


def varlen_kernel() -> Callable[..., Tensor] | None:
    """Return PyTorch's variable-length attention with windows and grouped heads; None if this version lacks it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"window_size", "scale"} <= known.keys():
        return None

    def attend(query: Tensor, key: Tensor, value: Tensor, *lengths: Any, **options: Any) -> Tensor:
        if (groups := query.shape[1] // key.shape[1]) > 1:
            if "enable_gqa" in known:
                options["enable_gqa"] = True
            else:
                key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out: Any = varlen_attn(query, key, value, *lengths, **options)
        return out

    return attend
