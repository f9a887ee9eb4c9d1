"""AutoAWQ's layout of 4-bit models, which vLLM, SGLang and transformers with gptqmodel read.

A directory in another layout whose decoder blocks have `qweight`, `qzeros` and `scales` instead of `weight`, and whose
config has a `quantization_config`. Written with the names of `llava-hf` if stock LLaVA can represent the model, else
with native names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.core.errors import LayoutError
from vila.core.reading import Fields
from vila.model.dtypes import FLOAT16
from vila.model.int4_weights import collect_packed_weights, group_size_of, int4_layers, packed_tensor_specs
from vila.model.layouts import llava_hf, native
from vila.model.layouts.base import (
    DECODER_BLOCKS,
    CheckpointFiles,
    FullPrecisionLayout,
    WeightStorage,
    checkpoint_with_int4,
)
from vila.model.layouts.config_file import read_config
from vila.model.layouts.detect import detect_full_precision

if TYPE_CHECKING:
    import torch

    from vila.kernels.int4 import Int4Weight
    from vila.model.save_weights import LazyTensor

_KEY = "quantization_config"
_AUTOAWQ_FILES = ("quant_config.json", "quantize_config.json")
# Key names of transformers and of AutoAWQ.
_BITS, _GROUP, _VERSION = ("bits", "w_bit"), ("group_size", "q_group_size"), ("version", "format")
_PACKINGS = {"gemm": "gemm", "gemv": "gemv", "gemv_fast": "tinychat", "llm-awq": "tinychat"}
_REMEDY = "quantize the 16-bit model with vila quantize"


def read_awq_settings(folder: Path) -> tuple[str, int, str]:
    """Return packing and group size of a checkpoint, and a phrase for errors that names the file which declares them.

    Raises LayoutError with file, field and value unless they are 4-bit AWQ with zeros.
    """
    fields = _find(folder)
    if fields is None:
        raise LayoutError("no quantization settings", file=folder)
    if fields.get("quant_method", "awq") != "awq":
        raise fields.refusal("quant_method", expected="awq", hint=_REMEDY)
    bits, size, version = (_first(fields, keys) for keys in (_BITS, _GROUP, _VERSION))
    if fields.get(bits) != 4:
        raise fields.refusal(bits, expected="4", hint=_REMEDY)
    if fields.get("zero_point", True) is not True:
        hint = f"only weights with zeros are supported: correct it if there are .qzeros, else {_REMEDY}"
        raise fields.refusal("zero_point", expected="true", hint=hint)
    packing = fields.text(version, "gemm").lower()
    if packing not in _PACKINGS:
        raise fields.refusal(version, expected=", ".join(_PACKINGS), hint=_REMEDY)
    group = 128 if fields.get(size) is None else fields[size]
    if not isinstance(group, int) or isinstance(group, bool) or group < 2:
        raise fields.refusal(size, expected="32, 64 or 128", hint=_REMEDY)
    return _PACKINGS[packing], group, f"{fields.file} declares {_PACKINGS[packing]} with group size {group}"


def awq_config(group_size: int, skipped: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of gemm weights; `skipped` are patterns of modules in full precision."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(skipped),
    }


def _find(folder: Path) -> Fields | None:
    """Return the quantization settings in the config of a directory or of its `llm/`, None if there are none."""
    for directory in (folder, folder / "llm"):
        config = read_config(directory)
        for part in (config, config.section("text_config")):
            if part.get(_KEY) is not None and (fields := part.section(_KEY)):
                return fields
        for name in _AUTOAWQ_FILES:
            if (directory / name).is_file():
                return Fields.of_file(directory / name, LayoutError)
    return None


def _first(fields: Fields, keys: Sequence[str]) -> str:
    """Return the first of several keys that has a value; the first key if none has."""
    return next((key for key in keys if fields.get(key) is not None), keys[0])


_SKIPPED = ("lm_head", "vision_tower", "multi_modal_projector", "model.vision_tower", "model.multi_modal_projector")
"""Patterns for both LLaVA namings: transformers matches the start of a module name, vLLM any part of it."""
_SKIPPED_NATIVE = (*_SKIPPED, "language_model.lm_head", "projector")
"""Patterns for native names."""


class AwqHfLayout:
    """A directory with a `quantization_config` and otherwise a full-precision layout."""

    name = "awq-hf"

    def matches(self, folder: Path) -> bool:
        """Return whether the directory declares quantization and matches a full-precision layout."""
        return folder.is_dir() and _find(folder) is not None and detect_full_precision(folder) is not None

    def open(self, folder: Path, base: Path | None = None) -> CheckpointFiles:
        """Read the configs. Raises LayoutError if the declaration and the tensors disagree."""
        settings = read_awq_settings(folder)
        layout = detect_full_precision(folder)
        if layout is None:
            raise LayoutError("no known checkpoint layout", file=folder)
        full_precision = layout.open(folder, base)
        refs, packed = collect_packed_weights(full_precision.tensors, *settings)
        return checkpoint_with_int4(full_precision, refs, packed, folder)

    def check(self, model: Any, processor: Any) -> None:
        """Raise LayoutError unless the model is INT4 and its output channels are multiples of 8 (gemm packing)."""
        from vila.kernels.packings import check_divides

        require_int4(model, self.name)
        for name, layer in int4_layers(model):
            check_divides(f"outputs of {name}", layer.out_features, 8)

    def write(self, model: Any, processor: Any, folder: Path) -> None:
        """Write the model; all weights except the 4-bit ones become float16, the dtype that readers of this layout use.

        Raises LayoutError as `check`.
        """
        self.check(model, processor)
        is_llava = llava_hf.LAYOUT.supports(model.config, processor)
        layout: FullPrecisionLayout = llava_hf.LAYOUT if is_llava else native.LAYOUT
        skipped = _SKIPPED if is_llava else _SKIPPED_NATIVE
        layout.write(model, processor, folder, _storage(model, require_int4(model, self.name), skipped))


def require_int4(model: Any, layout: str) -> int:
    """Return the group size of a 4-bit model. Raises LayoutError for full precision, or several group sizes."""
    size = group_size_of(model)
    if size is None:
        raise LayoutError(
            f"{layout} needs a 4-bit model, this one is in full precision", hint="quantize it with vila quantize"
        )
    return size


def _storage(model: Any, size: int, skipped: tuple[str, ...]) -> WeightStorage:
    from torch import nn

    full_precision = [
        name.replace("language_model.model.", prefix)
        for name, module in model.named_modules()
        if name.startswith(DECODER_BLOCKS) and isinstance(module, nn.Linear)
        for prefix in ("language_model.model.", "model.language_model.")
    ]
    return WeightStorage(pack, awq_config(size, (*skipped, *full_precision)))


def pack(weight: Int4Weight) -> Mapping[str, LazyTensor]:
    """Return the tensors of a weight, packed when they are written."""
    import torch

    from vila.kernels.int4 import Int4Weight
    from vila.model.save_weights import LazyTensor

    specs = packed_tensor_specs("gemm", (weight.num_outputs, weight.num_inputs), weight.group_size)
    # Zeros and scales do not depend on the codes, so they are packed with dummy codes of two inputs per group.
    without_codes = Int4Weight(torch.zeros_like(weight.zeros), weight.scales, weight.zeros, 2)
    sources = {"qweight": weight, "qzeros": without_codes, "scales": without_codes}
    return {
        ending: LazyTensor(specs[ending][0], (specs[ending][1] or FLOAT16).torch, partial(_part, source, ending))
        for ending, source in sources.items()
    }


def _part(weight: Int4Weight, ending: str) -> torch.Tensor:
    from vila.kernels.packings import pack_gemm

    return pack_gemm(weight)[ending]


LAYOUT = AwqHfLayout()
