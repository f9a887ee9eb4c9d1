"""From a model in memory to a quantized one in a directory; it can be stopped anywhere, and goes on to the same bytes.

Until the directory is whole, finished blocks lie in a hidden folder beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vila.core.errors import ConfigError
from vila.core.events import SILENT, Events
from vila.core.files import atomic_path, remove_partials, write_json, write_text
from vila.core.locks import DirectoryLock
from vila.model.int4 import use_int4
from vila.model.load import save_model
from vila.quant.apply import check_same_rounding, check_search
from vila.quant.block_search import SearchOptions
from vila.quant.blocks import blocks_of, check_layers, check_model, fitting_sizes, linears_of
from vila.quant.calibrate import Calibration
from vila.quant.inputs import check_ids
from vila.quant.result import Search, save_search
from vila.quant.round_model import RoundedModel, Rounding, RoundOptions, round_model
from vila.quant.search import search_model

Method = Literal["awq", "rtn"]
LAYOUT = "awq-hf"
PUBLISHED_GROUP_SIZE = SearchOptions().group_size
SEARCH_FILE = "search.safetensors"
SUMMARY_FILE = "quantization.json"


@dataclass(frozen=True, slots=True)
class Request:
    """What to do. The defaults are the published way.

    method:      `awq` searches scales and limits, `rtn` only rounds.
    search:      how to search; its group size and mode are those of the rounding.
    rounding:    as `RoundOptions`.
    search_rows: how many of the calibration's first rows the search looks at; 0 is all. It settles on far fewer tokens
                 than feedback, which takes them all, and costs much more for each.
    """

    method: Method = "awq"
    search: SearchOptions = SearchOptions()  # noqa: RUF009 - frozen
    rounding: Rounding = "nearest"
    search_rows: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("awq", "rtn"):
            raise ConfigError(f"method {self.method!r} is neither awq nor rtn")

    def round_options(self) -> RoundOptions:
        """The same settings for the rounding."""
        own = self.search
        return RoundOptions(
            own.group_size, own.symmetric, self.rounding, own.image_weight, own.device, own.batch_tokens
        )


BEST = Request("awq", SearchOptions(), "feedback", search_rows=2)
"""The settings that keep most of the language model; see docs/quantization.md."""


def with_group(request: Request, group_size: int, symmetric: bool = False) -> Request:
    """The request for another group size or mode."""
    return replace(request, search=replace(request.search, group_size=group_size, symmetric=symmetric))


def make_search(
    model: Any,
    processor: Any,
    request: Request,
    calibration: Calibration,
    *,
    keep: Path | None = None,
    events: Events = SILENT,
) -> Search | None:
    """The search that a request asks for; None for `rtn`. keep: a folder for finished blocks.

    A request that names no number type is searched in float32 on a CPU, which is slow in others, and elsewhere in that
    of the weights.
    """
    if request.method == "rtn":
        return None
    device = request.search.device or next(model.parameters()).device
    kind = request.search.dtype or (torch.float32 if device.type == "cpu" else None)
    rows = calibration.rows[: request.search_rows or None]
    # The name of the calibration is that of all its rows; how many were looked at stands beside it.
    some = replace(calibration, rows=rows)
    return search_model(model, some, replace(request.search, dtype=kind), processor=processor, keep=keep, events=events)


def check_plan(model: nn.Module, request: Request, found: Search | None) -> None:
    """Check a request against the shapes of a model, whose weights may be on the meta device.

    Raises as `check_layers` and `check_search`; ConfigError for a search that was made for another rounding, and one
    that is given where none is used.
    """
    check_layers(model, request.search.group_size)
    if found is not None:
        if request.method == "rtn":
            raise ConfigError("method rtn uses no search, and one is given; leave one of them out")
        check_same_rounding(found, request.search.group_size, request.search.symmetric)
        check_search(model, found)


def check_request(model: nn.Module, request: Request, calibration: Calibration | None, found: Search | None) -> None:
    """Check everything that can be wrong before the work begins.

    Raises as `check_plan` and `check_model`; ConfigError for missing calibration, DataError for one of another model.
    """
    check_plan(model, request, found)
    check_model(model, request.search.group_size)
    if calibration is not None:
        check_ids(model, calibration)
    elif request.rounding == "feedback" or (request.method == "awq" and found is None):
        raise ConfigError("no calibration is given, and the search or the rounding needs it")


def default_group_size(model: nn.Module, found: Search | None = None) -> int:
    """Return the group size of a search that was made before, else the largest of 128, 64 and 32 that fits the model.

    128, the published size, if none fits. The model's weights may be on the meta device.
    """
    made = None if found is None else found.facts.get("group_size")
    return int(made) if made else max(fitting_sizes(model), default=PUBLISHED_GROUP_SIZE)


def needed_bytes(model: nn.Module, group_size: int) -> int:
    """Return the disk space that quantizing takes, about: finished blocks, and the model that is made of them."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    packed = sum(linear.weight.numel() for block in blocks_of(model) for linear in linears_of(block).values())
    # A code is half a byte, the scale of a group two and its zero point half a byte; other weights have 16 bits.
    return 2 * (packed // 2 + packed * 5 // (2 * group_size)) + 2 * (parameters - packed)


def quantize_checkpoint(
    model: Any,
    processor: Any,
    out: Path,
    request: Request,
    calibration: Calibration | None = None,
    found: Search | None = None,
    *,
    layout: str = LAYOUT,
    texts: Mapping[str, str] | None = None,
    events: Events = SILENT,
) -> dict[str, Any]:
    """Quantize the model, in place, and write it to `out` with the search and a summary, which is returned.

    found: a search to use instead of making one. texts: of further files, by their names.
    The same call after a kill goes on from the last finished block.
    Raises as `check_request`; CheckpointError when the folder of finished blocks is of another run, and
    DirectoryInUseError when another process is writing `out`.
    """
    check_request(model, request, calibration, found)
    before = sum(parameter.nbytes for parameter in model.parameters())
    work = work_folder(out)
    with DirectoryLock(work).acquire(events=events):
        remove_partials(out.parent, out.name)
        search = found
        if search is None and calibration is not None:
            search = make_search(model, processor, request, calibration, keep=work / "search", events=events)
        rounded = round_model(
            model, search, request.round_options(), calibration,
            processor=processor, keep=work / "rounded", release=True, events=events,
        )  # fmt: skip
        use_int4(model, rounded.weights)
        with atomic_path(out) as part:
            save_model(model, processor, part, layout=layout)
            after = sum(path.stat().st_size for path in part.rglob("*.safetensors"))
            if search is not None:
                save_search(search, part / SEARCH_FILE)
            summary = _summary(request, calibration, search, rounded, before, after)
            write_json(part / SUMMARY_FILE, summary)
            for name, text in (texts or {}).items():
                write_text(part / name, text)
        shutil.rmtree(work, ignore_errors=True)
    return summary


def work_folder(out: Path) -> Path:
    """Where finished blocks lie until the directory is whole."""
    return out.with_name(f".{out.name}.unfinished")


def _summary(
    request: Request,
    calibration: Calibration | None,
    search: Search | None,
    rounded: RoundedModel,
    before: int,
    after: int,
) -> dict[str, Any]:
    sizes = {"bytes_before": before, "bytes_after": after, "linears": len(rounded.weights)}
    left = _errors_left(search)
    return {
        "method": request.method,
        "rounding": request.rounding,
        **request.search.facts(),
        **sizes,
        "calibration": None if calibration is None else calibration.facts(),
        "search": None if search is None else {key: value for key, value in search.facts.items() if key != "version"},
        "blocks": [
            {"weights_off": round(error, 5), **({"error_left": round(left[index], 4)} if index in left else {})}
            for index, error in enumerate(rounded.errors)
        ],
    }


def _errors_left(search: Search | None) -> dict[int, float]:
    """By block, the output error that the scales leave, as a share of what plain rounding makes; the mean of groups."""
    shares: dict[int, list[float]] = {}
    for scale in () if search is None else search.scales:
        if losses := scale.facts.get("losses"):
            shares.setdefault(int(scale.fold.split(".")[2]), []).append(min(losses) / max(losses[0], 1e-30))
    return {index: sum(values) / len(values) for index, values in shares.items()}
