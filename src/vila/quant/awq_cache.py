"""Search files of the original release of AWQ (`awq_cache/*.pt`), read without torch.load, and written."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
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
from vila.model.pytorch_bin import StoredTensor, read_torch_file

# --- result
# Result of an AWQ search, in memory and in a file: scales that are folded, and limits that weights are clamped to.


# O output channels  I input channels  G groups of a row

_HEADER = "vila_search"
_SCALE, _CLIP = "scale/", "clip/"


@dataclass(frozen=True, slots=True)
class ChannelScale:
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
class WeightClip:
    """The greatest magnitude of each group of a Linear's weights, after its scale is folded."""

    linear: str
    limit_OG: Tensor


@dataclass(frozen=True, slots=True)
class AwqSearch:
    """All of a model, in the order in which it is applied. `facts` say how it was made; empty where nobody knows."""

    scales: tuple[ChannelScale, ...]
    clips: tuple[WeightClip, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


def join_searches(parts: Iterable[AwqSearch], facts: Mapping[str, Any]) -> AwqSearch:
    """The searches of single blocks as that of a model."""
    found = list(parts)
    scales = tuple(scale for part in found for scale in part.scales)
    return AwqSearch(scales, tuple(clip for part in found for clip in part.clips), facts)


def save_search(search: AwqSearch, path: Path) -> None:
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


def make_scale(
    fold: str, linears: Iterable[str], scale_I: Tensor, facts: Mapping[str, Any] | None = None
) -> ChannelScale:
    """Return the scale of a file. Raises ValueError unless it is a finite floating-point tensor [I]."""
    names = tuple(linears)
    if not names or not all(isinstance(name, str) for name in (fold, *names)) or not isinstance(facts or {}, dict):
        raise ValueError("a scale belongs to names")
    _check_values(scale_I, 1)
    return ChannelScale(fold, names, scale_I, facts or {})


def make_clip(linear: str, limit_OG: Tensor) -> WeightClip:
    """Return the limits of a file. Raises ValueError unless they are a finite floating-point tensor [O, G]."""
    if not isinstance(linear, str):
        raise ValueError("limits belong to a name")
    _check_values(limit_OG, 2)
    return WeightClip(linear, limit_OG)


def _check_values(values: Tensor, num_dims: int) -> None:
    if not values.is_floating_point() or values.dim() != num_dims or not values.numel():
        raise ValueError(
            f"expected a floating-point tensor of {num_dims} dimensions, got {values.dtype} {list(values.shape)}"
        )
    if not torch.isfinite(values).all():
        raise ValueError("its values are not finite")


def load_search(path: Path) -> AwqSearch:
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
        return AwqSearch(scales, clips, dict(read["facts"]))
    except (LookupError, TypeError, ValueError) as error:
        raise LayoutError(
            f"its header does not fit its tensors ({error})", file=path, hint="make the search again"
        ) from error


# Files of LLaVA-like models name the LLM's place: `language_model.model.layers.0`, `llm.model.layers.0`.
_PREFIX = re.compile(r"^.*?(?=layers\.\d+\.)")


def read_search(path: Path) -> AwqSearch:
    """Read a search of ours, or one of the original by the ending `.pt`. Raises LayoutError for other files."""
    if not path.is_file():
        raise LayoutError("no such file", file=path, hint="give a search.safetensors or an awq_cache .pt")
    return read_awq_cache(path) if path.suffix == ".pt" else load_search(path)


def read_awq_cache(path: Path) -> AwqSearch:
    """Read the scales and limits of such a file, by the names that our searches use.

    It holds `{"scale": [(norm or Linear, (Linear, ...), scale [I]), ...], "clip": [(Linear, limit [O, G, 1]), ...]}`.
    Raises LayoutError with the file's name when it is cut short or compressed, holds anything but that, a value that
    is not finite, or asks for more memory than the file is large.
    """
    content = read_torch_file(path)
    held = content.value
    if not isinstance(held, dict) or not all(isinstance(held.get(key), list) for key in ("scale", "clip")):
        raise LayoutError(
            "no AWQ search", file=path, expected="the lists 'scale' and 'clip'", hint="give an awq_cache file"
        )
    mapped = content.map()
    budget = path.stat().st_size
    found: dict[str, list[Any]] = {"scale": [], "clip": []}
    makers: dict[str, Callable[..., Any]] = {"scale": _scale, "clip": _clip}
    for key, make in makers.items():
        for number, entry in enumerate(held[key]):
            last = entry[-1] if isinstance(entry, (list, tuple)) and entry else None
            budget -= last.bytes if isinstance(last, StoredTensor) else 0
            try:
                if not isinstance(last, StoredTensor):
                    raise ValueError("does not end in a tensor")
                if budget < 0:
                    raise ValueError("shares its values with others, more than the file is large")
                found[key].append(make(*entry[:-1], last.read(mapped)))
            except (TypeError, ValueError) as error:
                raise LayoutError(
                    f"not as the original writes its searches ({error})", file=path, field=f"{key}[{number}]"
                ) from error
    scales, clips = tuple(found["scale"]), tuple(found["clip"])
    if not scales and not clips:
        raise LayoutError("holds neither scales nor limits", file=path)
    return AwqSearch(scales, clips, _facts(path, clips, scales))


def write_awq_cache(search: AwqSearch, path: Path) -> None:
    """Write the file that the original's `--load_awq` reads: atomically, and the same bytes for the same search.

    Values become float16, the type of the original's models: wider limits would make its clamped weights wider too.
    Raises LayoutError, before anything is written, for a value that float16 cannot hold.
    """
    held = {
        "scale": [(one.fold, tuple(one.linears), _half(one.scale_I, one.fold)) for one in search.scales],
        "clip": [(one.linear, _half(one.limit_OG, one.linear).unsqueeze(-1)) for one in search.clips],
    }
    # Saved to a path, the bytes would depend on its name.
    made = io.BytesIO()
    torch.save(held, made)
    with atomic_path(path) as part:
        part.write_bytes(made.getbuffer())


def _half(values: Tensor, name: str) -> Tensor:
    half = values.detach().cpu().to(torch.float16)
    if not torch.isfinite(half).all():
        raise LayoutError(f"{name}: a scale or limit does not fit float16, which awq_cache files hold")
    return half.contiguous()


def _scale(fold: Any, linears: Any, scale_I: Tensor) -> ChannelScale:
    if not isinstance(linears, (list, tuple)) or not linears:
        raise ValueError("its Linears are no list of names")
    return make_scale(_name(fold), [_name(one) for one in linears], _wide(scale_I))


def _clip(linear: Any, limit_OG1: Tensor) -> WeightClip:
    if limit_OG1.dim() != 3 or limit_OG1.shape[-1] != 1:
        raise ValueError(f"its limits have shape {list(limit_OG1.shape)}")
    return make_clip(_name(linear), _wide(limit_OG1.squeeze(-1)))


def _wide(values: Tensor) -> Tensor:
    # A tensor of another type stays as it is, and is refused for its type.
    return values.float() if values.is_floating_point() else values


def _name(name: Any) -> str:
    if not isinstance(name, str) or not _PREFIX.match(name):
        raise ValueError(
            f"{name[:80]!r} is no name" if isinstance(name, str) else f"a {type(name).__name__} is no name"
        )
    return _PREFIX.sub("model.", name)


def _facts(path: Path, clips: tuple[WeightClip, ...], scales: tuple[ChannelScale, ...]) -> dict[str, Any]:
    """Source and, where the scales say how wide a limited Linear is, the group size."""
    width = {name: scale.scale_I.numel() for scale in scales for name in scale.linears}
    sizes = {width[clip.linear] // clip.limit_OG.shape[1] for clip in clips if clip.linear in width}
    known = {"group_size": sizes.pop()} if len(sizes) == 1 else {}
    return {"source": path.name, **known}
