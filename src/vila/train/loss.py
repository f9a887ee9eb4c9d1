"""Training loss of a batch of packed sequences: chunked linear cross entropy, and the module that FSDP2 shards."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vila.chat.tokenize import IGNORE
from vila.data.collate import Batch
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.packed_attention import attention_layout, enable_packed_attention

# B batch rows  S sequence  D model width  T supervised tokens  V vocab  K data sets
# N images  P patches  C tower width  H, W pixels

_CHUNK_BYTES = 2**27
"""Maximum size of the float32 logits of a chunk."""


def head_loss(head: nn.Module, hidden_TD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy of `head(hidden)`, and the detached loss of each token [T]; float32 or float64.

    For a plain Linear the weight is used directly, see `linear_cross_entropy`. Any other LM head (with an adapter, or
    quantized) is called chunk by chunk and recomputed in the backward pass. With T = 0 the sum is zero, with a graph.
    """
    if type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks):
        return linear_cross_entropy(hidden_TD, head.weight, head.bias, targets_T)

    def chunk_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden)
        return F.cross_entropy(logits.to(_wide(logits.dtype)), targets, reduction="none")

    size = _chunk(len(targets_T), getattr(head, "out_features", 2**17))
    recompute = torch.is_grad_enabled() and len(targets_T) > size
    each = [
        checkpoint(chunk_loss, *some, use_reentrant=False) if recompute else chunk_loss(*some)
        for some in zip(hidden_TD.split(size), targets_T.split(size), strict=True)
    ]
    losses_T = torch.cat(each)
    return losses_T.sum(), losses_T.detach()


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy of `hidden @ weight.T + bias`, and the detached loss of each token [T].

    Computed chunk by chunk, so the logits of all tokens never exist together. Both results, the softmax and the
    accumulated weight gradient are float32 for any weight dtype (float64 for float64 weights). Only the sum is
    differentiable, once.
    """
    if torch.is_grad_enabled():
        total, losses = _LinearCrossEntropy.apply(hidden_TD, weight_VD, bias_V, targets_T)
        return total, losses
    losses, *_ = _losses_and_gradients(hidden_TD, weight_VD, bias_V, targets_T, (False, False, False))
    return losses.sum(), losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses, *gradients = _losses_and_gradients(hidden, weight, bias, targets, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if one is None else _scaled(one, by_total, dtype) for one, dtype in pairs), None


def _losses_and_gradients(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the losses [T] and the gradients of their sum with respect to hidden, weight and bias, where needed.

    The gradients of weight and bias are accumulated over chunks in float32 or float64.
    """
    tokens, (vocab, _), dtype = len(targets_T), weight_VD.shape, weight_VD.dtype
    wide = _wide(dtype)
    size = _chunk(tokens, vocab)
    # One buffer for all chunks: for small models, allocating pages costs more than the arithmetic.
    logits = hidden_TD.new_empty(min(size, tokens), vocab)
    scores = logits if dtype == wide else torch.empty_like(logits, dtype=wide)
    losses = torch.empty(tokens, dtype=wide, device=hidden_TD.device)
    by_hidden = torch.empty_like(hidden_TD) if needs[0] else None
    by_weight = torch.zeros_like(weight_VD, dtype=wide) if needs[1] else None
    by_bias = torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and needs[2] else None
    for start in range(0, tokens, size):
        here = slice(start, min(start + size, tokens))
        hidden, targets = hidden_TD[here], targets_T[here]
        some, own = logits[: len(targets)], scores[: len(targets)]
        torch.mm(hidden, weight_VD.t(), out=some)
        if bias_V is not None:
            some += bias_V
        if own is not some:
            own.copy_(some)
        losses[here] = _softmax_in_place(own, targets)
        if not any(needs):
            continue
        own[torch.arange(len(targets), device=own.device), targets] -= 1
        if own is not some:
            some.copy_(own)
        if by_hidden is not None:
            torch.mm(some, weight_VD, out=by_hidden[here])
        if by_weight is not None:
            by_weight.addmm_(some.t(), hidden) if dtype == wide else by_weight.add_(some.t() @ hidden)
        if by_bias is not None:
            by_bias += own.sum(0)
    return losses, by_hidden, by_weight, by_bias


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    # The factor contains 1 / supervised tokens. Rounding it to bfloat16 would scale all gradients by up to 0.4 %.
    return torch.mul(gradient.to(factor.dtype), factor, out=torch.empty_like(gradient, dtype=dtype))


def _softmax_in_place(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Replace logits by probabilities; return the cross entropies [T]."""
    logits_TV -= logits_TV.amax(1, keepdim=True)
    picked = logits_TV.gather(1, targets_T[:, None])[:, 0]
    totals = logits_TV.exp_().sum(1)
    logits_TV /= totals[:, None]
    return totals.log() - picked


def _chunk(tokens: int, vocab: int) -> int:
    """Return the number of tokens per chunk, for chunks of about equal size."""
    most = max(1, _CHUNK_BYTES // (4 * vocab))
    return max(1, math.ceil(tokens / max(1, math.ceil(tokens / most))))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class LossModule(nn.Module):
    """The model with its loss. FSDP2 shards this module, because every weight is read inside its forward.

    Enables block-diagonal attention for packed sequences in the model's decoder; other inputs are not affected.
    """

    def __init__(self, model: VilaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        enable_packed_attention(model.get_decoder())

    def forward(
        self,
        batch: Batch,
        *,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        dummy_vision: bool = False,
        data_set_ids: Tensor | None = None,
        num_data_sets: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the cross entropy summed over supervised tokens (float32), and detached sums [K] by data set.

        Divide by the supervised tokens of the *global* batch: the loss is then the same for any split into processes
        and micro-batches.

        batch:         on the CPU; the tensors that the model needs are moved to its device.
        pixels:        [N, 3, H, W], the images of the batch.
        features:      [N, P, C], tower features of the images, instead of `pixels`.
        dummy_vision:  the batch has no images and `pixels` or `features` are a dummy: tower and projector run, as on
                       the other ranks, and contribute zero.
        data_set_ids:  int64 [B, S], index of each token's data set, below `num_data_sets`; None: no sums.

        Without supervised tokens the sum is zero, and its graph reaches the same parameters as with some.
        """
        hidden_BSD = self.hidden_states(batch, pixels=pixels, features=features, dummy_vision=dummy_vision)
        rows, columns = (batch.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        before = (rows * hidden_BSD.shape[1] + columns).to(hidden_BSD.device, non_blocking=True)
        targets_T = batch.labels[rows, columns + 1].to(hidden_BSD.device, non_blocking=True)
        hidden_TD = hidden_BSD.flatten(0, 1).index_select(0, before)
        total, losses_T = head_loss(self.model.get_output_embeddings(), hidden_TD, targets_T)
        if data_set_ids is None:
            return total, None
        owners_T = data_set_ids[rows, columns + 1].to(losses_T.device, non_blocking=True)
        return total, losses_T.new_zeros(num_data_sets).index_add_(0, owners_T, losses_T)

    def hidden_states(
        self, batch: Batch, *, pixels: Tensor | None = None, features: Tensor | None = None, dummy_vision: bool = False
    ) -> Tensor:
        """Return the last hidden states [B, S, D] of packed sequences; arguments as for `forward`."""
        model = self.model
        if features is None and pixels is not None:
            features = model.vision_features(pixels.to(model.device, non_blocking=True))
        media = None
        if features is not None and len(features):
            media = model.project(features.to(model.device, non_blocking=True))
        embeds_BSD = model.embed(batch.ids.to(model.device, non_blocking=True), None if dummy_vision else media)
        if dummy_vision and media is not None:
            # An empty sum: connects tower and projector to the graph, and is zero even if a feature is not finite.
            embeds_BSD = embeds_BSD + media.flatten()[:0].sum().to(embeds_BSD.dtype)
        states: Tensor = model.get_decoder()(
            inputs_embeds=embeds_BSD,
            # transformers builds no mask if it gets one of four dimensions. It is empty, so that an attention layer
            # that ignores the layout fails instead of attending across samples.
            attention_mask=torch.ones(1, 1, 0, 0, dtype=torch.bool, device=embeds_BSD.device),
            position_ids=batch.positions.to(model.device, non_blocking=True),
            use_cache=False,
            attention_layout=attention_layout(batch.segments, batch.parents),
        ).last_hidden_state
        return states
