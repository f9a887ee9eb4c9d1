"""Formats that round weights themselves need those of the model before any rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vila.core.errors import UnknownNameError

if TYPE_CHECKING:
    from vila.export.source import Source


def int4_source_refusals(source: Source) -> list[str]:
    """Why a model in INT4 cannot be written: empty when every Linear of its decoder has a weight of its own."""
    try:
        linears = source.block_linears()
    except UnknownNameError:
        return []
    missing = [name for name in linears if f"{name}.weight" not in source.pieces]
    if not missing:
        return []
    return [
        f"{len(missing)} Linears of its decoder have no weight in full precision ({', '.join(missing[:3])}): this "
        "format rounds by itself; export the model that was quantized, with --search for what AWQ found"
    ]
