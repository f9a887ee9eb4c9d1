"""AdamW on float32 master weights, whatever the type of the forward pass; warm-up, then cosine to zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vila.train.stage import Group


def rate_factor(done: float, warmup_ratio: float) -> float:
    """Share of the peak rate when `done` (0..1) of the budget is spent: linear warm-up, then half a cosine to 0."""
    if done < warmup_ratio:
        return (done + 1e-3) / (warmup_ratio + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup_ratio) / (1 - warmup_ratio))))


class MasterAdamW:
    """AdamW whose state and weights are float32, while the model's own weights may be bfloat16.

    Gradients of several backward passes are summed in float32 by `accumulate`; `step` updates the masters and rounds
    them back into the model.
    """

    def __init__(
        self, groups: Sequence[Group], *, beta1: float, beta2: float, max_grad_norm: float, dtype: torch.dtype
    ) -> None:
        """dtype: what the model computes in; the model may be converted to it afterwards.

        The masters are copied before that, so nothing of the float32 weights is lost.
        """
        self.groups = list(groups)
        self.max_grad_norm = max_grad_norm
        self._live = [p for group in self.groups for p in group.parameters]
        self._names = [n for group in self.groups for n in group.names]
        self._masters = [p if dtype == p.dtype == torch.float32 else p.detach().float().clone() for p in self._live]
        start = 0
        settings = []
        for group in self.groups:
            some = self._masters[start : start + len(group.parameters)]
            settings.append({"params": some, "lr": group.lr, "weight_decay": group.weight_decay})
            start += len(group.parameters)
        self._adam = torch.optim.AdamW(settings, betas=(beta1, beta2), eps=1e-8, fused=True)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Move the model's gradients into the masters, adding to what is there."""
        for live, master in zip(self._live, self._masters, strict=True):
            if live is master or live.grad is None:
                continue
            if master.grad is None:
                master.grad = live.grad.float()
            else:
                master.grad.add_(live.grad)
            live.grad = None

    @torch.no_grad()
    def step(self, factor: float) -> float:
        """One update at `factor` times the peak rates. Returns the gradient norm before clipping."""
        grads = [m.grad for m in self._masters if m.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if float(norm) > self.max_grad_norm:
            torch._foreach_mul_(grads, self.max_grad_norm / (float(norm) + 1e-6))
        for group, settings in zip(self.groups, self._adam.param_groups, strict=True):
            settings["lr"] = group.lr * factor
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        pairs = [(live, master) for live, master in zip(self._live, self._masters, strict=True) if live is not master]
        if pairs:
            torch._foreach_copy_([live for live, _ in pairs], [master for _, master in pairs])
        return float(norm)

    def state_tensors(self) -> dict[str, Tensor]:
        """Masters and moments by parameter name, float32, and the update count."""
        out: dict[str, Tensor] = {}
        for name, master in zip(self._names, self._masters, strict=True):
            out[f"master/{name}"] = master.detach()
            for key, value in self._adam.state.get(master, {}).items():
                out[f"{key}/{name}"] = value
        return out

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Undo `state_tensors`, and round the masters into the model. Raises KeyError for a parameter not there."""
        for name, live, master in zip(self._names, self._live, self._masters, strict=True):
            master.copy_(tensors[f"master/{name}"])
            if live is not master:
                live.copy_(master)
            keys = ("step", "exp_avg", "exp_avg_sq")
            if f"step/{name}" in tensors:
                self._adam.state[master] = {key: tensors[f"{key}/{name}"].clone() for key in keys}
