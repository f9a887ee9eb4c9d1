"""From a model in memory to a quantized one in a directory; it can be stopped anywhere, and goes on to the same bytes.

Until the directory is whole, finished blocks lie in a hidden folder beside it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vila.core.errors import ConfigError, DataError
from vila.core.files import DirectoryLock, atomic_path, remove_partials, write_json, write_text
from vila.core.progress import SILENT, Events, task
from vila.families import ScaleGroup
from vila.kernels.int4 import Int4Weight, dequantize, quantize
from vila.model.int4_weights import use_int4
from vila.model.loading import save_model
from vila.quant.apply import check_same_rounding, check_search, clamp_weight, fold_scale
from vila.quant.awq_cache import AwqSearch, save_search
from vila.quant.awq_search import (
    BlockArguments,
    SearchOptions,
    block_arguments,
    check_ids,
    embed_rows,
    run_block,
    search_model,
    working_copy,
)
from vila.quant.blocks import (
    block_linears,
    block_name,
    check_layers,
    check_model,
    decoder_blocks,
    fitting_group_sizes,
    module_prefix,
)
from vila.quant.calibration import Calibration
from vila.quant.gptq import gptq_round, refit_scales, second_moment
from vila.quant.resume_state import BlockResumeState, read_int4_block, write_int4_block

# --- round_model
# A model's blocks in INT4, one after the other, each in float32 while it is worked on.


# N rows  S sequence  D model width  I input channels

Rounding = Literal["nearest", "feedback"]
VERSION = 1
"""Raised when the same settings would give other codes: kept blocks of another version are refused."""


@dataclass(frozen=True, slots=True)
class RoundOptions:
    """How to round.

    rounding:     `nearest` is the published way. `feedback` chooses codes on the calibration, each block on what the
                  rounded blocks before it give, and refits the scales.
    image_weight: what a token of a picture counts where a token of text counts 1.
    device:       where a block is rounded; None is where it lies.
    batch_tokens: tokens that a block runs on at once.
    """

    group_size: int = 128
    symmetric: bool = False
    rounding: Rounding = "nearest"
    image_weight: float = 1.0
    device: torch.device | None = None
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.rounding not in ("nearest", "feedback"):
            raise ConfigError(f"rounding {self.rounding!r} is neither nearest nor feedback")

    def facts(self) -> dict[str, Any]:
        """What decides the result."""
        return {name: getattr(self, name) for name in ("group_size", "symmetric", "rounding", "image_weight")}


@dataclass(frozen=True, slots=True)
class RoundedModel:
    """weights: by the names of the Linears in the model. errors: of each block, the root of the share of its weights'
    energy that rounding changed."""

    weights: dict[str, Int4Weight]
    errors: tuple[float, ...]


@torch.no_grad()
def round_model(
    model: nn.Module,
    search: AwqSearch | None,
    options: RoundOptions,
    calibration: Calibration | None = None,
    *,
    processor: Any = None,
    keep: Path | None = None,
    release: bool = False,
    events: Events = SILENT,
) -> RoundedModel:
    """Fold the search into the model and round the Linears of its blocks.

    The model's norms and biases are changed in place; its Linears keep their weights, which then do not fit the norms:
    `model.int4.use_int4` puts the result in their place.

    calibration: what feedback is judged on; nearest needs none. keep: a folder for finished blocks, with feedback.
    release:     let go of the weights of each block once it is rounded.
    Raises as `check_model` and `check_search`; ConfigError for a search that was made for another kind of rounding, or
    feedback without calibration; CheckpointError when `keep` holds the blocks of another run.
    """
    family = check_model(model, options.group_size)
    if search is not None:
        check_same_rounding(search, options.group_size, options.symmetric)
        check_search(model, search)
    feedback = None
    if options.rounding == "feedback":
        feedback = _Feedback(model, search, options, calibration, processor, family.scale_groups, keep)
    weights: dict[str, Int4Weight] = {}
    errors = []
    prefix, blocks = module_prefix(model), decoder_blocks(model)
    with task(events, "round", len(blocks), "blocks"):
        for index, block in enumerate(blocks):
            device = options.device or next(block.parameters()).device
            work = working_copy(block, torch.empty(0, device=device))
            limits = _fold(work, block_name(index), search)
            whole = {name: linear.weight for name, linear in block_linears(work).items()}
            if feedback is None:
                rounded = {name: _grid(whole[name], limits.get(name), options) for name in whole}
            else:
                rounded = feedback.block(index, block, work, limits)
            errors.append(_error(whole, rounded))
            weights |= {f"{prefix}{block_name(index)}.{name}": rounded[name].to("cpu") for name in whole}
            _write_back(block, work, release)
            events.advanced("round", 1, weights_off=f"{errors[-1]:.1%}")
    return RoundedModel(weights, tuple(errors))


class _Feedback:
    """The rows as they come out of the rounded blocks, and the rounding of the next one on them."""

    def __init__(
        self,
        model: nn.Module,
        search: AwqSearch | None,
        options: RoundOptions,
        calibration: Calibration | None,
        processor: Any,
        groups: Sequence[ScaleGroup],
        keep: Path | None,
    ) -> None:
        if calibration is None or not calibration.rows:
            raise ConfigError("rounding with feedback needs calibration; give it text or conversations")
        self.options, self.groups = options, groups
        states_NSD, weights_NS = embed_rows(model, calibration, processor, options.image_weight)
        device = options.device or states_NSD.device
        self.states_NSD = states_NSD.to(device=device, dtype=torch.float32)
        self.weights_T = None if weights_NS is None else weights_NS.flatten().to(device)
        self.arguments = block_arguments(model, states_NSD.shape[1], torch.float32, device)
        facts = {"version": VERSION, "calibration": calibration.facts(), "search": _digest(search), **options.facts()}
        self.kept = (
            BlockResumeState(keep, facts, self.states_NSD, read_int4_block, write_int4_block)
            if keep is not None
            else None
        )

    def block(
        self, index: int, block: nn.Module, work: nn.Module, limits: Mapping[str, Tensor]
    ) -> dict[str, Int4Weight]:
        """The rounded Linears of a block; the working copy computes with them afterwards."""
        rounded = self.kept.enter(index, block) if self.kept is not None else None
        arguments = self.arguments[index]
        if rounded is None:
            rounded = {}
            for group in self.groups:
                rounded |= self._group(work, group, arguments, limits)
            if self.kept is not None:
                self.kept.save(index, rounded)
        else:
            for name, weight in rounded.items():
                _use(work, name, weight)
        self.states_NSD = run_block(work, (), self.states_NSD, arguments, self._rows)[0]
        if not torch.isfinite(self.states_NSD).all():
            raise DataError(f"{block_name(index)}: its activations are not finite after rounding; use nearest")
        return rounded

    def _group(
        self, work: nn.Module, group: ScaleGroup, arguments: BlockArguments, limits: Mapping[str, Tensor]
    ) -> dict[str, Int4Weight]:
        inputs = run_block(work, (group,), self.states_NSD, arguments, self._rows)[1][group.linears[0]]
        moments_II = second_moment(inputs.flatten(0, 1), self.weights_T)
        out = {}
        for name in group.linears:
            weight_OI: Tensor = work.get_submodule(name).weight  # type: ignore[assignment]
            grid = _grid(weight_OI, limits.get(name), self.options)
            out[name] = refit_scales(weight_OI, gptq_round(weight_OI, grid, moments_II), moments_II)
        for name, weight in out.items():
            _use(work, name, weight)
        return out

    @property
    def _rows(self) -> int:
        return max(1, self.options.batch_tokens // self.states_NSD.shape[1])


def _fold(work: nn.Module, name: str, search: AwqSearch | None) -> dict[str, Tensor]:
    """Fold the block's scales into its copy; its limits, by the Linears' names in it."""
    if search is None:
        return {}
    before = len(name) + 1
    for scale in search.scales:
        if scale.fold.startswith(f"{name}."):
            linears = [work.get_submodule(one[before:]) for one in scale.linears]
            fold_scale(work.get_submodule(scale.fold[before:]), linears, scale.scale_I.to(_device(work)))
    return {clip.linear[before:]: clip.limit_OG for clip in search.clips if clip.linear.startswith(f"{name}.")}


def _grid(weight_OI: Tensor, limit_OG: Tensor | None, options: RoundOptions) -> Int4Weight:
    """The published rounding of a weight inside its limits."""
    if limit_OG is not None:
        linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight_OI, requires_grad=False)
        clamp_weight(linear, limit_OG)
        weight_OI = linear.weight
    return quantize(weight_OI, options.group_size, symmetric=options.symmetric)


def _use(work: nn.Module, name: str, weight: Int4Weight) -> None:
    linear = work.get_submodule(name)
    linear.weight = nn.Parameter(dequantize(weight.to(_device(work))), requires_grad=False)


def _write_back(block: nn.Module, work: nn.Module, release: bool) -> None:
    """Norms and biases of the copy into the model's block; the weights of its Linears leave memory when asked."""
    linears = {f"{name}.weight" for name in block_linears(work)}
    with torch.no_grad():
        for name, parameter in list(block.named_parameters()):
            if name not in linears:
                # Never in place: it may be a view of a file.
                value = work.get_parameter(name).to(parameter)
            elif release:
                value = parameter.detach().to("meta")
            else:
                continue
            owner, _, own = name.rpartition(".")
            setattr(block.get_submodule(owner), own, nn.Parameter(value, requires_grad=parameter.requires_grad))


def _error(whole: Mapping[str, Tensor], rounded: Mapping[str, Int4Weight]) -> float:
    changed = total = 0.0
    for name, weight_OI in whole.items():
        values_OI = dequantize(rounded[name].to(weight_OI.device))
        changed += float((values_OI - weight_OI).square().sum(dtype=torch.float64))
        total += float(weight_OI.square().sum(dtype=torch.float64))
    return float((changed / max(total, 1e-30)) ** 0.5)


def _digest(search: AwqSearch | None) -> str:
    out = hashlib.sha256()
    for name, tensor in [] if search is None else [
        *((scale.fold, scale.scale_I) for scale in search.scales),
        *((clip.linear, clip.limit_OG) for clip in search.clips),
    ]:  # fmt: skip
        out.update(name.encode())
        out.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return out.hexdigest()


def _device(work: nn.Module) -> torch.device:
    return next(work.parameters()).device


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
) -> AwqSearch | None:
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


def check_plan(model: nn.Module, request: Request, found: AwqSearch | None) -> None:
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


def check_request(model: nn.Module, request: Request, calibration: Calibration | None, found: AwqSearch | None) -> None:
    """Check everything that can be wrong before the work begins.

    Raises as `check_plan` and `check_model`; ConfigError for missing calibration, DataError for one of another model.
    """
    check_plan(model, request, found)
    check_model(model, request.search.group_size)
    if calibration is not None:
        check_ids(model, calibration)
    elif request.rounding == "feedback" or (request.method == "awq" and found is None):
        raise ConfigError("no calibration is given, and the search or the rounding needs it")


def default_group_size(model: nn.Module, found: AwqSearch | None = None) -> int:
    """Return the group size of a search that was made before, else the largest of 128, 64 and 32 that fits the model.

    128, the published size, if none fits. The model's weights may be on the meta device.
    """
    made = None if found is None else found.facts.get("group_size")
    return int(made) if made else max(fitting_group_sizes(model), default=PUBLISHED_GROUP_SIZE)


def needed_bytes(model: nn.Module, group_size: int) -> int:
    """Return the disk space that quantizing takes, about: finished blocks, and the model that is made of them."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    packed = sum(linear.weight.numel() for block in decoder_blocks(model) for linear in block_linears(block).values())
    # A code is half a byte, the scale of a group two and its zero point half a byte; other weights have 16 bits.
    return 2 * (packed // 2 + packed * 5 // (2 * group_size)) + 2 * (parameters - packed)


def quantize_checkpoint(
    model: Any,
    processor: Any,
    out: Path,
    request: Request,
    calibration: Calibration | None = None,
    found: AwqSearch | None = None,
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
    search: AwqSearch | None,
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


def _errors_left(search: AwqSearch | None) -> dict[int, float]:
    """By block, the output error that the scales leave, as a share of what plain rounding makes; the mean of groups."""
    shares: dict[int, list[float]] = {}
    for scale in () if search is None else search.scales:
        if losses := scale.facts.get("losses"):
            shares.setdefault(int(scale.fold.split(".")[2]), []).append(min(losses) / max(losses[0], 1e-30))
    return {index: sum(values) / len(values) for index, values in shares.items()}
