"""The search files of the original release of AWQ (`awq_cache/*.pt`): read without running what is in them, written."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.core.files import atomic_path
from vila.quant.result import Clip, Scale, Search, load_search

# Files of LLaVA-like models name the LLM's place: `language_model.model.layers.0`, `llm.model.layers.0`.
_PREFIX = re.compile(r"^.*?(?=layers\.\d+\.)")


def read_search(path: Path) -> Search:
    """A search of ours, or of the original by the ending `.pt`. Raises LayoutError for what is neither."""
    if not path.is_file():
        raise LayoutError(f"{path}: no such file; give a search.safetensors or an awq_cache .pt")
    return read_awq_cache(path) if path.suffix == ".pt" else load_search(path)


def read_awq_cache(path: Path) -> Search:
    """The scales and limits of such a file, by the names that our searches use.

    It holds `{"scale": [(norm or Linear, (Linear, ...), scale [I]), ...], "clip": [(Linear, limit [O, G, 1]), ...]}`.
    Raises LayoutError naming the file when it is cut short, holds anything but that, or a value that is not finite.
    """
    held = _load(path)
    if not isinstance(held, dict) or not {"scale", "clip"} <= held.keys():
        raise LayoutError(f"{path}: no AWQ search (expected the keys 'scale' and 'clip'); give an awq_cache file")
    try:
        scales = tuple(_scale(*entry) for entry in held["scale"])
        clips = tuple(_clip(*entry) for entry in held["clip"])
    except (TypeError, ValueError) as error:
        raise LayoutError(f"{path}: not as the original writes its searches ({error})") from error
    if not scales and not clips:
        raise LayoutError(f"{path}: holds neither scales nor limits")
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


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LayoutError(
            f"{path}: holds more than tensors and plain values and is not opened, because unpickling runs code "
            f"({str(error).splitlines()[0][:200]})"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LayoutError(f"{path}: cannot be read ({reason}); it may be cut short, copy it again") from error


def _scale(fold: Any, linears: Any, scale_I: Any) -> Scale:
    if isinstance(linears, str) or not linears:
        raise ValueError(f"the Linears of {fold!r} are {linears!r}")
    return Scale(_name(fold), tuple(_name(one) for one in linears), _values(scale_I, fold, 1))


def _clip(linear: Any, limit_OG1: Any) -> Clip:
    limit = _values(limit_OG1, linear, 3)
    if limit.shape[-1] != 1:
        raise ValueError(f"the limits of {linear!r} have shape {tuple(limit.shape)}")
    return Clip(_name(linear), limit.squeeze(-1))


def _name(name: Any) -> str:
    if not isinstance(name, str) or not _PREFIX.match(name):
        raise ValueError(f"{name!r} names nothing in a decoder block")
    return _PREFIX.sub("model.", name)


def _values(value: Any, name: Any, dims: int) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != dims or not value.is_floating_point():
        raise ValueError(f"the values of {name!r} are no floating-point tensor of {dims} dimensions")
    if not torch.isfinite(value).all():
        raise ValueError(f"the values of {name!r} are not finite")
    return value.float()


def _facts(path: Path, clips: tuple[Clip, ...], scales: tuple[Scale, ...]) -> dict[str, Any]:
    """The group size where it can be told: a limited Linear's inputs, known from its scale, over its groups."""
    width = {name: scale.scale_I.numel() for scale in scales for name in scale.linears}
    sizes = {width[clip.linear] // clip.limit_OG.shape[1] for clip in clips if clip.linear in width}
    known = {"group_size": sizes.pop()} if len(sizes) == 1 else {}
    return {"source": path.name, **known}
