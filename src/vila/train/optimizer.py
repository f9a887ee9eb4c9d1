"""Optimizer: AdamW with float32 masters, parameter groups, learning-rate schedule, gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vila.core.errors import TrainingError
from vila.model.modeling import VilaForConditionalGeneration
from vila.train.checkpoint import Progress
from vila.train.fsdp import full_tensor

# Trainable parameters of a stage, and the optimizer's parameter groups (learning rate and weight decay).


MODULES = {"vision": "vision_tower", "projector": "projector", "llm": "language_model"}
"""Attribute of the model for each name in `stage.tune`."""


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that share a peak learning rate and a weight decay."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    lr: float
    weight_decay: float


def select_trainable(
    model: VilaForConditionalGeneration,
    tune: Sequence[str],
    *,
    tune_embeddings: bool = True,
    llm_parts: Sequence[str] = (),
    adapters: Collection[str] | None = None,
) -> None:
    """Make the modules in `tune` trainable; freeze the rest and put it into eval mode.

    tune_embeddings: train the embeddings and the LM head of a tuned LLM.
    llm_parts:       submodule names; restricts a tuned LLM to parameters below one of them.
    adapters:        parameter names; restricts a tuned LLM to them.
    Raises TrainingError if no parameter is trainable.
    """
    model.requires_grad_(False).eval()
    for name in tune:
        module = getattr(model, MODULES[name]).train()
        for parameter_name, parameter in module.named_parameters(prefix=MODULES[name]):
            # Quantized (integer) weights cannot require gradients.
            if parameter.is_floating_point():
                parameter.requires_grad_(name != "llm" or _is_selected(parameter_name, llm_parts, adapters))
    if "llm" in tune and not tune_embeddings:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("no parameter is trainable", field="stage.tune", value=list(tune))


def _is_selected(name: str, llm_parts: Sequence[str], adapters: Collection[str] | None) -> bool:
    if adapters is not None:
        return name in adapters
    return not llm_parts or bool(set(name.split(".")) & set(llm_parts))


def group_parameters(
    model: VilaForConditionalGeneration, *, lr: float, lr_projector: float | None, weight_decay: float
) -> list[ParameterGroup]:
    """Group the trainable parameters by learning rate and weight decay. Norms and biases have no weight decay."""
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            peak = lr_projector if lr_projector is not None and name.startswith("projector.") else lr
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((peak, decay), []).append((name, parameter))
    return [
        ParameterGroup(tuple(name for name, _ in named), tuple(parameter for _, parameter in named), peak, decay)
        for (peak, decay), named in groups.items()
    ]


def count_parameters(groups: Sequence[ParameterGroup]) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for group in groups for parameter in group.parameters)


# Learning-rate schedule: linear warm-up, then half a cosine to zero, over the run's budget of tokens or samples.


def lr_multiplier(budget_fraction: float, warmup_ratio: float) -> float:
    """Return the factor (0..1) on the peak learning rates after `budget_fraction` (0..1) of the budget."""
    if budget_fraction < warmup_ratio:
        return (budget_fraction + 1e-3) / (warmup_ratio + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (budget_fraction - warmup_ratio) / (1 - warmup_ratio))))


@dataclass(frozen=True, slots=True)
class LRSchedule:
    """Learning-rate schedule of a run. Exactly one of `max_tokens` and `max_visits` is set.

    warmup_ratio: fraction (0..1) of the budget with a rising learning rate.
    max_tokens:   budget in tokens (`budget.tokens`).
    max_visits:   budget in sample visits (`budget.epochs` times the length of an epoch).
    """

    warmup_ratio: float
    max_tokens: int | None = None
    max_visits: int | None = None

    def budget_fraction(self, progress: Progress) -> float:
        """Return the fraction of the budget that is used up; the last step may exceed 1."""
        if self.max_visits is not None:
            return progress.visits / self.max_visits
        assert self.max_tokens is not None
        return progress.tokens / self.max_tokens

    def multiplier(self, progress: Progress) -> float:
        """Return the factor on the peak learning rates for the next step."""
        return lr_multiplier(self.budget_fraction(progress), self.warmup_ratio)


# Gradient clipping by the global norm of all trainable parameters.


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
