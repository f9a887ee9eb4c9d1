"""Search files of the original release of AWQ (`awq_cache/*.pt`), read without torch.load, and written."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.core.files import atomic_path
from vila.model.torch_file import StoredTensor, read_torch_file
from vila.quant.result import Clip, Scale, Search, load_search, make_clip, make_scale

# Files of LLaVA-like models name the LLM's place: `language_model.model.layers.0`, `llm.model.layers.0`.
_PREFIX = re.compile(r"^.*?(?=layers\.\d+\.)")


def read_search(path: Path) -> Search:
    """Read a search of ours, or one of the original by the ending `.pt`. Raises LayoutError for other files."""
    if not path.is_file():
        raise LayoutError("no such file", file=path, hint="give a search.safetensors or an awq_cache .pt")
    return read_awq_cache(path) if path.suffix == ".pt" else load_search(path)


def read_awq_cache(path: Path) -> Search:
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
    return Search(scales, clips, _facts(path, clips, scales))


def write_awq_cache(search: Search, path: Path) -> None:
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


def _scale(fold: Any, linears: Any, scale_I: Tensor) -> Scale:
    if not isinstance(linears, (list, tuple)) or not linears:
        raise ValueError("its Linears are no list of names")
    return make_scale(_name(fold), [_name(one) for one in linears], _wide(scale_I))


def _clip(linear: Any, limit_OG1: Tensor) -> Clip:
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


def _facts(path: Path, clips: tuple[Clip, ...], scales: tuple[Scale, ...]) -> dict[str, Any]:
    """Source and, where the scales say how wide a limited Linear is, the group size."""
    width = {name: scale.scale_I.numel() for scale in scales for name in scale.linears}
    sizes = {width[clip.linear] // clip.limit_OG.shape[1] for clip in clips if clip.linear in width}
    known = {"group_size": sizes.pop()} if len(sizes) == 1 else {}
    return {"source": path.name, **known}
