"""TinyChat's weight files: `.pt` files of tensors in its INT4 packing, of a whole LLaVA model or of the LLM alone.

The files contain no metadata. Config, tokenizer and, if missing, tower and projector come from the directory around
them, or from that of the 16-bit model. The weights may also be split into one file per tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.core.errors import LayoutError
from vila.model.dtypes import FLOAT16
from vila.model.int4_weights import (
    PackedWeight,
    check_complete,
    int4_layers,
    matching_packings,
    packed_tensor_specs,
    split_packed_tensors,
    unpacked_shape,
)
from vila.model.layouts import llava_v1, vila_v15
from vila.model.layouts.awq import require_int4
from vila.model.layouts.base import CheckpointFiles, FullPrecisionLayout, WeightStorage, checkpoint_with_int4, map_names
from vila.model.layouts.detect import TORCH_SUFFIX, detect_full_precision
from vila.model.weights import INDEX_FILES, SINGLE_FILES, TensorRef, list_tensors, open_weight_file, torch_weight_files

if TYPE_CHECKING:
    from torch import Tensor

    from vila.kernels.int4 import Int4Weight
    from vila.model.save_weights import LazyTensor, Writable

_LLM = "llm"
_PREFIXES = llava_v1.PREFIXES
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class TinychatLayout:
    """A `.pt` file, or a directory whose LLM consists of such files only."""

    name = "tinychat"

    def matches(self, folder: Path) -> bool:
        """Return whether this is a `.pt` file, or a directory whose weights, or its LLM's, are such files."""
        if folder.is_file():
            return folder.suffix == TORCH_SUFFIX
        names = [path.name for part in (folder, folder / _LLM) for path in part.glob("*.pt")]
        if not any(name.endswith(("v2.pt", ".qweight.pt")) or ("awq" in name and "w4" in name) for name in names):
            return False
        return not (_has_weights(folder) or _has_weights(folder / _LLM))

    def open(self, folder: Path, base: Path | None = None) -> CheckpointFiles:
        """Open the file or directory; `base` is the directory of the 16-bit model.

        Raises LayoutError if no directory describes the model, or the tensors match no known packing.
        """
        model_folder = base or _model_folder(folder)
        layout = detect_full_precision(model_folder)
        if layout is None:
            raise LayoutError(f"not a 16-bit model, which {folder} needs", file=model_folder)
        files = [folder] if folder.is_file() else torch_weight_files(folder) or torch_weight_files(folder / _LLM)
        own, unexpected = map_names(list_tensors(list(map(open_weight_file, files))), _PREFIXES)
        base_checkpoint = layout.open(model_folder)
        # The LLM of the 16-bit model is not used: its norms do not match the 4-bit weights.
        others = {name: ref for name, ref in base_checkpoint.tensors.items() if not name.startswith("language_model.")}
        refs, groups = split_packed_tensors({**others, **own})
        packed = {name: _packed(name, parts) for name, parts in groups.items()}
        checkpoint = checkpoint_with_int4(base_checkpoint, refs, packed, folder)
        return replace(checkpoint, unexpected=sorted({*base_checkpoint.unexpected, *unexpected}))

    def check(self, model: Any, processor: Any) -> None:
        """Raise LayoutError for a full-precision model, one that neither layout supports, or unsupported sizes."""
        from vila.kernels.packings import check_divides

        require_int4(model, self.name)
        for name, layer in int4_layers(model):
            check_divides(f"outputs of {name} in TinyChat's words", layer.out_features, 8)
            check_divides(f"inputs of {name} in TinyChat's words", layer.in_features, 64)
        if not llava_v1.LAYOUT.supports(model.config, processor):
            vila_v15.LAYOUT.check_writable(model.config, processor)

    def write(self, model: Any, processor: Any, folder: Path) -> None:
        """Write config, tokenizer, tower and projector as llava-v1 or vila-v15, and the LLM in one `.pt` file.

        All weights except the 4-bit ones become float16. Raises LayoutError as `check`.
        """
        from vila.model.save_weights import write_torch_file

        self.check(model, processor)
        size = require_int4(model, self.name)
        # TinyChat requires the suffix.
        file = f"{folder.name}-w4-g{size}-awq-v2{TORCH_SUFFIX}"
        storage = WeightStorage(_pack, save=lambda tensors, out: write_torch_file(_with_head(tensors), out / file))
        is_v1 = llava_v1.LAYOUT.supports(model.config, processor)
        layout: FullPrecisionLayout = llava_v1.LAYOUT if is_v1 else vila_v15.LAYOUT
        layout.write(model, processor, folder, storage)


def _with_head(tensors: Mapping[str, Writable]) -> Mapping[str, Writable]:
    """Add the LM head if it is tied to the embeddings: TinyChat does not tie weights and needs every key."""
    if _EMBEDDINGS not in tensors:
        return tensors
    return {**tensors, _HEAD: tensors.get(_HEAD, tensors[_EMBEDDINGS])}


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*SINGLE_FILES, *INDEX_FILES)) or any(folder.glob("*.safetensors"))


def _model_folder(folder: Path) -> Path:
    """Return the nearest directory that describes the model."""
    for parent in (folder, folder.parent) if folder.is_dir() else (folder.parent, folder.parent.parent):
        if detect_full_precision(parent) is not None:
            return parent
    hint = "pass the directory of the 16-bit model as base= or --model-base"
    raise LayoutError("weights without a directory that describes the model", file=folder, hint=hint)


def _packed(name: str, parts: Mapping[str, TensorRef]) -> PackedWeight:
    """Return the weight with the packing and group size that its tensors match, as such files do not declare them."""
    check_complete(name, parts)
    for packing, size in matching_packings(parts):
        if packing != "gemm":
            return PackedWeight(parts, packing, size, unpacked_shape(parts["qweight"], packing))
    found = ", ".join(f"{ending} {ref.describe()}" for ending, ref in parts.items())
    expected = "one of TinyChat's packings, with group size 32, 64 or 128"
    hint = "create the file again with TinyChat's tools, or quantize the 16-bit model with vila quantize"
    raise LayoutError("", file=parts["qweight"].file.path, field=name, value=found, expected=expected, hint=hint)


class _Packing:
    """A weight that is packed when its first tensor is written, and freed with the last."""

    def __init__(self, weight: Int4Weight) -> None:
        self._weight = weight
        self._parts: dict[str, Tensor] = {}

    def part(self, ending: str) -> Tensor:
        """Return one of the packed tensors, once."""
        if not self._parts:
            from vila.kernels.packings import pack_tinychat

            self._parts = pack_tinychat(self._weight)
        return self._parts.pop(ending)


def _pack(weight: Int4Weight) -> dict[str, LazyTensor]:
    from vila.model.save_weights import LazyTensor

    specs = packed_tensor_specs("tinychat", (weight.num_outputs, weight.num_inputs), weight.group_size)
    packing = _Packing(weight)
    return {
        ending: LazyTensor(shape, (kind or FLOAT16).torch, partial(packing.part, ending))
        for ending, (shape, kind) in specs.items()
    }


LAYOUT = TinychatLayout()
