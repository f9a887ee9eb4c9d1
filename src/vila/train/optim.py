"""AdamW on float32 master weights, whatever the type of the forward pass; warm-up, then cosine to zero."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vila.core.errors import TrainingError
from vila.model.modeling import VilaForConditionalGeneration
from vila.train.fsdp import whole

# --- stage
# Which part of the model learns, and at which rate.


MODULES = {"vision": "vision_tower", "projector": "projector", "llm": "language_model"}


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share a peak rate and a weight decay."""

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
    """Freeze everything but `tune`, and put frozen parts in eval mode.

    llm_parts: names of submodules; when given, a tuned LLM learns those of its parameters that lie in one of them.
    adapters:  names of parameters; when given, a tuned LLM learns those alone.
    Raises TrainingError when nothing is left to learn.
    """
    model.requires_grad_(False).eval()
    for name in tune:
        part = getattr(model, MODULES[name]).train()
        for parameter_name, parameter in part.named_parameters(prefix=MODULES[name]):
            # Weights of 4 and 8 bits cannot learn, nor be asked to.
            if parameter.is_floating_point():
                parameter.requires_grad_(name != "llm" or _learns(parameter_name, llm_parts, adapters))
    if "llm" in tune and not tune_embeddings:
        for head in (model.get_input_embeddings(), model.get_output_embeddings()):
            head.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(f"nothing to train: stage.tune={list(tune)} selects no parameters")


def _learns(name: str, llm_parts: Sequence[str], adapters: Collection[str] | None) -> bool:
    """Whether a parameter of a tuned LLM is among those that are named."""
    if adapters is not None:
        return name in adapters
    return not llm_parts or bool(set(name.split(".")) & set(llm_parts))


def group_parameters(
    model: VilaForConditionalGeneration, *, lr: float, lr_projector: float | None, weight_decay: float
) -> list[Group]:
    """What learns, grouped by rate and decay. Norms and biases do not decay."""
    table: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = lr_projector if lr_projector is not None and name.startswith("projector.") else lr
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            table.setdefault((rate, decay), []).append((name, parameter))
    return [
        Group(tuple(n for n, _ in rows), tuple(p for _, p in rows), rate, decay)
        for (rate, decay), rows in table.items()
    ]


def count_parameters(groups: Sequence[Group]) -> int:
    """Parameters that learn."""
    return sum(p.numel() for group in groups for p in group.parameters)


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
    def gradients(self) -> list[Tensor]:
        """The summed gradients of all masters; zero for what the step did not reach, on all processes alike."""
        for master in self._masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self._masters if master.grad is not None]

    @torch.no_grad()
    def norm(self) -> float:
        """The norm of all gradients together."""
        return float(whole(torch.nn.utils.get_total_norm(self.gradients())))

    @torch.no_grad()
    def step(self, factor: float, norm: float) -> None:
        """One update at `factor` times the peak rates, gradients of a greater `norm` scaled down to the greatest."""
        if norm > self.max_grad_norm:
            torch._foreach_mul_(self.gradients(), self.max_grad_norm / (norm + 1e-6))
        for group, settings in zip(self.groups, self._adam.param_groups, strict=True):
            settings["lr"] = group.lr * factor
        self._adam.step()
        self.discard()
        pairs = [(live, master) for live, master in zip(self._live, self._masters, strict=True) if live is not master]
        if pairs:
            torch._foreach_copy_([live for live, _ in pairs], [master for _, master in pairs])

    def discard(self) -> None:
        """Forget the gradients."""
        self._adam.zero_grad(set_to_none=True)

    @torch.no_grad()
    def state_tensors(self) -> dict[str, Tensor]:
        """Masters, moments and update counts by parameter name, float32: the optimizer's own tensors, not copies."""
        out: dict[str, Tensor] = {}
        for name, master in zip(self._names, self._masters, strict=True):
            state = self._adam.state[master]
            if not state:
                # As the optimizer makes them at its first step.
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            out[f"master/{name}"] = master.detach()
            out |= {f"{key}/{name}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        return out

    @torch.no_grad()
    def state_was_loaded(self) -> None:
        """Round the masters into the model, after `state_tensors` were filled from a checkpoint."""
        for live, master in zip(self._live, self._masters, strict=True):
            if live is not master:
                live.copy_(master)
