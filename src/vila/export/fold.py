"""A search's scales and limits as changes of single weights, row by row: the model is never in memory as a whole.

The arithmetic is that of `vila.quant.apply.apply_search`, rounding after each step as it does, so results are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.quant.result import Search

# O output channels  I input channels  G groups of a row


@dataclass(frozen=True)
class Fold:
    """One change of one weight.

    inputs:  columns are multiplied by `values` [I].
    outputs: the last rows are divided by `values` [n], n of them.
    limit:   groups of a row are clamped to plus and minus `values` [O, G].
    """

    kind: Literal["inputs", "outputs", "limit"]
    values: Tensor

    def __call__(self, part: Tensor, start: int, total: int) -> Tensor:
        """The changed rows, as a new tensor of the same type. `part` begins at row `start` of `total`."""
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        if self.kind == "inputs":
            return (wide * self.values.to(torch.promote_types(self.values.dtype, torch.float32))).to(part.dtype)
        if self.kind == "outputs":
            return self._divided(wide, start, total).to(part.dtype)
        limit = self.values[start : start + len(part)].to(part)[..., None]
        groups = part.unflatten(-1, (self.values.shape[1], -1))
        return torch.maximum(torch.minimum(groups, limit), -limit).flatten(-2)

    def _divided(self, wide: Tensor, start: int, total: int) -> Tensor:
        first = total - self.values.numel()
        out = wide.clone()
        kept = max(0, first - start)
        if kept < len(out):
            divisor = self.values[start + kept - first : start + len(out) - first]
            out[kept:] /= divisor.to(torch.promote_types(divisor.dtype, torch.float32)).view(-1, *[1] * (out.dim() - 1))
        return out


def folds_of(search: Search, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Fold]]:
    """The changes of every weight of an LLM, in the order in which they are made.

    shapes: of the LLM's weights, by the names that a search uses: `model.layers.0.input_layernorm.weight`.
    Raises LayoutError naming what does not fit the model.
    """
    problems = list(_problems(search, shapes))
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise LayoutError(f"the search does not fit this model: {'; '.join(problems[:5])}{more}; make it again for it")
    out: dict[str, list[Fold]] = {}
    for scale in search.scales:
        for leaf in ("weight", "bias"):
            if f"{scale.fold}.{leaf}" in shapes:
                out.setdefault(f"{scale.fold}.{leaf}", []).append(Fold("outputs", scale.scale_I))
        for name in scale.linears:
            out.setdefault(f"{name}.weight", []).append(Fold("inputs", scale.scale_I))
    for clip in search.clips:
        out.setdefault(f"{clip.linear}.weight", []).append(Fold("limit", clip.limit_OG))
    return out


def _problems(search: Search, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for scale in search.scales:
        width = scale.scale_I.numel()
        fold = shapes.get(f"{scale.fold}.weight")
        if fold is None:
            yield f"{scale.fold} is no norm or Linear of it"
        elif fold[0] < width:
            yield f"{scale.fold} has {fold[0]} outputs, fewer than the scale's {width} channels"
        for name in scale.linears:
            shape = shapes.get(f"{name}.weight", ())
            if len(shape) != 2 or shape[1] != width:
                yield f"{name} is {'x'.join(map(str, shape)) or 'missing'}, its scale has {width} channels"
        if not (torch.isfinite(scale.scale_I).all() and (scale.scale_I > 0).all()):
            yield f"the scale of {scale.fold} is not finite and positive"
    for clip in search.clips:
        shape = shapes.get(f"{clip.linear}.weight", ())
        outputs, groups = clip.limit_OG.shape[:2]
        if len(shape) != 2 or shape[0] != outputs or shape[1] % max(1, groups):
            yield f"{clip.linear} is {'x'.join(map(str, shape)) or 'missing'}, its limits are {outputs}x{groups}"
        elif not (clip.limit_OG >= 0).all():
            yield f"the limits of {clip.linear} are not all 0 and more"
