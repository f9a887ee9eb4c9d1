"""The loss of a batch of packed rows: everything that happens between the batch and one number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vila.chat.tokenize import IGNORE
from vila.data.batch import Batch
from vila.model.attention import attend_in_trees
from vila.model.forest import forest_of
from vila.model.vila import VilaForConditionalGeneration
from vila.train.linear_loss import head_loss

# B rows  S sequence  D model width  T supervised tokens  N media items  P patches  C tower width  H, W pixels
# K sources


class Objective(nn.Module):
    """The model with its loss: the module that is dealt to devices, because no weight is read outside its forward.

    From then on the model's decoder heeds trees of packed rows; without any it answers as it did.
    """

    def __init__(self, model: VilaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        attend_in_trees(model.get_decoder())

    def forward(
        self,
        batch: Batch,
        *,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        idle: bool = False,
        sources: Tensor | None = None,
        num_sources: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Sum of the cross entropies over supervised tokens, float32 with graph, and detached sums [K] by source.

        Dividing by the supervised tokens of the *global* batch gives the same loss for any split into processes and
        micro-batches.

        pixels:   [N, 3, H, W] of the batch's pictures; `features` [N, P, C] are what the tower makes of them.
        idle:     they are of a stand-in, in a batch without pictures: tower and projector run, as they do in other
                  processes, and count for nothing.
        sources:  int64 [B, S], the number of the data set of every token, below `num_sources`. Without them, no sums.

        The batch is on the processor; what the model needs of it is moved. Without supervised tokens the sum is zero,
        and its graph still reaches all that a graph with some reaches.
        """
        hidden_BSD = self.hidden_states(batch, pixels=pixels, features=features, idle=idle)
        rows, places = (batch.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        before = (rows * hidden_BSD.shape[1] + places).to(hidden_BSD.device, non_blocking=True)
        targets_T = batch.labels[rows, places + 1].to(hidden_BSD.device, non_blocking=True)
        hidden_TD = hidden_BSD.flatten(0, 1).index_select(0, before)
        total, losses_T = head_loss(self.model.get_output_embeddings(), hidden_TD, targets_T)
        if sources is None:
            return total, None
        owners_T = sources[rows, places + 1].to(losses_T.device, non_blocking=True)
        return total, losses_T.new_zeros(num_sources).index_add_(0, owners_T, losses_T)

    def hidden_states(
        self, batch: Batch, *, pixels: Tensor | None = None, features: Tensor | None = None, idle: bool = False
    ) -> Tensor:
        """Last hidden states [B, S, D] of packed rows; the arguments are those of `forward`."""
        model = self.model
        if features is None and pixels is not None:
            features = model.vision_features(pixels.to(model.device, non_blocking=True))
        media = None
        if features is not None and len(features):
            media = model.project(features.to(model.device, non_blocking=True))
        embeds_BSD = model.embed(batch.ids.to(model.device, non_blocking=True), None if idle else media)
        if idle and media is not None:
            # The sum of nothing: part of the graph, and zero even where a feature is not finite.
            embeds_BSD = embeds_BSD + media.flatten()[:0].sum().to(embeds_BSD.dtype)
        states: Tensor = model.get_decoder()(
            inputs_embeds=embeds_BSD,
            # With four dimensions transformers makes no mask of its own. It is empty, so that a block that does not
            # heed the forest fails instead of seeing everything.
            attention_mask=torch.ones(1, 1, 0, 0, dtype=torch.bool, device=embeds_BSD.device),
            position_ids=batch.positions.to(model.device, non_blocking=True),
            use_cache=False,
            forest=forest_of(batch.segments, batch.parents),
        ).last_hidden_state
        return states
