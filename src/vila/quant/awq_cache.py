"""Result of an AWQ search, and its files: our safetensors, and `awq_cache/*.pt` of the AWQ release (no torch.load)."""

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

# O output channels  I input channels  G groups per output channel

_HEADER = "vila_search"
_SCALE, _CLIP = "scale/", "clip/"


@dataclass(frozen=True, slots=True)
class ChannelScale:
    """Scale of each input channel of Linears that share their input.

    fold:     the norm or Linear whose output channels are divided by the scale.
    linears:  the Linears whose input channels are multiplied by it.
    metadata: losses of all candidates, and the chosen ratio.
    Names are those of the LLM, as in the AWQ release: `model.layers.0.input_layernorm`.
    """

    fold: str
    linears: tuple[str, ...]
    scale_I: Tensor
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WeightClip:
    """Clip limit (largest magnitude) of each weight group of a Linear, after its scale is folded."""

    linear: str
    limit_OG: Tensor


@dataclass(frozen=True, slots=True)
class AwqSearch:
    """AWQ search of a model, in the order of application. settings: how it was made; empty if not known."""

    scales: tuple[ChannelScale, ...]
    clips: tuple[WeightClip, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def join_searches(parts: Iterable[AwqSearch], settings: Mapping[str, Any]) -> AwqSearch:
    """Join the searches of single blocks."""
    found = list(parts)
    scales = tuple(scale for part in found for scale in part.scales)
    return AwqSearch(scales, tuple(clip for part in found for clip in part.clips), settings)


def save_search(search: AwqSearch, path: Path) -> None:
    """Write a safetensors file atomically. The same search gives the same bytes."""
    tensors = {_SCALE + scale.fold: scale.scale_I.detach().cpu().contiguous() for scale in search.scales}
    tensors |= {_CLIP + clip.linear: clip.limit_OG.detach().cpu().contiguous() for clip in search.clips}
    header = {
        "facts": dict(search.settings),
        "scales": [{"fold": s.fold, "linears": s.linears, "facts": dict(s.metadata)} for s in search.scales],
        "clips": [clip.linear for clip in search.clips],
    }
    # A single entry: the order of several metadata entries differs from run to run.
    with atomic_path(path) as part:
        save_file(tensors, part, metadata={_HEADER: json.dumps(header, sort_keys=True)})


def make_scale(
    fold: str, linears: Iterable[str], scale_I: Tensor, metadata: Mapping[str, Any] | None = None
) -> ChannelScale:
    """Return a scale that was read from a file. Raises ValueError unless it is a finite floating-point tensor [I]."""
    names = tuple(linears)
    if not names or not all(isinstance(name, str) for name in (fold, *names)) or not isinstance(metadata or {}, dict):
        raise ValueError("a scale needs the names of its modules")
    _check_values(scale_I, 1)
    return ChannelScale(fold, names, scale_I, metadata or {})


def make_clip(linear: str, limit_OG: Tensor) -> WeightClip:
    """Return limits that were read from a file. Raises ValueError unless they are a finite float tensor [O, G]."""
    if not isinstance(linear, str):
        raise ValueError("limits need the name of their Linear")
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
    """Read a file written by `save_search`. Raises LayoutError naming any other file."""
    with file_errors(path, LayoutError, hint="run the search again"), safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get(_HEADER)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if header is None:
        raise LayoutError("not an AWQ search", file=path, hint="give a file written by the AWQ search")
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
            f"its header does not fit its tensors ({error})", file=path, hint="run the search again"
        ) from error


# Files of LLaVA-like models have a prefix for the LLM: `language_model.model.layers.0`, `llm.model.layers.0`.
_PREFIX = re.compile(r"^.*?(?=layers\.\d+\.)")


def read_search(path: Path) -> AwqSearch:
    """Read our search file, or one of the AWQ release if it ends in `.pt`. Raises LayoutError for other files."""
    if not path.is_file():
        raise LayoutError("no such file", file=path, hint="give a search.safetensors or an awq_cache .pt")
    return read_awq_cache(path) if path.suffix == ".pt" else load_search(path)


def read_awq_cache(path: Path) -> AwqSearch:
    """Read an `awq_cache` file of the AWQ release; names are mapped to ours.

    Content: `{"scale": [(norm or Linear, (Linear, ...), scale [I]), ...], "clip": [(Linear, limit [O, G, 1]), ...]}`.
    Raises LayoutError naming the file if it is truncated or compressed, has other content or values that are not
    finite, or requires more memory than its size.
    """
    content = read_torch_file(path)
    root = content.value
    if not isinstance(root, dict) or not all(isinstance(root.get(key), list) for key in ("scale", "clip")):
        raise LayoutError(
            "not an AWQ search", file=path, expected="the lists 'scale' and 'clip'", hint="give an awq_cache file"
        )
    mapped = content.map()
    budget = path.stat().st_size
    found: dict[str, list[Any]] = {"scale": [], "clip": []}
    makers: dict[str, Callable[..., Any]] = {"scale": _scale, "clip": _clip}
    for key, make in makers.items():
        for number, entry in enumerate(root[key]):
            last = entry[-1] if isinstance(entry, (list, tuple)) and entry else None
            budget -= last.bytes if isinstance(last, StoredTensor) else 0
            try:
                if not isinstance(last, StoredTensor):
                    raise ValueError("does not end in a tensor")
                if budget < 0:
                    raise ValueError("its tensors overlap: together they exceed the size of the file")
                found[key].append(make(*entry[:-1], last.read(mapped)))
            except (TypeError, ValueError) as error:
                raise LayoutError(
                    f"not an entry as the AWQ release writes it ({error})", file=path, field=f"{key}[{number}]"
                ) from error
    scales, clips = tuple(found["scale"]), tuple(found["clip"])
    if not scales and not clips:
        raise LayoutError("has neither scales nor limits", file=path)
    return AwqSearch(scales, clips, _settings(path, clips, scales))


def write_awq_cache(search: AwqSearch, path: Path) -> None:
    """Write the file that `--load_awq` of the AWQ release reads, atomically. The same search gives the same bytes.

    Values become float16, the dtype of that release's models; float32 limits would upcast its clipped weights.
    Raises LayoutError, before anything is written, for values outside the range of float16.
    """
    content = {
        "scale": [(one.fold, tuple(one.linears), _half(one.scale_I, one.fold)) for one in search.scales],
        "clip": [(one.linear, _half(one.limit_OG, one.linear).unsqueeze(-1)) for one in search.clips],
    }
    # torch.save to a path would store the file's name.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as part:
        part.write_bytes(buffer.getbuffer())


def _half(values: Tensor, name: str) -> Tensor:
    half = values.detach().cpu().to(torch.float16)
    if not torch.isfinite(half).all():
        raise LayoutError("a scale or limit is outside the range of float16, the dtype of awq_cache files", field=name)
    return half.contiguous()


def _scale(fold: Any, linears: Any, scale_I: Tensor) -> ChannelScale:
    if not isinstance(linears, (list, tuple)) or not linears:
        raise ValueError("its Linears are not a list of names")
    return make_scale(_name(fold), [_name(one) for one in linears], _wide(scale_I))


def _clip(linear: Any, limit_OG1: Tensor) -> WeightClip:
    if limit_OG1.dim() != 3 or limit_OG1.shape[-1] != 1:
        raise ValueError(f"its limits have shape {list(limit_OG1.shape)}")
    return make_clip(_name(linear), _wide(limit_OG1.squeeze(-1)))


def _wide(values: Tensor) -> Tensor:
    # Integer tensors are rejected later, with their dtype.
    return values.float() if values.is_floating_point() else values


def _name(name: Any) -> str:
    if not isinstance(name, str) or not _PREFIX.match(name):
        shown = repr(name[:80]) if isinstance(name, str) else type(name).__name__
        raise ValueError(f"{shown} is not a module name")
    return _PREFIX.sub("model.", name)


def _settings(path: Path, clips: tuple[WeightClip, ...], scales: tuple[ChannelScale, ...]) -> dict[str, Any]:
    """Return the source and, if the scales tell the width of a clipped Linear, the group size."""
    width = {name: scale.scale_I.numel() for scale in scales for name in scale.linears}
    sizes = {width[clip.linear] // clip.limit_OG.shape[1] for clip in clips if clip.linear in width}
    known = {"group_size": sizes.pop()} if len(sizes) == 1 else {}
    return {"source": path.name, **known}
