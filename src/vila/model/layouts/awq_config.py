"""What a checkpoint says of its 4-bit weights: `quantization_config` in config.json, or AutoAWQ's quant_config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.errors import LayoutError
from vila.core.reading import read_json
from vila.model.layouts.published import read_config

_KEY = "quantization_config"
_BESIDE = ("quant_config.json", "quantize_config.json")
# AutoAWQ's own names and those that transformers has made of them.
_BITS, _GROUP, _VERSION = ("bits", "w_bit"), ("group_size", "q_group_size"), ("version", "format")
_PACKINGS = {"gemm": "gemm", "gemv": "gemv", "gemv_fast": "tinychat", "llm-awq": "tinychat"}
_REMEDY = "quantize the 16-bit model with vila quantize"


@dataclass(frozen=True)
class AwqFacts:
    """Packing and group size of a checkpoint, and the file that says so."""

    packing: str
    group_size: int
    source: Path

    def describe(self) -> str:
        """For messages."""
        return f"{self.source} says {self.packing} with groups of {self.group_size}"


def says_quantized(folder: Path) -> bool:
    """Whether a directory says of itself that its weights, or those in its `llm/`, are quantized in some way."""
    return _find(folder) is not None


def read_awq(folder: Path) -> AwqFacts:
    """What a directory says. Raises LayoutError naming file, key and value for all but AWQ in 4 bits with zeros."""
    found = _find(folder)
    if found is None:
        raise LayoutError(f"{folder}: nothing says how its weights are quantized")
    source, facts = found
    method = facts.get("quant_method", "awq")
    if method != "awq":
        raise LayoutError(f"{source}: quant_method is {method!r}; read here is 'awq' alone: {_REMEDY}")
    bits = _first(facts, _BITS)
    if bits != 4:
        raise LayoutError(f"{source}: bits is {bits!r}; weights are read in 4 bits alone: {_REMEDY}")
    if facts.get("zero_point", True) is not True:
        raise LayoutError(
            f"{source}: zero_point is {facts['zero_point']!r}; weights are read with zeros alone, which may all be 8: "
            f"correct it if there are .qzeros, else {_REMEDY}"
        )
    version = str(_first(facts, _VERSION, "gemm")).lower()
    if version not in _PACKINGS:
        raise LayoutError(f"{source}: version is {version!r}, none of {', '.join(_PACKINGS)}: {_REMEDY}")
    size = _first(facts, _GROUP, 128)
    if not isinstance(size, int) or isinstance(size, bool) or size < 2:
        raise LayoutError(f"{source}: group_size is {size!r}; groups are of 32, 64 or 128 inputs: {_REMEDY}")
    return AwqFacts(_PACKINGS[version], size, source)


def awq_config(group_size: int, skipped: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of gemm weights; `skipped` are patterns of the modules that stay as they are."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(skipped),
    }


def _find(folder: Path) -> tuple[Path, Mapping[str, Any]] | None:
    for where in (folder, folder / "llm"):
        config = read_config(where)
        for facts in (config.get(_KEY), (config.get("text_config") or {}).get(_KEY)):
            if facts:
                return where / "config.json", _as_object(where / "config.json", facts)
        for name in _BESIDE:
            if (where / name).is_file():
                return where / name, _as_object(where / name, read_json(where / name))
    return None


def _as_object(source: Path, facts: Any) -> Mapping[str, Any]:
    if not isinstance(facts, dict):
        raise LayoutError(f"{source}: {_KEY} is a {type(facts).__name__}, not an object: {_REMEDY}")
    return facts


def _first(facts: Mapping[str, Any], keys: Sequence[str], default: Any = None) -> Any:
    return next((facts[key] for key in keys if facts.get(key) is not None), default)
