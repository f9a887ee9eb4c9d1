"""The language-model loss of packed rows, without ever holding logits of positions that nothing supervises."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vila.chat.tokenize import IGNORE
from vila.data.batch import Batch
from vila.model.fusion import segment_mask
from vila.model.vila import VilaForConditionalGeneration

# B rows  S sequence  D model width  T supervised tokens  N media items  P patches  C tower width

_CHUNK = 512
"""Supervised positions whose logits exist at one time."""


def hidden_states(model: VilaForConditionalGeneration, batch: Batch, features_NPC: Tensor | None) -> Tensor:
    """Last hidden states [B, S, D] of packed rows under the one explicit mask."""
    media = None if features_NPC is None or not len(features_NPC) else model.project(features_NPC)
    return model.get_decoder()(
        inputs_embeds=model.embed(batch.ids, media),
        attention_mask=segment_mask(batch.segments, batch.parents),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state


def summed_loss(model: VilaForConditionalGeneration, batch: Batch, features_NPC: Tensor | None) -> Tensor:
    """Sum of cross entropies over the supervised tokens of the batch, float32.

    Dividing by the number of supervised tokens of the *global* batch gives the same loss for any split into ranks and
    micro-batches.
    """
    hidden_BSD = hidden_states(model, batch, features_NPC)
    targets = batch.labels[:, 1:]
    wanted = targets != IGNORE
    hidden_TD, targets_T = hidden_BSD[:, :-1][wanted], targets[wanted]
    head = model.get_output_embeddings()

    def cross_entropy(hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), target, reduction="sum")

    total = hidden_TD.new_zeros((), dtype=torch.float32)
    for hidden, target in zip(hidden_TD.split(_CHUNK), targets_T.split(_CHUNK), strict=True):
        if len(targets_T) > _CHUNK and torch.is_grad_enabled():
            # Recomputed in the backward pass: at no time do the logits of all chunks exist.
            total = total + checkpoint(cross_entropy, hidden, target, use_reentrant=False)
        else:
            total = total + cross_entropy(hidden, target)
    return total


class Objective(torch.nn.Module):
    """The loss of a batch."""

    def __init__(self, model: VilaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch, *, pixels=None, features=None, idle=False, sources=None, num_sources=0):  # type: ignore[no-untyped-def]
        """Temporary."""
        model = self.model
        if features is None and pixels is not None:
            features = model.vision_features(pixels)
        media = None if features is None else model.project(features)
        embeds = model.embed(batch.ids, None if idle else media)
        if idle:
            embeds = embeds + 0 * media.sum().to(embeds.dtype)
        hidden_BSD = model.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=segment_mask(batch.segments, batch.parents),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        targets = batch.labels[:, 1:]
        wanted = targets != IGNORE
        hidden, target = hidden_BSD[:, :-1][wanted], targets[wanted]
        each = F.cross_entropy(model.get_output_embeddings()(hidden).float(), target, reduction="none")
        by = torch.zeros(num_sources).index_add_(0, sources[:, 1:][wanted], each.detach())
        return each.sum(), by
