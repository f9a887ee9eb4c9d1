"""Trainable parameters of a stage, and the optimizer's parameter groups (learning rate and weight decay)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from vila.core.errors import TrainingError
from vila.model.modeling import VilaForConditionalGeneration

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
