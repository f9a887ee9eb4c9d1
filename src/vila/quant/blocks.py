"""The decoder blocks of a model as a search needs them: found by family, and checked before any work."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from vila.core.errors import ConfigError, LayoutError, UnknownNameError
from vila.families import Family, ScaleGroup, find_family

GROUP_SIZES = (32, 64, 128)
"""Group sizes that the published formats know."""


def block_name(index: int) -> str:
    """What searches call a block, whatever the model around it calls its LLM."""
    return f"model.layers.{index}"


def text_decoder(model: nn.Module) -> nn.Module:
    """The LLM without its head, of a visual language model or of an LLM alone."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    return decoder


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder's blocks, in order."""
    return list(text_decoder(model).layers)  # type: ignore[arg-type]


def module_prefix(model: nn.Module) -> str:
    """What stands before `model.layers` in the names of the model's own modules: `language_model.` or nothing."""
    layers = text_decoder(model).layers
    name = next(name for name, module in model.named_modules() if module is layers)
    return name.removesuffix("layers").removesuffix("model.")


def family_of(model: nn.Module) -> Family:
    """Return the family of the LLM. Raises LayoutError saying which there are and how to write one."""
    model_type: str = text_decoder(model).config.model_type  # type: ignore[union-attr, assignment]
    try:
        return find_family(model_type)
    except UnknownNameError as error:
        raise LayoutError(
            f"{error}; a family is one entry in vila/families.py, whose scale_groups name the Linears of a "
            "decoder block that share an input, and what absorbs their scale"
        ) from error


def block_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The Linears of a block by their names in it, in order."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def can_scale(group: ScaleGroup, block: nn.Module) -> bool:
    """Whether the group's scale can be folded: into a norm always, into a Linear when it makes just these inputs.

    With grouped key-value heads an output of v_proj feeds several inputs of o_proj, which is then left as it is.
    """
    fold, first = block.get_submodule(group.fold), block.get_submodule(group.linears[0])
    return not isinstance(fold, nn.Linear) or fold.weight.shape == first.weight.T.shape


def check_model(model: nn.Module, group_size: int) -> Family:
    """Return the family of the LLM after checking that it can be quantized.

    Raises as `check_layers`, and LayoutError for weights that are absent or not finite.
    """
    family = check_layers(model, group_size)
    for name, parameter in _named_weights(model):
        if parameter.is_meta:
            raise LayoutError(f"{name}: its weight is not in memory; load the model again")
        if not torch.isfinite(parameter).all():
            raise LayoutError(
                f"{name}: the weight holds NaN or infinity, which no rounding can keep; the checkpoint is damaged, or "
                "its training diverged"
            )
    return family


def check_layers(model: nn.Module, group_size: int) -> Family:
    """Return the family of the LLM after checking the shapes of its layers; the weights may be on the meta device.

    Raises LayoutError for an unknown family, and for blocks whose Linears are not plain ones (quantized already,
    or with an adapter around them) or not those of the family; ConfigError for a group size that does not divide the
    inputs, with those that would.
    """
    family = family_of(model)
    check_group_size(model, family, group_size)
    return family


def _named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of the blocks by the names that searches use, a Linear's by its module; then all others."""
    seen = set()
    for index, block in enumerate(decoder_blocks(model)):
        for name, parameter in block.named_parameters():
            seen.add(id(parameter))
            yield f"{block_name(index)}.{name.removesuffix('.weight')}", parameter
    yield from ((name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in seen)


def check_group_size(model: nn.Module, family: Family, group_size: int) -> None:
    """Raise ConfigError unless `group_size` divides the inputs of every Linear; LayoutError for unknown Linears."""
    wrong: dict[int, list[str]] = {}
    widths: set[int] = set()
    for name, linear in _listed(model, family):
        widths.add(linear.in_features)
        if group_size < 1 or linear.in_features % group_size:
            wrong.setdefault(linear.in_features, []).append(name)
    if not wrong:
        return
    fitting = [str(size) for size in _dividing(widths)]
    where = "; ".join(f"{width} inputs of {_some(names)}" for width, names in sorted(wrong.items()))
    remedy = f"group sizes that fit this model: {', '.join(fitting)}" if fitting else "no usual group size fits"
    raise ConfigError(f"group size {group_size} does not divide {where}", hint=remedy)


def fitting_group_sizes(model: nn.Module) -> list[int]:
    """Return the usual group sizes that divide the inputs of every Linear, ascending; none if no size does.

    Raises LayoutError as `check_layers`.
    """
    return _dividing({linear.in_features for _, linear in _listed(model, family_of(model))})


def _dividing(widths: set[int]) -> list[int]:
    return [size for size in GROUP_SIZES if not any(width % size for width in widths)]


def _listed(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Linear]]:
    known = [name for group in family.scale_groups for name in group.linears]
    for index, block in enumerate(decoder_blocks(model)):
        modules = dict(block.named_modules())
        for name in known:
            module = modules.get(name)
            if not isinstance(module, nn.Linear):
                what = "missing" if module is None else f"a {type(module).__name__}"
                raise LayoutError(
                    f"{block_name(index)}.{name} is {what}, not a Linear: the model is quantized already, or holds an "
                    "adapter; start from its 16-bit weights, with adapters merged"
                )
            yield f"{block_name(index)}.{name}", module
        if other := [name for name in block_linears(block) if name not in known]:
            raise LayoutError(
                f"{block_name(index)}: {', '.join(other)} are in no scale group of the family {family.model_type}"
            )


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
