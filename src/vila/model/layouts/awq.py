"""Models in 4 bits as AutoAWQ stores them, which vLLM, SGLang and transformers with gptqmodel read.

A directory of another layout whose decoder blocks hold `qweight`, `qzeros` and `scales` in the place of `weight`, and
whose config says so. It is written with the names of `llava-hf` where stock LLaVA can express the model, else with our
own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vila.core.errors import LayoutError
from vila.core.reading import Fields
from vila.kernels.int4 import Int4Weight
from vila.kernels.packings import check_divides, pack_gemm
from vila.model.int4_weights import collect_packed_weights, group_size_of, int4_layers, packed_tensor_specs
from vila.model.layouts.base import DECODER_BLOCKS, Checkpoint, WeightStorage, checkpoint_with_int4
from vila.model.layouts.config_file import read_config
from vila.model.layouts.detect import detect_full_precision
from vila.model.layouts.llava_hf import check_writable, write_llava
from vila.model.layouts.native import write_native
from vila.model.save_weights import LazyTensor

# --- awq_config
# What a checkpoint says of its 4-bit weights: `quantization_config` in config.json, or AutoAWQ's quant_config.json.


_KEY = "quantization_config"
_BESIDE = ("quant_config.json", "quantize_config.json")
# AutoAWQ's own names and those that transformers has made of them.
_BITS, _GROUP, _VERSION = ("bits", "w_bit"), ("group_size", "q_group_size"), ("version", "format")
_PACKINGS = {"gemm": "gemm", "gemv": "gemv", "gemv_fast": "tinychat", "llm-awq": "tinychat"}
_REMEDY = "quantize the 16-bit model with vila quantize"


@dataclass(frozen=True)
class AwqSettings:
    """Packing and group size of a checkpoint, and the file that says so."""

    packing: str
    group_size: int
    source: Path

    def describe(self) -> str:
        """For messages."""
        return f"{self.source} says {self.packing} with groups of {self.group_size}"


def is_quantized(folder: Path) -> bool:
    """Whether a directory says of itself that its weights, or those in its `llm/`, are quantized in some way."""
    return _find(folder) is not None


def read_awq_settings(folder: Path) -> AwqSettings:
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
    return AwqSettings(_PACKINGS[packing], group, facts.file)


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


_SKIPPED = (
    "lm_head",
    "vision_tower",
    "multi_modal_projector",
    "model.vision_tower",
    "model.multi_modal_projector",
)
"""Patterns for both namings of LLaVA: transformers matches from the start of a module's name, vLLM anywhere in it."""
_SKIPPED_NATIVE = (*_SKIPPED, "language_model.lm_head", "projector")
"""Our own names beside those, which programs and tools know."""


class AwqHfLayout:
    """A directory that `quantization_config` says to be quantized, and is else in a layout of full precision."""

    name = "awq-hf"

    def matches(self, folder: Path) -> bool:
        """Whether the directory says that it is quantized, in whatever way, and would be known if it were not."""
        return folder.is_dir() and is_quantized(folder) and detect_full_precision(folder) is not None

    def open(self, folder: Path, base: Path | None = None) -> Checkpoint:
        """Understand the directory. Raises LayoutError where what is said and the tensors do not belong together."""
        facts = read_awq_settings(folder)
        layout = detect_full_precision(folder)
        if layout is None:
            raise LayoutError(f"{folder}: not a model in a layout known here but for its quantization")
        under = layout.open(folder, base)
        pieces, packed = collect_packed_weights(under.tensors, facts.packing, facts.group_size, facts.describe())
        return checkpoint_with_int4(under, pieces, packed, folder)

    def check(self, model: Any, processor: Any) -> None:
        """Raise LayoutError for a model in full precision, or with outputs that gemm words cannot hold."""
        require_int4(model, self.name)
        for name, layer in int4_layers(model):
            check_divides(f"outputs of {name}", layer.out_features, 8)

    def write(self, model: Any, processor: Any, folder: Path) -> None:
        """Write the model; all but the 4-bit weights becomes float16, which the readers of this layout compute in.

        Raises LayoutError as `check`.
        """
        self.check(model, processor)
        size = require_int4(model, self.name)
        try:
            check_writable(model.config, processor)
        except LayoutError:
            write_native(model, processor, folder, _storage(model, size, _SKIPPED_NATIVE))
        else:
            write_llava(model, processor, folder, _storage(model, size, _SKIPPED))


def require_int4(model: Any, layout: str) -> int:
    """The group size of a model. Raises LayoutError unless it is in 4 bits, with one group size."""
    size = group_size_of(model)
    if size is None:
        raise LayoutError(
            f"{layout} holds models in 4 bits, and this one is in full precision; vila quantize makes them"
        )
    return size


def _storage(model: Any, size: int, skipped: tuple[str, ...]) -> WeightStorage:
    kept = [
        name.replace("language_model.model.", prefix)
        for name, module in model.named_modules()
        if name.startswith(DECODER_BLOCKS) and isinstance(module, torch.nn.Linear)
        for prefix in ("language_model.model.", "model.language_model.")
    ]
    return WeightStorage(pack, awq_config(size, (*skipped, *kept)))


def pack(weight: Int4Weight) -> Mapping[str, LazyTensor]:
    """The tensors of a weight, packed when they are written."""
    facts = packed_tensor_specs("gemm", (weight.num_outputs, weight.num_inputs), weight.group_size)
    # Zeros and scales do not depend on codes: they are packed with a group of two inputs each, to save the work.
    groups = torch.zeros_like(weight.zeros)
    thin = Int4Weight(groups, weight.scales, weight.zeros, 2)
    sources = {"qweight": weight, "qzeros": thin, "scales": thin}
    return {
        ending: LazyTensor(facts[ending][0], facts[ending][1] or torch.float16, partial(_part, source, ending))
        for ending, source in sources.items()
    }


def _part(weight: Int4Weight, ending: str) -> torch.Tensor:
    return pack_gemm(weight)[ending]


LAYOUT = AwqHfLayout()
