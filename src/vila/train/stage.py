"""Which part of the model learns, and at which rate."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from vila.core.errors import TrainingError
from vila.model.vila import VilaForConditionalGeneration

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
