"""Attention over packed rows that stays inside each sample: no mask of S x S, and no work between samples.

`attend_in_trees` makes the blocks of a decoder call `packed_attention`. Given a `Forest` it attends tree by tree;
without one, in evaluation and generation, it is the attention that the model had before.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vila.model.forest import Forest

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
