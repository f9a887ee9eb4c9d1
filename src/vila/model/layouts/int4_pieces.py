"""From a checkpoint that was understood as one of full precision to one whose decoder blocks are in 4 bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from vila.core.errors import LayoutError
from vila.model.layouts.protocol import Checkpoint
from vila.model.packed import PackedWeight
from vila.model.weights import Piece

BLOCKS = "language_model.model.layers."
_KEY = "quantization_config"


def with_int4(
    checkpoint: Checkpoint, pieces: Mapping[str, Piece], packed: Mapping[str, PackedWeight], folder: Path
) -> Checkpoint:
    """The checkpoint of `folder`, its weights being `pieces` and `packed`.

    Its config no longer says that it is quantized: the tensors say so, and configs are written by layouts.
    Raises LayoutError when there is no 4-bit weight, or one outside the decoder's blocks.
    """
    if not packed:
        raise LayoutError(
            "no .qweight among its tensors, but it is said to hold weights in 4 bits",
            file=folder,
            hint=f"remove {_KEY} from its config.json if they are in 16 bits, else fetch it again",
        )
    check_places(packed, folder)
    for config in (checkpoint.config, checkpoint.config.text_config):
        if hasattr(config, _KEY):
            delattr(config, _KEY)
    return replace(checkpoint, folder=folder, pieces=pieces, int4=packed)


def check_places(names: Iterable[str], folder: Path) -> None:
    """Raises LayoutError for Linears in 4 bits that are not in the decoder's blocks."""
    if wrong := sorted(name for name in names if not name.startswith(BLOCKS)):
        raise LayoutError(
            "in 4 bits",
            file=folder,
            field=", ".join(wrong[:5]),
            expected="4 bits in Linears of the LLM's blocks alone",
            hint="quantize the 16-bit model with vila quantize",
        )
