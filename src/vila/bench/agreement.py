"""How often a fast backend would choose the reference's token, both given the same text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vila.engine.batch import Group, Run
from vila.engine.pictures import Prompt
from vila.kernels.int4_linear import Int4Linear
from vila.kernels.int4_torch import PRODUCT as REFERENCE
from vila.model.vila import VilaForConditionalGeneration

# S tokens  V vocab

_CLEAR = 4.0
"""A token is clear when its lead over the second is this many times the error of a logit."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Likeliest tokens of a backend and of the reference after each of `tokens` given tokens.

    same:     share of places where they are equal.
    clear:    share of places where the reference's lead over its second token is above the backend's noise: random
              weights give nearly flat logits, whose order is noise in any arithmetic.
    same_clear: share of those where they are equal; 1 when there are none.
    error:    root mean square of the difference of the logits, over their spread.
    nll_change: mean change of the given text's negative log-likelihood, in nats a token.
    """

    tokens: int
    same: float
    clear: float
    same_clear: float
    error: float
    nll_change: float


def compare(fast_SV: Tensor, exact_SV: Tensor, following_S: Tensor) -> Agreement:
    """Logits of a backend and of the reference at the same places, and the tokens that follow there in the text."""
    difference = fast_SV - exact_SV
    noise = (difference - difference.mean(-1, keepdim=True)).pow(2).mean().sqrt()
    top = exact_SV.topk(2, dim=-1)
    same_S = fast_SV.argmax(-1) == top.indices[:, 0]
    clear_S = top.values[:, 0] - top.values[:, 1] > _CLEAR * noise
    change = torch.nn.functional.cross_entropy(fast_SV, following_S) - torch.nn.functional.cross_entropy(
        exact_SV, following_S
    )
    return Agreement(
        tokens=len(following_S),
        same=same_S.float().mean().item(),
        clear=clear_S.float().mean().item(),
        same_clear=same_S[clear_S].float().mean().item() if clear_S.any() else 1.0,
        error=(noise / exact_SV.std()).item(),
        nll_change=change.item(),
    )


@torch.inference_mode()
def agreement(
    model: VilaForConditionalGeneration, new_run: Callable[[int], Run], tokens: int, text: list[int] | None = None
) -> Agreement:
    """Compare steps of a backend with one pass of the reference: torch, in the model's number type.

    text: token ids, at least tokens + 1 of them; None draws them.
    """
    given = (
        text
        or torch.randint(
            0, int(model.config.text_config.vocab_size), (tokens + 1,), generator=torch.Generator().manual_seed(1)
        ).tolist()
    )
    run = new_run(tokens + 1)
    rows = [run.prefill([Prompt(given[:1])], [Group(0, (0,))])[0].clone()]
    for token in given[1:tokens]:
        rows.append(run.step(torch.tensor([token], device=model.device))[0].clone())
    run.close([])
    following = torch.tensor(given[1 : tokens + 1], device=model.device)
    return compare(torch.stack(rows), reference_logits(model, given[:tokens]), following)


@torch.inference_mode()
def reference_logits(model: VilaForConditionalGeneration, ids: list[int]) -> Tensor:
    """Logits [S, V] of a text by one forward pass without a cache; 4-bit layers multiply by the reference meanwhile."""
    layers = [m for m in model.modules() if isinstance(m, Int4Linear) and m.backend != REFERENCE.name]
    before = [(layer._product, layer._dtype) for layer in layers]
    for layer in layers:
        layer.use(REFERENCE, model.dtype)
    try:
        logits: Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
    finally:
        for layer, (product, dtype) in zip(layers, before, strict=True):
            layer.use(product, dtype)
    return logits
