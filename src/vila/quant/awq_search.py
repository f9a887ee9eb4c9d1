"""The AWQ search over a model, block by block: a copy of one block and the rows' activations are in memory.

Memory beside the model: one block in the search's number type and the trial weights of one group, and for each
calibration token the block's input and output, the inputs of its groups of Linears and the inspected module's output.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vila.core.errors import ConfigError, DataError, LayoutError
from vila.core.progress import SILENT, Events, task
from vila.families import ScaleGroup
from vila.quant.apply import fold_scale
from vila.quant.awq_cache import AwqSearch, ChannelScale, WeightClip, join_searches, save_search
from vila.quant.awq_scale import (
    Clipping,
    ScaleChoice,
    Scaling,
    candidates,
    is_linear_clipped,
    linear_loss,
    mean_magnitude,
    module_loss,
    sample_tokens,
    search_limits,
    search_scale,
    second_moments,
    weight_magnitude,
)
from vila.quant.blocks import block_name, can_scale, check_model, decoder_blocks, text_decoder
from vila.quant.calibration import Calibration
from vila.quant.resume_state import BlockResumeState, read_search_block, write_search_block

# --- inputs
# What a block is searched on: the calibration rows as hidden states, and the rest of what blocks are called with.


# N rows  S sequence  D model width  I input channels

BlockArguments = Mapping[str, Any]


@torch.no_grad()
def embed_rows(
    model: nn.Module, calibration: Calibration, processor: Any = None, image_weight: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """The rows as the decoder's input [N, S, D], and the weight of each token [N, S], None when all count 1.

    Shorter rows are padded on the right, where causal attention keeps it from the rest; padding counts nothing.
    image_weight: what a token of a picture counts. processor: turns pictures into pixels; needed only with pictures.
    Raises DataError for ids that the model does not have.
    """
    check_ids(model, calibration)
    width = max(len(row.ids) for row in calibration.rows)
    states, weights = [], []
    for row in calibration.rows:
        ids_1S = torch.tensor([row.ids], device=_device(model))
        slots_1S = torch.zeros_like(ids_1S, dtype=torch.bool)
        if row.media:
            slots_1S = ids_1S.eq(model.config.image_token_id)  # type: ignore[union-attr, arg-type]
        state_1SD = _embed(model, ids_1S, row.media, processor)
        gap = width - len(row.ids)
        states.append(nn.functional.pad(state_1SD, (0, 0, 0, gap)))
        weights.append(nn.functional.pad(torch.where(slots_1S, image_weight, 1.0), (0, gap)))
    weights_NS = torch.cat(weights)
    return torch.cat(states), None if bool((weights_NS == 1).all()) else weights_NS


def _embed(model: nn.Module, ids_1S: Tensor, media: tuple[Any, ...], processor: Any) -> Tensor:
    if not media:
        table: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        out: Tensor = table(ids_1S)
        return out
    features = model.vision_features(processor.pixels(media).to(ids_1S.device))  # type: ignore[operator]
    embedded: Tensor = model.embed(ids_1S, model.project(features))  # type: ignore[operator]
    return embedded


def check_ids(model: nn.Module, calibration: Calibration) -> None:
    """Raise DataError for token ids that the model has no embedding for; its weights may be on the meta device."""
    vocab = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    for number, row in enumerate(calibration.rows):
        placeholder = model.config.image_token_id if row.media else None  # type: ignore[union-attr]
        if wrong := [one for one in row.ids if not 0 <= one < vocab and one != placeholder]:
            raise DataError(
                f"{calibration.name} row {number}: token id {wrong[0]} is outside the model's {vocab} embeddings",
                hint="calibrate with the model's own tokenizer",
            )


def _device(model: nn.Module) -> torch.device:
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    return device


class _Catcher(nn.Module):
    """Stands for a block, and keeps what it was called with."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The hidden states as they came."""
        self.caught = kwargs
        return hidden_states


@torch.no_grad()
def block_arguments(model: nn.Module, length: int, dtype: torch.dtype, device: torch.device) -> list[BlockArguments]:
    """What the decoder hands to each block beside the hidden states, for rows of `length` tokens without a cache.

    Positions, their rotations and masks of one row, which stand for all rows.
    """
    decoder = text_decoder(model)
    layers = decoder.layers
    states = torch.zeros(1, length, model.get_input_embeddings().weight.shape[1], dtype=dtype, device=_device(model))  # type: ignore[operator]
    catchers = nn.ModuleList(_Catcher() for _ in layers)  # type: ignore[union-attr]
    try:
        decoder.layers = catchers
        decoder(inputs_embeds=states, use_cache=False)
    finally:
        decoder.layers = layers
    return [{name: _moved(value, device) for name, value in one.caught.items()} for one in catchers]  # type: ignore[operator, union-attr]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(_moved(one, device) for one in value) if isinstance(value, tuple) else value


@dataclass(slots=True)
class ModuleCall:
    """What a module was called with; `rerun` calls it again on other hidden states."""

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def rerun(self, states_NSD: Tensor) -> Tensor:
        """The module's output, the first one if it has several."""
        if self.args:
            out = self.module(states_NSD, *self.args[1:], **(self.kwargs or {}))
        else:
            out = self.module(**{**(self.kwargs or {}), "hidden_states": states_NSD})
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first


@contextmanager
def recorded_calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, ModuleCall]]:
    """While it lasts, the last call of each module is kept under its name."""
    calls: dict[str, ModuleCall] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = ModuleCall(module, args, kwargs)

        return hook

    hooks = [one.register_forward_pre_hook(keep(name), with_kwargs=True) for name, one in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


# --- block_search
# One decoder block: scales of all its groups on the untouched weights, then folding, then clip limits.


# N rows  S sequence  D model width  I input channels  T tokens


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How to search. The defaults are the published way; everything else is measured against it.

    group_size:   input channels that share a scale of the INT4 weights.
    symmetric:    no zero points, as TensorRT-LLM wants it.
    scaling:      `activation` tries scales from activations alone, `duo` from activations and weights with the identity
                  kept, `both` all of these.
    clipping:     `published` limits all Linears but queries and keys, `all` those too, `none` leaves it out.
    image_weight: what a token of a picture counts where a token of text counts 1.
    dtype:        number type of the search; None is that of the model's weights.
    device:       where a block is searched; None is where it lies.
    batch_tokens: tokens that a module runs on at once: more is faster on a GPU and takes more memory.
    """

    group_size: int = 128
    symmetric: bool = False
    scaling: Scaling = "activation"
    clipping: Clipping = "published"
    image_weight: float = 1.0
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        problems = []
        for name, known in (("scaling", ("activation", "duo", "both")), ("clipping", ("none", "published", "all"))):
            if getattr(self, name) not in known:
                problems.append(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        if not (self.image_weight > 0 and math.isfinite(self.image_weight)):
            problems.append(f"image_weight {self.image_weight} must be above 0 and finite")
        if problems:
            raise ConfigError.collect("search", problems)

    def facts(self) -> dict[str, Any]:
        """What decides the result, for the result's own record."""
        names = ("group_size", "symmetric", "scaling", "clipping", "image_weight")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class SearchedBlock:
    """What was found, with the block's name before every name, and its full-precision output [N, S, D]."""

    found: AwqSearch
    output_NSD: Tensor


@torch.no_grad()
def search_block(
    name: str,
    block: nn.Module,
    groups: Sequence[ScaleGroup],
    states_NSD: Tensor,
    weights_NS: Tensor | None,
    arguments: BlockArguments,
    options: SearchOptions,
) -> SearchedBlock:
    """AwqSearch one block. `states_NSD` is its input, in the dtype and on the device of the search; it is not changed.

    Raises LayoutError naming the block when its activations are not finite.
    """
    work = working_copy(block, states_NSD)
    rows = _rows_at_once(states_NSD, options)
    output, inputs, calls = run_block(work, groups, states_NSD, arguments, rows)
    if not torch.isfinite(output).all():
        raise LayoutError(f"{name}: its activations are not finite in {states_NSD.dtype}; search in float32")
    scales = []
    chosen = {}
    for group in groups:
        if can_scale(group, work):
            chosen[group] = _search_group(work, group, inputs[group.linears[0]], weights_NS, calls, options, rows)
    samples = {group: _sample(inputs.pop(group.linears[0]), weights_NS) for group in groups}
    clips = []
    for group, choice in chosen.items():
        scale_I = choice.best.scale_I
        fold_scale(work.get_submodule(group.fold), [work.get_submodule(one) for one in group.linears], scale_I)
        samples[group] = (samples[group][0] / scale_I, samples[group][1])
        linears = tuple(f"{name}.{one}" for one in group.linears)
        scales.append(ChannelScale(f"{name}.{group.fold}", linears, scale_I.float(), _facts(choice)))
    for group in groups:
        inputs_TI, weights_T = samples.pop(group)
        if any(is_linear_clipped(linear, options.clipping) for linear in group.linears):
            moments_GKK = second_moments(inputs_TI, options.group_size, weights_T)
            for linear in (one for one in group.linears if is_linear_clipped(one, options.clipping)):
                limit = search_limits(work.get_submodule(linear).weight, moments_GKK, options.symmetric)  # type: ignore[arg-type]
                clips.append(WeightClip(f"{name}.{linear}", limit.float()))
    return SearchedBlock(AwqSearch(tuple(scales), tuple(clips)), output)


def rerun_block(block: nn.Module, states_NSD: Tensor, arguments: BlockArguments, options: SearchOptions) -> Tensor:
    """The output of a block that was searched before, the same to the last bit."""
    return run_block(working_copy(block, states_NSD), (), states_NSD, arguments, _rows_at_once(states_NSD, options))[0]


def working_copy(block: nn.Module, like: Tensor) -> nn.Module:
    """The block in another number type and place; the copy shares no memory with the model."""
    with torch.no_grad():
        work = copy.deepcopy(block).to(device=like.device, dtype=like.dtype).eval()
    for parameter in work.parameters():
        parameter.requires_grad_(False)
    return work


@torch.no_grad()
def run_block(
    work: nn.Module, groups: Sequence[ScaleGroup], states_NSD: Tensor, arguments: BlockArguments, rows: int
) -> tuple[Tensor, dict[str, Tensor], dict[str, ModuleCall]]:
    """The block on all rows, some at a time: its output, the input [N, S, I] of each group's first Linear by name, and
    how inspected modules were called. Without groups only the output is kept."""
    watched = {group.linears[0]: work.get_submodule(group.linears[0]) for group in groups}
    inspected = {group.inspect: work.get_submodule(group.inspect) for group in groups if group.inspect}
    output = torch.empty_like(states_NSD)
    inputs: dict[str, Tensor] = {}
    start = 0
    with recorded_calls({**watched, **inspected}) as calls:
        for some in states_NSD.split(rows):
            here = slice(start, start := start + len(some))
            output[here] = ModuleCall(work, (some,), arguments).rerun(some)
            for name in watched:
                piece = calls[name].args[0]
                if name not in inputs:
                    inputs[name] = piece.new_empty((len(states_NSD), *piece.shape[1:]))
                inputs[name][here] = piece
    return output, inputs, {name: calls[name] for name in inspected}


def _rows_at_once(states_NSD: Tensor, options: SearchOptions) -> int:
    return max(1, options.batch_tokens // states_NSD.shape[1])


def _search_group(
    work: nn.Module,
    group: ScaleGroup,
    inputs_NSI: Tensor,
    weights_NS: Tensor | None,
    calls: dict[str, ModuleCall],
    options: SearchOptions,
    rows: int,
) -> ScaleChoice:
    linears: list[Any] = [work.get_submodule(name) for name in group.linears]
    relative_I = None
    if options.scaling != "activation":
        relative_I = weight_magnitude([linear.weight for linear in linears], options.group_size)
    tried = candidates(mean_magnitude(inputs_NSI, weights_NS), relative_I, options.scaling)
    rounding = (options.group_size, options.symmetric)
    if group.inspect:
        loss = module_loss(linears, calls[group.inspect].rerun, inputs_NSI, weights_NS, *rounding, rows)
    else:
        loss = linear_loss(linears[0], inputs_NSI, weights_NS, *rounding)
    return search_scale(tried, loss)


def _sample(inputs_NSI: Tensor, weights_NS: Tensor | None) -> tuple[Tensor, Tensor | None]:
    inputs_TI, weights_T = sample_tokens(
        inputs_NSI.flatten(0, 1), None if weights_NS is None else weights_NS.flatten().to(inputs_NSI.device)
    )
    return inputs_TI.clone(), weights_T


def _facts(choice: ScaleChoice) -> dict[str, Any]:
    return {"ratio": choice.best.ratio, "duo": choice.best.duo, "losses": list(choice.losses)}


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
) -> AwqSearch:
    """AwqSearch all decoder blocks of a visual language model, or of an LLM alone; the model is not changed.

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
) -> AwqSearch:
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
) -> tuple[AwqSearch, BlockResumeState[AwqSearch] | None]:
    family = check_model(model, options.group_size)
    if not calibration.rows:
        raise DataError(f"calibration {calibration.name!r} holds no rows; give it text or conversations")
    blocks = decoder_blocks(model)
    states_NSD, weights_NS = _first_states(model, calibration, options, processor)
    arguments = block_arguments(model, states_NSD.shape[1], states_NSD.dtype, states_NSD.device)
    facts = {
        "version": VERSION,
        "family": family.model_type,
        "dtype": str(states_NSD.dtype).removeprefix("torch."),
        "blocks": len(blocks),
        "calibration": calibration.facts(),
        **options.facts(),
    }
    kept = None if keep is None else BlockResumeState(keep, facts, states_NSD, read_search_block, write_search_block)
    parts = []
    with task(events, "search", len(blocks), "blocks"):
        for index, (block, call) in enumerate(zip(blocks, arguments, strict=True)):
            found = kept.enter(index, block) if kept is not None else None
            if found is None:
                name = block_name(index)
                done = search_block(name, block, family.scale_groups, states_NSD, weights_NS, call, options)
                if kept is not None:
                    kept.save(index, done.found)
            else:
                done = SearchedBlock(found, rerun_block(block, states_NSD, call, options))
            states_NSD = done.output_NSD
            parts.append(done.found)
            events.advanced("search", 1, **_shown(done.found))
    return join_searches(parts, facts), kept


def _first_states(
    model: nn.Module, calibration: Calibration, options: SearchOptions, processor: Any
) -> tuple[Tensor, Tensor | None]:
    """The rows in the number type and the place of the search, and the weights of their tokens."""
    first = next(decoder_blocks(model)[0].parameters())
    dtype, device = options.dtype or first.dtype, options.device or first.device
    states_NSD, weights_NS = embed_rows(model, calibration, processor, options.image_weight)
    return states_NSD.to(device=device, dtype=dtype), None if weights_NS is None else weights_NS.to(device)


def _shown(found: AwqSearch) -> dict[str, float | str]:
    """The error of the block's scaled groups, as a share of what plain rounding leaves."""
    shares = [min(scale.facts["losses"]) / max(scale.facts["losses"][0], 1e-30) for scale in found.scales]
    return {"error_left": sum(shares) / len(shares)} if shares else {}
