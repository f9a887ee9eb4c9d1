"""TinyChat's weight files: `.pt` files of tensors in its second INT4 packing, whole LLaVA models or the LLM alone.

Such a file says nothing of the model. Config, tokenizer and, where the file lacks them, tower and projector come from
the directory that it lies in, or from that of the 16-bit model. One file may also be cut into one for each tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.kernels.int4 import Int4Weight
from vila.kernels.packings import check_divides, pack_tinychat
from vila.model.int4_weights import (
    PackedWeight,
    check_complete,
    int4_layers,
    matching_packings,
    packed_tensor_specs,
    split_packed_tensors,
)
from vila.model.layouts import llava_v1, vila_v15
from vila.model.layouts.awq import require_int4
from vila.model.layouts.base import Checkpoint, WeightStorage, checkpoint_with_int4, map_names
from vila.model.layouts.detect import TORCH_SUFFIX, detect_full_precision
from vila.model.save_weights import LazyTensor, Writable, write_torch_file
from vila.model.weights import INDEX_FILES, SINGLE_FILES, TensorRef, list_tensors, open_weight_file, torch_weight_files

_LLM = "llm"
_PREFIXES = llava_v1.PREFIXES
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class TinychatLayout:
    """A `.pt` file, or a directory whose LLM is nothing but such files."""

    name = "tinychat"

    def matches(self, folder: Path) -> bool:
        """Whether this is a `.pt` file, or a directory of such, or one whose LLM's weights are such."""
        if folder.is_file():
            return folder.suffix == TORCH_SUFFIX
        if not any(_is_tinychat(path.name) for part in (folder, folder / _LLM) for path in part.glob("*.pt")):
            return False
        return not (_has_weights(folder) or _has_weights(folder / _LLM))

    def open(self, folder: Path, base: Path | None = None) -> Checkpoint:
        """Understand the file or directory; `base` is the directory of the 16-bit model.

        Raises LayoutError when nothing around it says what model it is, or its tensors are in no packing known here.
        """
        home = base or _home(folder)
        layout = detect_full_precision(home)
        if layout is None:
            raise LayoutError(f"not a 16-bit model, which {folder} needs beside it", file=home)
        mine, unclaimed = map_names(list_tensors([open_weight_file(path) for path in _files(folder)]), _PREFIXES)
        under = layout.open(home)
        # Of the LLM nothing is taken from the 16-bit model: its norms belong to other weights.
        others = {name: piece for name, piece in under.tensors.items() if not name.startswith("language_model.")}
        pieces, groups = split_packed_tensors({**others, **mine})
        packed = {name: _packed(name, parts) for name, parts in groups.items()}
        checkpoint = checkpoint_with_int4(under, pieces, packed, folder)
        return replace(checkpoint, unexpected=sorted({*under.unexpected, *unclaimed}))

    def check(self, model: Any, processor: Any) -> None:
        """Raise LayoutError for a model in full precision, that neither layout can express, or of odd sizes."""
        require_int4(model, self.name)
        for name, layer in int4_layers(model):
            check_divides(f"outputs of {name} in TinyChat's words", layer.out_features, 8)
            check_divides(f"inputs of {name} in TinyChat's words", layer.in_features, 64)
        try:
            llava_v1.check_writable(model.config)
        except LayoutError:
            vila_v15.check_writable(model.config)

    def write(self, model: Any, processor: Any, folder: Path) -> None:
        """Write config, tokenizer, tower and projector in VILA-1.0's layout or VILA-1.5's, and the weights in a file.

        All but the 4-bit weights becomes float16. Raises LayoutError as `check`.
        """
        self.check(model, processor)
        size = require_int4(model, self.name)
        # TinyChat asks for the ending.
        file = f"{folder.name}-w4-g{size}-awq-v2{TORCH_SUFFIX}"
        storage = WeightStorage(_pack, save=lambda tensors, where: write_torch_file(_with_head(tensors), where / file))
        try:
            llava_v1.check_writable(model.config)
        except LayoutError:
            vila_v15.write_folders(model, processor, folder, storage)
        else:
            llava_v1.write_llava_v1(model, processor, folder, storage)


def _with_head(tensors: Mapping[str, Writable]) -> Mapping[str, Writable]:
    """The LLM's tensors with its head, also one that is the embeddings: TinyChat ties nothing and misses no key."""
    if _EMBEDDINGS not in tensors:
        return tensors
    return {**tensors, _HEAD: tensors.get(_HEAD, tensors[_EMBEDDINGS])}


def _is_tinychat(name: str) -> bool:
    return name.endswith(("v2.pt", ".qweight.pt")) or ("awq" in name and "w4" in name)


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*SINGLE_FILES, *INDEX_FILES)) or any(folder.glob("*.safetensors"))


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    return torch_weight_files(folder) or torch_weight_files(folder / _LLM)


def _home(folder: Path) -> Path:
    """The nearest directory that says what model this is."""
    places = [folder, folder.parent] if folder.is_dir() else [folder.parent, folder.parent.parent]
    for place in places:
        if detect_full_precision(place) is not None:
            return place
    raise LayoutError(
        "weights alone, and no directory around them says of which model",
        file=folder,
        hint="give that of the 16-bit model as base= or --model-base",
    )


def _packed(name: str, parts: Mapping[str, TensorRef]) -> PackedWeight:
    """The weight in whatever packing and groups its tensors fit: such files do not say."""
    check_complete(name, parts)
    for packing, size in matching_packings(parts):
        codes = parts["qweight"]
        if packing == "tinychat":
            return PackedWeight(parts, packing, size, (codes.shape[0] * 4, codes.shape[1]))
        if packing == "gemv":
            return PackedWeight(parts, packing, size, (codes.shape[0], codes.shape[1] * 8))
    found = ", ".join(f"{ending} {piece.dtype} {list(piece.shape)}" for ending, piece in parts.items())
    raise LayoutError(
        "",
        file=parts["qweight"].file.path,
        field=name,
        value=found.replace("torch.", ""),
        expected="one of TinyChat's packings, with groups of 32, 64 or 128",
        hint="make the file again with TinyChat's own tools, or quantize the 16-bit model with vila quantize",
    )


class _Packing:
    """A weight that is packed when the first of its tensors is written, and forgotten with the last."""

    def __init__(self, weight: Int4Weight) -> None:
        self._weight = weight
        self._parts: dict[str, Tensor] = {}

    def part(self, ending: str) -> Tensor:
        """One of the packed tensors, once."""
        if not self._parts:
            self._parts = pack_tinychat(self._weight)
        return self._parts.pop(ending)


def _pack(weight: Int4Weight) -> dict[str, LazyTensor]:
    facts = packed_tensor_specs("tinychat", (weight.num_outputs, weight.num_inputs), weight.group_size)
    packing = _Packing(weight)
    return {
        ending: LazyTensor(shape, kind or torch.float16, partial(packing.part, ending))
        for ending, (shape, kind) in facts.items()
    }


LAYOUT = TinychatLayout()
