"""The AWQ search over a model, block by block: a copy of one block and the rows' activations are in memory.

Memory beside the model: one block in the search's number type and the trial weights of one group, and for each
calibration token the block's input and output, the inputs of its groups of Linears and the inspected module's output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vila.core.errors import DataError
from vila.core.events import SILENT, Events, task
from vila.quant.block_search import SearchedBlock, SearchOptions, pass_block, search_block
from vila.quant.blocks import block_name, blocks_of, check_model
from vila.quant.calibrate import Calibration
from vila.quant.inputs import block_arguments, embed_rows
from vila.quant.kept import KeptBlocks, read_block, write_block
from vila.quant.result import Search, join_searches, save_search

VERSION = 1
"""Raised when the same settings would give another result: kept blocks of another version are refused."""


def search_model(
    model: nn.Module,
    calibration: Calibration,
    options: SearchOptions | None = None,
    *,
    processor: Any = None,
    keep: Path | None = None,
    events: Events = SILENT,
) -> Search:
    """Search all decoder blocks of a visual language model, or of an LLM alone; the model is not changed.

    processor: of the model; needed when the calibration holds pictures.
    keep:      a folder for finished blocks. A search that was killed goes on with the same arguments, and ends with
               the same result to the last bit.
    Raises as `blocks.check_model`; DataError for a calibration that the model cannot read; CheckpointError when `keep`
    holds another search.
    """
    return _searched(model, calibration, options or SearchOptions(), processor, keep, events)[0]


def search_to_file(
    model: nn.Module,
    calibration: Calibration,
    path: Path,
    options: SearchOptions | None = None,
    *,
    processor: Any = None,
    events: Events = SILENT,
) -> Search:
    """As `search_model`, the result written to `path`; finished blocks lie in `path` + `.blocks` until then."""
    keep = path.with_name(path.name + ".blocks")
    found, kept = _searched(model, calibration, options or SearchOptions(), processor, keep, events)
    save_search(found, path)
    if kept is not None:
        kept.remove()
    return found


@torch.no_grad()
def _searched(
    model: nn.Module,
    calibration: Calibration,
    options: SearchOptions,
    processor: Any,
    keep: Path | None,
    events: Events,
) -> tuple[Search, KeptBlocks[Search] | None]:
    card = check_model(model, options.group_size)
    if not calibration.rows:
        raise DataError(f"calibration {calibration.name!r} holds no rows; give it text or conversations")
    blocks = blocks_of(model)
    states_NSD, weights_NS = _first_states(model, calibration, options, processor)
    arguments = block_arguments(model, states_NSD.shape[1], states_NSD.dtype, states_NSD.device)
    facts = {
        "version": VERSION,
        "family": card.model_type,
        "dtype": str(states_NSD.dtype).removeprefix("torch."),
        "blocks": len(blocks),
        "calibration": calibration.facts(),
        **options.facts(),
    }
    kept = None if keep is None else KeptBlocks(keep, facts, states_NSD, read_block, write_block)
    parts = []
    with task(events, "search", len(blocks), "blocks"):
        for index, (block, call) in enumerate(zip(blocks, arguments, strict=True)):
            found = kept.enter(index, block) if kept is not None else None
            if found is None:
                name = block_name(index)
                done = search_block(name, block, card.scale_groups, states_NSD, weights_NS, call, options)
                if kept is not None:
                    kept.save(index, done.found)
            else:
                done = SearchedBlock(found, pass_block(block, states_NSD, call, options))
            states_NSD = done.output_NSD
            parts.append(done.found)
            events.advanced("search", 1, **_shown(done.found))
    return join_searches(parts, facts), kept


def _first_states(
    model: nn.Module, calibration: Calibration, options: SearchOptions, processor: Any
) -> tuple[Tensor, Tensor | None]:
    """The rows in the number type and the place of the search, and the weights of their tokens."""
    first = next(blocks_of(model)[0].parameters())
    dtype, device = options.dtype or first.dtype, options.device or first.device
    states_NSD, weights_NS = embed_rows(model, calibration, processor, options.image_weight)
    return states_NSD.to(device=device, dtype=dtype), None if weights_NS is None else weights_NS.to(device)


def _shown(found: Search) -> dict[str, float | str]:
    """The error of the block's scaled groups, as a share of what plain rounding leaves."""
    shares = [min(scale.facts["losses"]) / max(scale.facts["losses"][0], 1e-30) for scale in found.scales]
    return {"error_left": sum(shares) / len(shares)} if shares else {}
