"""Gradient clipping by the global norm of all trainable parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vila.train.fsdp import full_tensor


@torch.no_grad()
def total_grad_norm(gradients: Sequence[Tensor]) -> float:
    """Return the L2 norm of all gradients together; sharded gradients are reduced over all processes."""
    return float(full_tensor(torch.nn.utils.get_total_norm(gradients)))


@torch.no_grad()
def clip_gradients(gradients: Sequence[Tensor], norm: float, max_norm: float) -> None:
    """Scale the gradients in place so that their total norm is at most `max_norm`.

    norm: result of `total_grad_norm` for these gradients.
    """
    if norm > max_norm:
        torch._foreach_mul_(list(gradients), max_norm / (norm + 1e-6))
