"""Using what a search found: folding scales into norms and Linears, clamping weights, rounding to INT4.

A folded model computes what it computed before, up to rounding, and is an ordinary model of its family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vila.core.errors import ConfigError, LayoutError
from vila.kernels.int4 import Int4Weight, quantize
from vila.quant.awq_cache import AwqSearch, ChannelScale, WeightClip
from vila.quant.blocks import block_linears, block_name, check_model, decoder_blocks, module_prefix

# O output channels  I input channels  G groups of a row


def fold_scale(fold: nn.Module, linears: Sequence[nn.Module], scale_I: Tensor) -> None:
    """Divide the outputs of `fold`, a norm or a Linear, by the scale and multiply the Linears' columns by it.

    Of a Linear that makes more outputs than the scale has channels, the last ones are meant, as in the original.
    New parameters are set: the old ones may be views of a file.
    """
    one = fold.weight
    divisor = scale_I[:, None] if one.dim() == 2 else scale_I  # type: ignore[operator]
    _set(fold, "weight", _tail_divided(one, divisor))  # type: ignore[arg-type]
    if getattr(fold, "bias", None) is not None:
        _set(fold, "bias", _tail_divided(fold.bias, scale_I))  # type: ignore[arg-type]
    for linear in linears:
        _set(linear, "weight", _wide(linear.weight) * _wide(scale_I).to(linear.weight.device))  # type: ignore[arg-type]


def clamp_weight(linear: nn.Module, limit_OG: Tensor) -> None:
    """Clamp each group of a row to plus and minus its limit."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    limit = limit_OG.to(weight)[..., None]
    groups = weight.unflatten(-1, (limit_OG.shape[1], -1))
    _set(linear, "weight", torch.maximum(torch.minimum(groups, limit), -limit).flatten(-2))


@torch.no_grad()
def apply_search(model: nn.Module, search: AwqSearch) -> None:
    """Fold all scales into the model and clamp its weights, in place; nothing is rounded to INT4.

    Raises as `check_search`, before anything is changed.
    """
    modules = check_search(model, search)
    for scale in search.scales:
        fold_scale(modules[scale.fold], [modules[name] for name in scale.linears], scale.scale_I)
    for clip in search.clips:
        clamp_weight(modules[clip.linear], clip.limit_OG)


def check_search(model: nn.Module, search: AwqSearch) -> dict[str, nn.Module]:
    """The modules with weights of the model's blocks, by the names that searches use.

    Raises LayoutError naming what of the search does not fit the model.
    """
    modules = {
        name: module for index, block in enumerate(decoder_blocks(model)) for name, module in _named(index, block)
    }
    problems = [problem for scale in search.scales for problem in _scale_problems(scale, modules)]
    problems += [problem for clip in search.clips for problem in _clip_problems(clip, modules)]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise LayoutError(f"the search does not fit this model: {'; '.join(problems[:5])}{more}; make it again for it")
    return modules


def quantize_model(
    model: nn.Module,
    search: AwqSearch | None,
    group_size: int,
    symmetric: bool = False,
    *,
    scale_dtype: torch.dtype = torch.float16,
    release: bool = False,
) -> dict[str, Int4Weight]:
    """The Linears of the decoder's blocks in INT4, by their names in the model; the head and all else stay as they are.

    search:  is applied to the model first, in place; None rounds the weights as they are (round to nearest, RTN).
    release: let go of each weight once it is rounded (it moves to the meta device), so memory does not hold both.
    Raises as `check_model` and `apply_search`; ConfigError when the search was made for another kind of rounding.
    """
    check_model(model, group_size)
    if search is not None:
        check_same_rounding(search, group_size, symmetric)
        apply_search(model, search)
    return dict(_rounded(model, group_size, symmetric, scale_dtype, release))


def check_same_rounding(search: AwqSearch, group_size: int, symmetric: bool) -> None:
    """Raises ConfigError when the search was made for another group size or mode; foreign searches do not say."""
    for name, asked in (("group_size", group_size), ("symmetric", symmetric)):
        made = search.facts.get(name, asked)
        if made != asked:
            raise ConfigError(f"the search was made with {name} {made}, not {asked}; ask for {made}, or search again")


@torch.no_grad()
def _rounded(
    model: nn.Module, group_size: int, symmetric: bool, scale_dtype: torch.dtype, release: bool
) -> Iterator[tuple[str, Int4Weight]]:
    prefix = module_prefix(model)
    for index, block in enumerate(decoder_blocks(model)):
        for name, linear in block_linears(block).items():
            rounded = quantize(_wide(linear.weight), group_size, symmetric=symmetric, dtype=scale_dtype)
            yield f"{prefix}{block_name(index)}.{name}", rounded
            if release:
                linear.weight = nn.Parameter(linear.weight.detach().to("meta"), requires_grad=False)


def _named(index: int, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in block.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            yield f"{block_name(index)}.{name}", module


def _scale_problems(scale: ChannelScale, modules: dict[str, nn.Module]) -> Iterator[str]:
    width = scale.scale_I.numel()
    if scale.fold not in modules:
        yield f"{scale.fold} is no norm or Linear of it"
    elif modules[scale.fold].weight.shape[0] < width:  # type: ignore[index]
        yield f"{scale.fold} has fewer outputs than the scale's {width} channels"
    for name in scale.linears:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            yield f"{name} is no Linear of it"
        elif linear.in_features != width:
            yield f"{name} has {linear.in_features} inputs, its scale {width} channels"
    if not (torch.isfinite(scale.scale_I).all() and (scale.scale_I > 0).all()):
        yield f"the scale of {scale.fold} is not finite and positive"


def _clip_problems(clip: WeightClip, modules: dict[str, nn.Module]) -> Iterator[str]:
    linear = modules.get(clip.linear)
    if not isinstance(linear, nn.Linear):
        yield f"{clip.linear} is no Linear of it"
    elif clip.limit_OG.shape[0] != linear.out_features or linear.in_features % max(1, clip.limit_OG.shape[1]):
        shape = "x".join(map(str, linear.weight.shape))
        yield f"{clip.linear} is {shape}, its limits are {'x'.join(map(str, clip.limit_OG.shape))}"
    elif not (clip.limit_OG >= 0).all():
        yield f"the limits of {clip.linear} are not all 0 and more"


def _tail_divided(values: Tensor, divisor: Tensor) -> Tensor:
    new = _wide(values).clone()
    new[-divisor.shape[0] :] /= _wide(divisor).to(new.device)
    return new


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    old: nn.Parameter = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))


# --- rounding
# What INT4 rounding leaves of a weight, as the search tries it thousands of times: nothing is packed or stored.


# O output channels  I input channels  G groups of a row

_TINY = 1e-5


def fake_quantize(weight_OI: Tensor, group_size: int, symmetric: bool = False) -> Tensor:
    """A new tensor: the weight after INT4 rounding, in its own number type.

    Asymmetric: codes 0 to 15 between the least and the greatest value of a group, which need not enclose 0.
    Symmetric: codes -8 to 7, the greatest magnitude of a group at 7. Rounding is half to even. This is the arithmetic
    of the storage, `vila.kernels.int4.quantize`, but for the number type of the scales.
    """
    groups = weight_OI.unflatten(-1, (-1, group_size))
    if symmetric:
        scale = groups.abs().amax(-1, keepdim=True).clamp_(min=_TINY).div_(7)
        return groups.div(scale).round_().clamp_(-8, 7).mul_(scale).flatten(-2)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low).clamp_(min=_TINY).div_(15)
    zero = low.div_(scale).round_().neg_().clamp_(0, 15)
    return groups.div(scale).round_().add_(zero).clamp_(0, 15).sub_(zero).mul_(scale).flatten(-2)
