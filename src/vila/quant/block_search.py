"""One decoder block: scales of all its groups on the untouched weights, then folding, then clip limits.

The block is a copy in the search's number type; the model is only read. Its output for the next block is that of the
full-precision weights, as in the original: no block sees another one's rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vila.core.errors import ConfigError, LayoutError
from vila.families.card import ScaleGroup
from vila.quant.apply import fold_scale
from vila.quant.blocks import can_scale
from vila.quant.clip import Clipping, is_clipped, sample_tokens, search_limits, second_moments
from vila.quant.inputs import Arguments, Call, recorded
from vila.quant.result import Clip, Scale, Search
from vila.quant.scale import (
    Chosen,
    Scaling,
    alone_loss,
    candidates,
    mean_magnitude,
    module_loss,
    search_scale,
    weight_magnitude,
)

# N rows  S sequence  D model width  I input channels  T tokens


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How to search. The defaults are the published way; everything else is measured against it.

    group_size:   input channels that share a scale of the INT4 weights.
    symmetric:    no zero points, as TensorRT-LLM wants it.
    scaling:      `activation` tries scales from activations alone, `duo` from activations and weights with the identity
                  kept, `both` all of these.
    clipping:     `published` limits all Linears but queries and keys, `all` those too, `none` leaves it out.
    image_weight: what a token of a picture counts where a token of text counts 1.
    dtype:        number type of the search; None is that of the model's weights.
    device:       where a block is searched; None is where it lies.
    batch_tokens: tokens that a module runs on at once: more is faster on a GPU and takes more memory.
    """

    group_size: int = 128
    symmetric: bool = False
    scaling: Scaling = "activation"
    clipping: Clipping = "published"
    image_weight: float = 1.0
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        problems = []
        for name, known in (("scaling", ("activation", "duo", "both")), ("clipping", ("none", "published", "all"))):
            if getattr(self, name) not in known:
                problems.append(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        if not (self.image_weight > 0 and math.isfinite(self.image_weight)):
            problems.append(f"image_weight {self.image_weight} must be above 0 and finite")
        if problems:
            raise ConfigError.collect("search", problems)

    def facts(self) -> dict[str, Any]:
        """What decides the result, for the result's own record."""
        names = ("group_size", "symmetric", "scaling", "clipping", "image_weight")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class SearchedBlock:
    """What was found, with the block's name before every name, and its full-precision output [N, S, D]."""

    found: Search
    output_NSD: Tensor


@torch.no_grad()
def search_block(
    name: str,
    block: nn.Module,
    groups: Sequence[ScaleGroup],
    states_NSD: Tensor,
    weights_NS: Tensor | None,
    arguments: Arguments,
    options: SearchOptions,
) -> SearchedBlock:
    """Search one block. `states_NSD` is its input, in the dtype and on the device of the search; it is not changed.

    Raises LayoutError naming the block when its activations are not finite.
    """
    work = working_copy(block, states_NSD)
    rows = _rows_at_once(states_NSD, options)
    output, inputs, calls = run_block(work, groups, states_NSD, arguments, rows)
    if not torch.isfinite(output).all():
        raise LayoutError(f"{name}: its activations are not finite in {states_NSD.dtype}; search in float32")
    scales = []
    chosen = {}
    for group in groups:
        if can_scale(group, work):
            chosen[group] = _search_group(work, group, inputs[group.linears[0]], weights_NS, calls, options, rows)
    samples = {group: _sample(inputs.pop(group.linears[0]), weights_NS) for group in groups}
    clips = []
    for group, choice in chosen.items():
        scale_I = choice.best.scale_I
        fold_scale(work.get_submodule(group.fold), [work.get_submodule(one) for one in group.linears], scale_I)
        samples[group] = (samples[group][0] / scale_I, samples[group][1])
        linears = tuple(f"{name}.{one}" for one in group.linears)
        scales.append(Scale(f"{name}.{group.fold}", linears, scale_I.float(), _facts(choice)))
    for group in groups:
        inputs_TI, weights_T = samples.pop(group)
        if any(is_clipped(linear, options.clipping) for linear in group.linears):
            moments_GKK = second_moments(inputs_TI, options.group_size, weights_T)
            for linear in (one for one in group.linears if is_clipped(one, options.clipping)):
                limit = search_limits(work.get_submodule(linear).weight, moments_GKK, options.symmetric)  # type: ignore[arg-type]
                clips.append(Clip(f"{name}.{linear}", limit.float()))
    return SearchedBlock(Search(tuple(scales), tuple(clips)), output)


def pass_block(block: nn.Module, states_NSD: Tensor, arguments: Arguments, options: SearchOptions) -> Tensor:
    """The output of a block that was searched before, the same to the last bit."""
    return run_block(working_copy(block, states_NSD), (), states_NSD, arguments, _rows_at_once(states_NSD, options))[0]


def working_copy(block: nn.Module, like: Tensor) -> nn.Module:
    """The block in another number type and place; the copy shares no memory with the model."""
    with torch.no_grad():
        work = copy.deepcopy(block).to(device=like.device, dtype=like.dtype).eval()
    for parameter in work.parameters():
        parameter.requires_grad_(False)
    return work


@torch.no_grad()
def run_block(
    work: nn.Module, groups: Sequence[ScaleGroup], states_NSD: Tensor, arguments: Arguments, rows: int
) -> tuple[Tensor, dict[str, Tensor], dict[str, Call]]:
    """The block on all rows, some at a time: its output, the input [N, S, I] of each group's first Linear by name, and
    how inspected modules were called. Without groups only the output is kept."""
    watched = {group.linears[0]: work.get_submodule(group.linears[0]) for group in groups}
    inspected = {group.inspect: work.get_submodule(group.inspect) for group in groups if group.inspect}
    output = torch.empty_like(states_NSD)
    inputs: dict[str, Tensor] = {}
    start = 0
    with recorded({**watched, **inspected}) as calls:
        for some in states_NSD.split(rows):
            here = slice(start, start := start + len(some))
            output[here] = Call(work, (some,), arguments).rerun(some)
            for name in watched:
                piece = calls[name].args[0]
                if name not in inputs:
                    inputs[name] = piece.new_empty((len(states_NSD), *piece.shape[1:]))
                inputs[name][here] = piece
    return output, inputs, {name: calls[name] for name in inspected}


def _rows_at_once(states_NSD: Tensor, options: SearchOptions) -> int:
    return max(1, options.batch_tokens // states_NSD.shape[1])


def _search_group(
    work: nn.Module,
    group: ScaleGroup,
    inputs_NSI: Tensor,
    weights_NS: Tensor | None,
    calls: dict[str, Call],
    options: SearchOptions,
    rows: int,
) -> Chosen:
    linears: list[Any] = [work.get_submodule(name) for name in group.linears]
    relative_I = None
    if options.scaling != "activation":
        relative_I = weight_magnitude([linear.weight for linear in linears], options.group_size)
    tried = candidates(mean_magnitude(inputs_NSI, weights_NS), relative_I, options.scaling)
    rounding = (options.group_size, options.symmetric)
    if group.inspect:
        loss = module_loss(linears, calls[group.inspect].rerun, inputs_NSI, weights_NS, *rounding, rows)
    else:
        loss = alone_loss(linears[0], inputs_NSI, weights_NS, *rounding)
    return search_scale(tried, loss)


def _sample(inputs_NSI: Tensor, weights_NS: Tensor | None) -> tuple[Tensor, Tensor | None]:
    inputs_TI, weights_T = sample_tokens(
        inputs_NSI.flatten(0, 1), None if weights_NS is None else weights_NS.flatten().to(inputs_NSI.device)
    )
    return inputs_TI.clone(), weights_T


def _facts(choice: Chosen) -> dict[str, Any]:
    return {"ratio": choice.best.ratio, "duo": choice.best.duo, "losses": list(choice.losses)}
