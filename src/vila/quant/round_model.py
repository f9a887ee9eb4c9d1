"""A model's blocks in INT4, one after the other, each in float32 while it is worked on.

Memory beside the model and the result: one block in float32; with feedback also the rows as a block sees them, the
inputs of one group of Linears and their second moments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vila.core.errors import ConfigError, DataError
from vila.core.events import SILENT, Events, task
from vila.families.card import ScaleGroup
from vila.kernels.int4_layout import Int4Weight, dequantize, quantize
from vila.quant.apply import check_same_rounding, check_search, clamp_weight, fold_scale
from vila.quant.block_search import run_block, working_copy
from vila.quant.blocks import block_name, blocks_of, check_model, linears_of, module_prefix
from vila.quant.calibrate import Calibration
from vila.quant.feedback import moments, refit_scales, round_codes
from vila.quant.inputs import Arguments, block_arguments, embed_rows
from vila.quant.kept import KeptBlocks
from vila.quant.kept_weights import read_weights, write_weights
from vila.quant.result import Search

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
    search: Search | None,
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
    card = check_model(model, options.group_size)
    if search is not None:
        check_same_rounding(search, options.group_size, options.symmetric)
        check_search(model, search)
    feedback = None
    if options.rounding == "feedback":
        feedback = _Feedback(model, search, options, calibration, processor, card.scale_groups, keep)
    weights: dict[str, Int4Weight] = {}
    errors = []
    prefix, blocks = module_prefix(model), blocks_of(model)
    with task(events, "round", len(blocks), "blocks"):
        for index, block in enumerate(blocks):
            device = options.device or next(block.parameters()).device
            work = working_copy(block, torch.empty(0, device=device))
            limits = _fold(work, block_name(index), search)
            whole = {name: linear.weight for name, linear in linears_of(work).items()}
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
        search: Search | None,
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
        self.kept = KeptBlocks(keep, facts, self.states_NSD, read_weights, write_weights) if keep is not None else None

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
        self, work: nn.Module, group: ScaleGroup, arguments: Arguments, limits: Mapping[str, Tensor]
    ) -> dict[str, Int4Weight]:
        inputs = run_block(work, (group,), self.states_NSD, arguments, self._rows)[1][group.linears[0]]
        moments_II = moments(inputs.flatten(0, 1), self.weights_T)
        out = {}
        for name in group.linears:
            weight_OI: Tensor = work.get_submodule(name).weight  # type: ignore[assignment]
            grid = _grid(weight_OI, limits.get(name), self.options)
            out[name] = refit_scales(weight_OI, round_codes(weight_OI, grid, moments_II), moments_II)
        for name, weight in out.items():
            _use(work, name, weight)
        return out

    @property
    def _rows(self) -> int:
        return max(1, self.options.batch_tokens // self.states_NSD.shape[1])


def _fold(work: nn.Module, name: str, search: Search | None) -> dict[str, Tensor]:
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
    linears = {f"{name}.weight" for name in linears_of(work)}
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


def _digest(search: Search | None) -> str:
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
