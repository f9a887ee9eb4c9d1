"""Models in 4 bits as AutoAWQ stores them, which vLLM, SGLang and transformers with gptqmodel read.

A directory of another layout whose decoder blocks hold `qweight`, `qzeros` and `scales` in the place of `weight`, and
whose config says so. It is written with the names of `llava-hf` where stock LLaVA can express the model, else with our
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vila.core.errors import LayoutError
from vila.kernels.int4_formats import pack_gemm
from vila.kernels.int4_layout import Int4Weight
from vila.kernels.int4_packing import check_divides
from vila.model.int4 import group_size_of, int4_layers
from vila.model.layouts.awq_config import awq_config, read_awq, says_quantized
from vila.model.layouts.int4_pieces import BLOCKS, with_int4
from vila.model.layouts.llava_hf import refuse_to_write, write_llava
from vila.model.layouts.native import write_native
from vila.model.layouts.protocol import Checkpoint, detect_full_precision
from vila.model.layouts.storage import Storage
from vila.model.packed import gather, packed_facts
from vila.model.written import Made

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

    def recognises(self, folder: Path) -> bool:
        """Whether the directory says that it is quantized, in whatever way, and would be known if it were not."""
        return folder.is_dir() and says_quantized(folder) and detect_full_precision(folder) is not None

    def open(self, folder: Path, base: Path | None = None) -> Checkpoint:
        """Understand the directory. Raises LayoutError where what is said and the tensors do not belong together."""
        facts = read_awq(folder)
        layout = detect_full_precision(folder)
        if layout is None:
            raise LayoutError(f"{folder}: not a model in a layout known here but for its quantization")
        under = layout.open(folder, base)
        pieces, packed = gather(under.pieces, facts.packing, facts.group_size, facts.describe())
        return with_int4(under, pieces, packed, folder)

    def check(self, model: Any, processor: Any) -> None:
        """Raise LayoutError for a model in full precision, or with outputs that gemm words cannot hold."""
        check_int4(model, self.name)
        for name, layer in int4_layers(model):
            check_divides(f"outputs of {name}", layer.out_features, 8)

    def write(self, model: Any, processor: Any, folder: Path) -> None:
        """Write the model; all but the 4-bit weights becomes float16, which the readers of this layout compute in.

        Raises LayoutError as `check`.
        """
        self.check(model, processor)
        size = check_int4(model, self.name)
        try:
            refuse_to_write(model.config, processor)
        except LayoutError:
            write_native(model, processor, folder, _storage(model, size, _SKIPPED_NATIVE))
        else:
            write_llava(model, processor, folder, _storage(model, size, _SKIPPED))


def check_int4(model: Any, layout: str) -> int:
    """The group size of a model. Raises LayoutError unless it is in 4 bits, with one group size."""
    size = group_size_of(model)
    if size is None:
        raise LayoutError(
            f"{layout} holds models in 4 bits, and this one is in full precision; vila quantize makes them"
        )
    return size


def _storage(model: Any, size: int, skipped: tuple[str, ...]) -> Storage:
    kept = [
        name.replace("language_model.model.", prefix)
        for name, module in model.named_modules()
        if name.startswith(BLOCKS) and isinstance(module, torch.nn.Linear)
        for prefix in ("language_model.model.", "model.language_model.")
    ]
    return Storage(pack, awq_config(size, (*skipped, *kept)))


def pack(weight: Int4Weight) -> Mapping[str, Made]:
    """The tensors of a weight, packed when they are written."""
    facts = packed_facts("gemm", (weight.num_outputs, weight.num_inputs), weight.group_size)
    # Zeros and scales do not depend on codes: they are packed with a group of two inputs each, to save the work.
    groups = torch.zeros_like(weight.zeros)
    thin = Int4Weight(groups, weight.scales, weight.zeros, 2)
    sources = {"qweight": weight, "qzeros": thin, "scales": thin}
    return {
        ending: Made(facts[ending][0], facts[ending][1] or torch.float16, partial(_part, source, ending))
        for ending, source in sources.items()
    }


def _part(weight: Int4Weight, ending: str) -> torch.Tensor:
    return pack_gemm(weight)[ending]


LAYOUT = AwqHfLayout()
