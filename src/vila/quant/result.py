"""Result of an AWQ search, in memory and in a file: scales that are folded, and limits that weights are clamped to.

The file is one .safetensors: a tensor for every scale and limit, and the facts of the run as JSON in its header.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vila.core.errors import LayoutError
from vila.core.files import atomic_path
from vila.core.reading import file_errors, parse_json

# O output channels  I input channels  G groups of a row

_HEADER = "vila_search"
_SCALE, _CLIP = "scale/", "clip/"


@dataclass(frozen=True, slots=True)
class Scale:
    """The factor of each input channel of Linears that share their input.

    fold:    the norm or Linear whose output channels are divided by it.
    linears: the Linears whose columns are multiplied by it.
    facts:   how it was chosen: the candidates' losses, the chosen one.
    Names are those of the LLM, as the original writes them: `model.layers.0.input_layernorm`.
    """

    fold: str
    linears: tuple[str, ...]
    scale_I: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Clip:
    """The greatest magnitude of each group of a Linear's weights, after its scale is folded."""

    linear: str
    limit_OG: Tensor


@dataclass(frozen=True, slots=True)
class Search:
    """All of a model, in the order in which it is applied. `facts` say how it was made; empty where nobody knows."""

    scales: tuple[Scale, ...]
    clips: tuple[Clip, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


def join_searches(parts: Iterable[Search], facts: Mapping[str, Any]) -> Search:
    """The searches of single blocks as that of a model."""
    found = list(parts)
    scales = tuple(scale for part in found for scale in part.scales)
    return Search(scales, tuple(clip for part in found for clip in part.clips), facts)


def save_search(search: Search, path: Path) -> None:
    """Write the file atomically; the same search gives the same bytes."""
    tensors = {_SCALE + scale.fold: scale.scale_I.detach().cpu().contiguous() for scale in search.scales}
    tensors |= {_CLIP + clip.linear: clip.limit_OG.detach().cpu().contiguous() for clip in search.clips}
    header = {
        "facts": dict(search.facts),
        "scales": [{"fold": s.fold, "linears": s.linears, "facts": dict(s.facts)} for s in search.scales],
        "clips": [clip.linear for clip in search.clips],
    }
    # One entry only: the order of several in a header differs from run to run.
    with atomic_path(path) as part:
        save_file(tensors, part, metadata={_HEADER: json.dumps(header, sort_keys=True)})


def make_scale(fold: str, linears: Iterable[str], scale_I: Tensor, facts: Mapping[str, Any] | None = None) -> Scale:
    """Return the scale of a file. Raises ValueError unless it is a finite floating-point tensor [I]."""
    names = tuple(linears)
    if not names or not all(isinstance(name, str) for name in (fold, *names)) or not isinstance(facts or {}, dict):
        raise ValueError("a scale belongs to names")
    _check_values(scale_I, 1)
    return Scale(fold, names, scale_I, facts or {})


def make_clip(linear: str, limit_OG: Tensor) -> Clip:
    """Return the limits of a file. Raises ValueError unless they are a finite floating-point tensor [O, G]."""
    if not isinstance(linear, str):
        raise ValueError("limits belong to a name")
    _check_values(limit_OG, 2)
    return Clip(linear, limit_OG)


def _check_values(values: Tensor, num_dims: int) -> None:
    if not values.is_floating_point() or values.dim() != num_dims or not values.numel():
        raise ValueError(
            f"expected a floating-point tensor of {num_dims} dimensions, got {values.dtype} {list(values.shape)}"
        )
    if not torch.isfinite(values).all():
        raise ValueError("its values are not finite")


def load_search(path: Path) -> Search:
    """Read a file that `save_search` wrote. Raises LayoutError with the file's name for any other file."""
    with file_errors(path, LayoutError, hint="make the search again"), safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get(_HEADER)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if header is None:
        raise LayoutError("holds tensors, but no search for scales", file=path, hint="give a file that a search wrote")
    read = parse_json(header, file=path, error=LayoutError)
    try:
        scales = tuple(
            make_scale(one["fold"], one["linears"], tensors[_SCALE + one["fold"]], one["facts"])
            for one in read["scales"]
        )
        clips = tuple(make_clip(name, tensors[_CLIP + name]) for name in read["clips"])
        return Search(scales, clips, dict(read["facts"]))
    except (LookupError, TypeError, ValueError) as error:
        raise LayoutError(
            f"its header does not fit its tensors ({error})", file=path, hint="make the search again"
        ) from error
