"""What a search found, in memory and in a file: scales that are folded, and limits that weights are clamped to.

The file is one .safetensors: a tensor for every scale and limit, and the facts of the run as JSON in its header.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vila.core.errors import LayoutError
from vila.core.files import atomic_path

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


def load_search(path: Path) -> Search:
    """Read a file that `save_search` wrote. Raises LayoutError naming the file when it is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise LayoutError(f"{path}: cannot be read as safetensors ({error}); make the search again") from error
    if header is None:
        raise LayoutError(f"{path}: holds tensors, but no search for scales; give a file that a search wrote")
    try:
        read = json.loads(header)
        scales = tuple(
            Scale(one["fold"], tuple(one["linears"]), tensors[_SCALE + one["fold"]], one["facts"])
            for one in read["scales"]
        )
        clips = tuple(Clip(name, tensors[_CLIP + name]) for name in read["clips"])
        return Search(scales, clips, read["facts"])
    except (LookupError, TypeError, ValueError) as error:
        raise LayoutError(f"{path}: its header does not fit its tensors ({error!r}); make the search again") from error
