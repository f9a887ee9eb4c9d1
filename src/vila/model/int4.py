"""A model whose decoder blocks are stored in 4 bits: made from a model and its rounded weights, asked, and undone.

It is the same class and the same network; only the Linears of the blocks are others. Nothing of them is held in 16 bits
beside their 4, unless the backend that is chosen (`kernels.backends.use_backend`) prepares something for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from vila.core.errors import LayoutError
from vila.kernels.int4_layout import Int4Weight
from vila.kernels.int4_linear import Int4Linear

_SHOWN = 5


def use_int4(model: nn.Module, weights: Mapping[str, Int4Weight]) -> None:
    """Let the named Linears of the decoder's blocks multiply by 4-bit weights from now on, in place.

    weights: by the Linears' names in the model, as `quant.quantize_model` gives them; they move to where the Linear is.
             Their tensors are shared, not copied, when they are there already; where the Linear's own weight was
             released (the meta device) they stay where they are.
    Biases stay as they are. The reference product is used until `use_backend` chooses another.
    Raises LayoutError, before anything is changed, listing names that are no Linear of a block, or of another shape.
    """
    blocks = _block_prefix(model)
    modules = dict(model.named_modules())
    problems = [why for name, weight in weights.items() if (why := _misfit(name, weight, modules.get(name), blocks))]
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise LayoutError(f"4-bit weights do not fit this model: {'; '.join(problems[:_SHOWN])}{more}")
    for name, weight in weights.items():
        linear: nn.Linear = modules[name]
        placed = weight if linear.weight.is_meta else weight.to(linear.weight.device)
        layer = Int4Linear.from_weight(placed, linear.bias)
        model.set_submodule(name, layer.train(linear.training))


def int4_weights(model: nn.Module) -> dict[str, Int4Weight]:
    """The 4-bit weights of a model by the names of its Linears, sharing their tensors; {} for full precision."""
    return {name: layer.weight for name, layer in int4_layers(model)}


def int4_layers(model: nn.Module) -> Iterator[tuple[str, Int4Linear]]:
    """The 4-bit layers of a model with their names, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            yield name, module


def group_size_of(model: nn.Module) -> int | None:
    """The group size that all 4-bit layers share; None for full precision. Raises LayoutError when they differ."""
    sizes = {layer.group_size for _, layer in int4_layers(model)}
    if len(sizes) > 1:
        raise LayoutError(
            f"the model has groups of {' and '.join(map(str, sorted(sizes)))}; quantize it with one group size"
        )
    return sizes.pop() if sizes else None


def drop_int4(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn every 4-bit layer into an ordinary Linear with the rounded values, in place; the opposite of `use_int4`.

    dtype: of the new weights; None takes that of the embeddings.
    """
    kind = dtype or _embeddings(model).dtype
    for name, layer in list(int4_layers(model)):
        model.set_submodule(name, layer.to_linear(kind).train(layer.training))


def _misfit(name: str, weight: Int4Weight, module: nn.Module | None, blocks: str) -> str:
    """Why a weight cannot be used there; empty when it can."""
    if not name.startswith(blocks):
        return f"{name} is not in the decoder's blocks ({blocks}...)"
    if isinstance(module, Int4Linear):
        return f"{name} is in 4 bits already"
    if not isinstance(module, nn.Linear):
        return f"{name} is {'missing' if module is None else f'a {type(module).__name__}'}, not a Linear"
    found, wanted = [weight.num_outputs, weight.num_inputs], [module.out_features, module.in_features]
    return "" if found == wanted else f"{name} is {wanted}, its 4-bit weight {found}"


def _block_prefix(model: Any) -> str:
    """`language_model.model.layers.`, or what it is called in this model."""
    layers = model.get_decoder().layers
    return next(f"{name}." for name, module in model.named_modules() if module is layers)


def _embeddings(model: Any) -> torch.Tensor:
    weight: torch.Tensor = model.get_input_embeddings().weight
    return weight
