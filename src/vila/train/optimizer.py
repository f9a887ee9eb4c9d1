"""AdamW with float32 master weights, for a model that computes in float32 or bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vila.train.gradient_clipping import clip_gradients, total_grad_norm
from vila.train.parameter_groups import ParameterGroup


class MasterAdamW:
    """AdamW whose weights and state are float32, while the model's own weights may be bfloat16.

    `accumulate` sums the gradients of several backward passes in float32; `step` updates the master weights and rounds
    them into the model.
    """

    def __init__(
        self, groups: Sequence[ParameterGroup], *, beta1: float, beta2: float, max_grad_norm: float, dtype: torch.dtype
    ) -> None:
        """Copy the master weights, before the caller converts the model to `dtype`.

        dtype: compute dtype of the model. In float32 the model's weights are the master weights.
        """
        self.groups = list(groups)
        self.max_grad_norm = max_grad_norm
        self._weights = [p for group in self.groups for p in group.parameters]
        self._names = [name for group in self.groups for name in group.names]
        self._masters = [p if dtype == p.dtype == torch.float32 else p.detach().float().clone() for p in self._weights]
        start = 0
        settings = []
        for group in self.groups:
            masters = self._masters[start : start + len(group.parameters)]
            settings.append({"params": masters, "lr": group.lr, "weight_decay": group.weight_decay})
            start += len(group.parameters)
        self._adam = torch.optim.AdamW(settings, betas=(beta1, beta2), eps=1e-8, fused=True)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the model's gradients to those of the master weights, and clear them in the model."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight is master or weight.grad is None:
                continue
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad.add_(weight.grad)
            weight.grad = None

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """Return the summed gradients of all master weights; zeros for parameters without a gradient in this step."""
        for master in self._masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self._masters if master.grad is not None]

    def grad_norm(self) -> float:
        """Return the global gradient norm before clipping."""
        return total_grad_norm(self.gradients())

    @torch.no_grad()
    def step(self, lr_multiplier: float, grad_norm: float) -> None:
        """Clip the gradients to `max_grad_norm` and update at `lr_multiplier` times the peak learning rates."""
        clip_gradients(self.gradients(), grad_norm, self.max_grad_norm)
        for group, settings in zip(self.groups, self._adam.param_groups, strict=True):
            settings["lr"] = group.lr * lr_multiplier
        self._adam.step()
        self.zero_grad()
        pairs = [(weight, master) for weight, master in zip(self._weights, self._masters, strict=True)
                 if weight is not master]  # fmt: skip
        if pairs:
            torch._foreach_copy_([weight for weight, _ in pairs], [master for _, master in pairs])

    def zero_grad(self) -> None:
        """Clear the accumulated gradients."""
        self._adam.zero_grad(set_to_none=True)

    @torch.no_grad()
    def state_tensors(self) -> dict[str, Tensor]:
        """Return master weights, moments and step counts by parameter name, float32. They are not copies."""
        out: dict[str, Tensor] = {}
        for name, master in zip(self._names, self._masters, strict=True):
            state = self._adam.state[master]
            if not state:
                # The same initial state as AdamW's first step creates.
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            out[f"master/{name}"] = master.detach()
            out |= {f"{key}/{name}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        return out

    @torch.no_grad()
    def copy_masters_to_model(self) -> None:
        """Round the master weights into the model, after `state_tensors` were filled from a checkpoint."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight is not master:
                weight.copy_(master)
