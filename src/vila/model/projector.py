"""Projectors: from the tower's width to the LLM's."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from vila.core.errors import LayoutError

# N media items  P patches  C tower width  D model width

_MLP = re.compile(r"mlp(\d+)x_gelu")


def build_projector(kind: str, width_in: int, width_out: int) -> nn.Module:
    """A projector of the published kinds: `linear`, or `mlpNx_gelu` = Linear, (N-1) x (GELU, Linear), all with bias.

    Maps [N, P, C] to [N, P, D]. Raises LayoutError for another kind.
    """
    if kind == "linear":
        return nn.Linear(width_in, width_out)
    match = _MLP.fullmatch(kind)
    if match is None or int(match[1]) < 1:
        raise LayoutError(f"projector type {kind!r} is not known; known are 'linear' and 'mlpNx_gelu' (N = 1, 2, ...)")
    layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(width_out, width_out)]
    return nn.Sequential(*layers)


@torch.no_grad()
def calibrate_projector(projector: nn.Module, features_NPC: Tensor, rms: float) -> None:
    """Initialise a fresh projector from data, so that training starts with well-scaled inputs and outputs.

    The first Linear is composed with the standardisation of each input channel over `features_NPC`; the last one is
    scaled so that its outputs have root mean square `rms` (that of the LLM's token embeddings).
    """
    linears = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    flat = features_NPC.flatten(0, -2).float()
    mean, std = flat.mean(0), flat.std(0).clamp_min(1e-4)
    first, last = linears[0], linears[-1]
    weight = first.weight.float() / std
    first.bias.copy_(first.bias.float() - weight @ mean)
    first.weight.copy_(weight)
    scale = rms / projector(flat.to(first.weight.dtype)).float().square().mean().sqrt().item()
    last.weight.mul_(scale)
    last.bias.mul_(scale)
