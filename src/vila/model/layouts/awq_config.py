"""What a checkpoint says of its 4-bit weights: `quantization_config` in config.json, or AutoAWQ's quant_config.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila.core.errors import LayoutError
from vila.core.fields import Fields
from vila.model.layouts.config_file import read_config

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
    """Read what a directory says. Raises LayoutError with file, field and value for all but 4-bit AWQ with zeros."""
    facts = _find(folder)
    if facts is None:
        raise LayoutError("nothing says how its weights are quantized", file=folder)
    if facts.get("quant_method", "awq") != "awq":
        raise facts.refusal("quant_method", expected="awq", hint=_REMEDY)
    bits, size, version = (_first(facts, keys) for keys in (_BITS, _GROUP, _VERSION))
    if _is_other(facts.get(bits), 4):
        raise facts.refusal(bits, expected="4", hint=_REMEDY)
    if facts.get("zero_point", True) is not True:
        hint = f"weights are read with zeros alone, which may all be 8: correct it if there are .qzeros, else {_REMEDY}"
        raise facts.refusal("zero_point", expected="true", hint=hint)
    packing = facts.text(version, "gemm").lower()
    if packing not in _PACKINGS:
        raise facts.refusal(version, expected=", ".join(_PACKINGS), hint=_REMEDY)
    group = 128 if facts.get(size) is None else facts[size]
    if not isinstance(group, int) or isinstance(group, bool) or group < 2:
        raise facts.refusal(size, expected="32, 64 or 128", hint=_REMEDY)
    return AwqFacts(_PACKINGS[packing], group, facts.file)


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


def _find(folder: Path) -> Fields | None:
    for where in (folder, folder / "llm"):
        config = read_config(where)
        for part in (config, config.section("text_config")):
            if part.get(_KEY) is not None and (facts := part.section(_KEY)):
                return facts
        for name in _BESIDE:
            if (where / name).is_file():
                return Fields.of_file(where / name, LayoutError)
    return None


def _is_other(value: object, number: int) -> bool:
    return isinstance(value, bool) or value != number


def _first(facts: Fields, keys: Sequence[str]) -> str:
    """Return the first of several names of a key that has a value; the first name if none has."""
    return next((key for key in keys if facts.get(key) is not None), keys[0])
