"""Putting media vectors into the sequence, and the one mask that every path uses."""

from __future__ import annotations

import torch
from torch import Tensor

# B batch  S sequence (Q queries, K keys)  D model width  N media items  P patches


def scatter_media(embeds_BSD: Tensor, media_NPD: Tensor, slots_BS: Tensor) -> Tensor:
    """Put media vectors into their slots, in reading order.

    embeds_BSD: text embeddings; values at slots are ignored.
    media_NPD:  projected vectors of all pictures of the batch, row-major over (row, picture, patch).
    slots_BS:   bool, True where a media vector belongs.
    Returns a new tensor of the shape and dtype of `embeds_BSD`; gradients reach both inputs.
    Raises ValueError when the number of slots and vectors differ: going on would shift every later picture.
    """
    need = int(slots_BS.sum())
    have = media_NPD.shape[0] * media_NPD.shape[1]
    if need != have:
        raise ValueError(
            f"the batch has {need} media slots but the tower produced {have} vectors "
            f"({media_NPD.shape[0]} pictures of {media_NPD.shape[1]})"
        )
    return embeds_BSD.masked_scatter(slots_BS.unsqueeze(-1), media_NPD.to(embeds_BSD.dtype))


def segment_mask(segments_BS: Tensor, parents_BS: Tensor) -> Tensor:
    """Who may look at whom in packed rows: bool [B, 1, S, S], True = may attend.

    A token sees the earlier tokens of its own segment and of its segment's parent, and always itself; padding carries
    segment -1. Example: segments [0, 0, 1, 1, 2], parents [-1, -1, 0, 0, 0] are a shared prefix of two tokens with
    two branches; the last token sees places 0, 1 and 4.
    """
    keys = segments_BS[:, None, :]
    seen = (segments_BS[:, :, None] == keys) | (parents_BS[:, :, None] == keys)
    seen &= (keys >= 0) & torch.ones(
        segments_BS.shape[1], segments_BS.shape[1], dtype=torch.bool, device=keys.device
    ).tril()
    seen |= torch.eye(segments_BS.shape[1], dtype=torch.bool, device=keys.device)
    return seen[:, None]


def cached_mask(valid_BK: Tensor, num_queries: int) -> Tensor:
    """Mask of a cached step: bool [B, 1, Q, K]. The last `num_queries` of the K columns are the queries themselves.

    valid_BK: bool, False at columns that hold padding. Queries see every valid earlier column and themselves.
    """
    K = valid_BK.shape[1]
    causal_QK = torch.ones(num_queries, K, dtype=torch.bool, device=valid_BK.device).tril(K - num_queries)
    own_QK = torch.zeros_like(causal_QK)
    own_QK[:, K - num_queries :] = torch.eye(num_queries, dtype=torch.bool, device=valid_BK.device)
    return ((valid_BK[:, None, :] & causal_QK) | own_QK)[:, None]
