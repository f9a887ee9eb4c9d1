"""Apply an AWQ search: fold scales into norms and Linears, clip weights, round to INT4.

A folded model gives the same outputs up to floating-point rounding, and is an ordinary model of its family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vila.core.errors import ConfigError, LayoutError
from vila.kernels.int4 import Int4Weight, quantize
from vila.quant.awq_cache import AwqSearch, ChannelScale, WeightClip
from vila.quant.blocks import block_linears, block_name, check_layers, check_weights, decoder_blocks, module_prefix

# O output channels  I input channels  G groups per output channel

_TINY = 1e-5


def fold_scale(fold: nn.Module, linears: Sequence[nn.Module], scale_I: Tensor) -> None:
    """Divide the output channels of `fold`, a norm or a Linear, by the scale, and multiply the Linears' inputs by it.

    If `fold` is a Linear with more outputs than scale channels, the last outputs are scaled, as in the released code.
    Parameters are replaced, not changed in place: they may be memory-mapped.
    """
    weight = fold.weight
    divisor = scale_I[:, None] if weight.dim() == 2 else scale_I  # type: ignore[operator]
    _set(fold, "weight", _divide_tail(weight, divisor))  # type: ignore[arg-type]
    if getattr(fold, "bias", None) is not None:
        _set(fold, "bias", _divide_tail(fold.bias, scale_I))  # type: ignore[arg-type]
    for linear in linears:
        _set(linear, "weight", _wide(linear.weight) * _wide(scale_I).to(linear.weight.device))  # type: ignore[arg-type]


def clip_weight(weight_OI: Tensor, limit_OG: Tensor) -> Tensor:
    """Return the weight with each group clipped to [-limit, limit]."""
    limit_OG1 = limit_OG.to(weight_OI)[..., None]
    groups_OGK = weight_OI.unflatten(-1, (limit_OG.shape[1], -1))
    return torch.maximum(torch.minimum(groups_OGK, limit_OG1), -limit_OG1).flatten(-2)


@torch.no_grad()
def apply_search(model: nn.Module, search: AwqSearch) -> None:
    """Fold all scales into the model and clip its weights, in place. Nothing is rounded to INT4.

    Raises the errors of `check_search`, before anything is changed.
    """
    modules = check_search(model, search)
    for scale in search.scales:
        fold_scale(modules[scale.fold], [modules[name] for name in scale.linears], scale.scale_I)
    for clip in search.clips:
        linear = modules[clip.linear]
        _set(linear, "weight", clip_weight(linear.weight, clip.limit_OG))  # type: ignore[arg-type]


def check_search(model: nn.Module, search: AwqSearch) -> dict[str, nn.Module]:
    """Return the modules with weights in the model's decoder blocks, by the names used in searches.

    Raises LayoutError listing the entries of the search that do not fit the model.
    """
    modules = {
        f"{block_name(index)}.{name}": module
        for index, block in enumerate(decoder_blocks(model))
        for name, module in block.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    }
    problems = [problem for scale in search.scales for problem in _scale_problems(scale, modules)]
    problems += [problem for clip in search.clips for problem in _clip_problems(clip, modules)]
    if problems:
        field, problem = problems[0]
        more = f"; and {len(problems) - 1} more problems" if len(problems) > 1 else ""
        raise LayoutError(
            f"the AWQ search does not fit this model: {problem}{more}", field=field, hint="run the search on this model"
        )
    return modules


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    search: AwqSearch | None,
    group_size: int,
    symmetric: bool = False,
    *,
    release: bool = False,
) -> dict[str, Int4Weight]:
    """Round the Linears of the decoder blocks to INT4 (nearest); return them by their names in the model.

    search:  applied to the model first, in place; None: round the weights as they are (RTN).
    release: free each weight after rounding (move it to the meta device).
    Raises the errors of `check_layers`, `check_weights` and `apply_search`; ConfigError for a search
    with another group size or mode.
    """
    check_layers(model, group_size)
    check_weights(model)
    if search is not None:
        check_same_rounding(search, group_size, symmetric)
        apply_search(model, search)
    rounded = {}
    prefix = module_prefix(model)
    for index, block in enumerate(decoder_blocks(model)):
        for name, linear in block_linears(block).items():
            weight_OI = _wide(linear.weight)
            rounded[f"{prefix}{block_name(index)}.{name}"] = quantize(weight_OI, group_size, symmetric=symmetric)
            if release:
                linear.weight = nn.Parameter(linear.weight.detach().to("meta"), requires_grad=False)
    return rounded


def check_same_rounding(search: AwqSearch, group_size: int, symmetric: bool) -> None:
    """Raise ConfigError if the search was made for another group size or mode; files of the AWQ release lack both."""
    for name, value in (("group_size", group_size), ("symmetric", symmetric)):
        searched = search.settings.get(name, value)
        if searched != value:
            raise ConfigError(
                "differs from the AWQ search",
                field=name,
                value=value,
                expected=str(searched),
                hint="use that value, or run the search again",
            )


def _scale_problems(scale: ChannelScale, modules: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    width = scale.scale_I.numel()
    if scale.fold not in modules:
        yield scale.fold, "not a norm or Linear of the model"
    elif modules[scale.fold].weight.shape[0] < width:  # type: ignore[index]
        yield scale.fold, f"has fewer outputs than the {width} channels of its scale"
    for name in scale.linears:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            yield name, "not a Linear of the model"
        elif linear.in_features != width:
            yield name, f"has {linear.in_features} inputs, its scale {width} channels"
    if not (torch.isfinite(scale.scale_I).all() and (scale.scale_I > 0).all()):
        yield scale.fold, "its scale is not finite and positive"


def _clip_problems(clip: WeightClip, modules: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    linear = modules.get(clip.linear)
    if not isinstance(linear, nn.Linear):
        yield clip.linear, "not a Linear of the model"
    elif clip.limit_OG.shape[0] != linear.out_features or linear.in_features % max(1, clip.limit_OG.shape[1]):
        shape = "x".join(map(str, linear.weight.shape))
        yield clip.linear, f"has shape {shape}, its limits {'x'.join(map(str, clip.limit_OG.shape))}"
    elif not (clip.limit_OG >= 0).all():
        yield clip.linear, "has negative limits"


def _divide_tail(values: Tensor, divisor: Tensor) -> Tensor:
    new = _wide(values).clone()
    new[-divisor.shape[0] :] /= _wide(divisor).to(new.device)
    return new


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    old: nn.Parameter = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))


def fake_quantize(weight_OI: Tensor, group_size: int, symmetric: bool = False) -> Tensor:
    """Return the weight after INT4 rounding, in its own dtype, without packing. The search calls it thousands of times.

    Asymmetric: codes 0 to 15 between minimum and maximum of a group, which need not contain 0. Symmetric: codes -8 to
    7, the largest magnitude of a group at 7. Rounding is half to even. Same arithmetic as `vila.kernels.int4.quantize`
    except for the dtype of the scales.
    """
    groups = weight_OI.unflatten(-1, (-1, group_size))
    if symmetric:
        scale = groups.abs().amax(-1, keepdim=True).clamp_(min=_TINY).div_(7)
        return groups.div(scale).round_().clamp_(-8, 7).mul_(scale).flatten(-2)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low).clamp_(min=_TINY).div_(15)
    zero = low.div_(scale).round_().neg_().clamp_(0, 15)
    return groups.div(scale).round_().add_(zero).clamp_(0, 15).sub_(zero).mul_(scale).flatten(-2)
