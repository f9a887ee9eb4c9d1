"""Decoder blocks of a model and their Linears, and checks that a model can be quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from vila.core.errors import ConfigError, LayoutError, UnknownNameError
from vila.families import FAMILIES, Family, ScaleGroup, find_family

GROUP_SIZES = (32, 64, 128)
"""Group sizes of the published formats."""


def block_name(index: int) -> str:
    """Return the name of a block in searches, independent of how the model names its LLM."""
    return f"model.layers.{index}"


def text_decoder(model: nn.Module) -> nn.Module:
    """Return the LLM without its LM head, of a visual language model or of an LLM."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    return decoder


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks in order."""
    return list(text_decoder(model).layers)  # type: ignore[arg-type]


def module_prefix(model: nn.Module) -> str:
    """Return the prefix of `model.layers` in the model's module names: `language_model.` or empty."""
    layers = text_decoder(model).layers
    name = next(name for name, module in model.named_modules() if module is layers)
    return name.removesuffix("layers").removesuffix("model.")


def family_of(model: nn.Module) -> Family:
    """Return the family of the LLM. Raises LayoutError for a family without an entry in `vila.families`."""
    model_type: str = text_decoder(model).config.model_type  # type: ignore[union-attr, assignment]
    try:
        return find_family(model_type)
    except UnknownNameError as error:
        raise LayoutError(
            "the LLM family cannot be quantized",
            field="model_type",
            value=model_type,
            expected=", ".join(FAMILIES),
            hint="add an entry with scale_groups to vila/families.py",
        ) from error


def block_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the Linears of a block by their names in it, in order."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def can_scale(group: ScaleGroup, block: nn.Module) -> bool:
    """Return whether the scale can be folded: always into a norm; into a Linear if its outputs are the group's inputs.

    With grouped-query attention an output of v_proj feeds several inputs of o_proj, which is then not scaled.
    """
    fold, first = block.get_submodule(group.fold), block.get_submodule(group.linears[0])
    return not isinstance(fold, nn.Linear) or fold.weight.shape == first.weight.T.shape


def check_weights(model: nn.Module) -> None:
    """Raise LayoutError naming a weight that is not in memory or not finite."""
    for name, parameter in _named_weights(model):
        if parameter.is_meta:
            raise LayoutError("the weight is not in memory", field=name, hint="load the model again")
        if not torch.isfinite(parameter).all():
            raise LayoutError(
                "the weight has NaN or infinity: the checkpoint is damaged, or its training diverged", field=name
            )


def check_layers(model: nn.Module, group_size: int) -> None:
    """Check that the decoder blocks can be quantized; the model may be on the meta device.

    Raises LayoutError for an unknown family, and for Linears that are quantized, have an adapter, or are in no scale
    group of the family; ConfigError for a group size that does not divide the inputs of every Linear.
    """
    names: dict[int, str] = {}
    for name, linear in _scaled_linears(model):
        names.setdefault(linear.in_features, name)
    wrong = [width for width in sorted(names) if group_size < 1 or width % group_size]
    if wrong:
        fitting = _dividing(names)
        raise ConfigError(
            "does not divide " + ", ".join(f"{width} inputs of {names[width]}" for width in wrong),
            field="group_size",
            value=group_size,
            expected=" or ".join(map(str, fitting)) if fitting else None,
            hint=None if fitting else "no usual group size fits this model",
        )


def fitting_group_sizes(model: nn.Module) -> list[int]:
    """Return the usual group sizes that divide the inputs of every Linear, ascending. Raises like `check_layers`."""
    return _dividing({linear.in_features for _, linear in _scaled_linears(model)})


def _dividing(widths: Iterable[int]) -> list[int]:
    return [size for size in GROUP_SIZES if not any(width % size for width in widths)]


def _named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the weights of the blocks by their names in searches (a Linear's by its module), then all others."""
    seen = set()
    for index, block in enumerate(decoder_blocks(model)):
        for name, parameter in block.named_parameters():
            seen.add(id(parameter))
            yield f"{block_name(index)}.{name.removesuffix('.weight')}", parameter
    yield from ((name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in seen)


def _scaled_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the Linears of the family's scale groups, by their names in searches. Raises LayoutError."""
    family = family_of(model)
    known = [name for group in family.scale_groups for name in group.linears]
    for index, block in enumerate(decoder_blocks(model)):
        modules = dict(block.named_modules())
        for name in known:
            module = modules.get(name)
            if not isinstance(module, nn.Linear):
                raise LayoutError(
                    "the model is quantized already, or has adapters",
                    field=f"{block_name(index)}.{name}",
                    value="missing" if module is None else type(module).__name__,
                    expected="a Linear",
                    hint="use its 16-bit weights, with adapters merged",
                )
            yield f"{block_name(index)}.{name}", module
        if other := [name for name in block_linears(block) if name not in known]:
            raise LayoutError(
                f"{', '.join(other)} are in no scale group of the family {family.model_type}", field=block_name(index)
            )
