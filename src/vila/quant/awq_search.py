"""AWQ search over a model, block by block: channel scales and clip limits from calibration activations.

Memory besides the model: one block in the dtype of the search, the trial weights of one scale group, and per token the
block's input and output, the inputs of its scale groups and the output of the inspected module.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vila.core.errors import DataError, LayoutError
from vila.core.progress import SILENT, Events, task
from vila.families import ScaleGroup
from vila.quant.apply import fold_scale
from vila.quant.awq_cache import AwqSearch, ChannelScale, WeightClip, join_searches
from vila.quant.awq_scale import (
    ScaleChoice,
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
from vila.quant.blocks import (
    block_name,
    can_scale,
    check_layers,
    check_weights,
    decoder_blocks,
    family_of,
    text_decoder,
)
from vila.quant.calibration import Calibration
from vila.quant.quant_config import QuantConfig
from vila.quant.resume_state import BlockResumeState, read_search_block, write_search_block

# N sequences  S sequence length  D model width  I input channels  T tokens

VERSION = 1
"""Increased when the same settings give another result; resume state of another version is rejected."""

BlockArguments = Mapping[str, Any]
"""Keyword arguments of a decoder block besides the hidden states."""


@torch.no_grad()
def embed_sequences(
    model: nn.Module, calibration: Calibration, processor: Any = None, image_weight: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Return the decoder's input embeddings [N, S, D] and token weights [N, S]; None if all weights are 1.

    Shorter sequences are padded on the right, where causal attention ignores it; padding has weight 0.
    processor:    turns images into pixels; required only with images.
    image_weight: weight of an image token.
    """
    width = max(len(sequence.ids) for sequence in calibration.sequences)
    states, weights = [], []
    for sequence in calibration.sequences:
        ids_1S = torch.tensor([sequence.ids], device=_device(model))
        is_image_1S = torch.zeros_like(ids_1S, dtype=torch.bool)
        if sequence.media:
            is_image_1S = ids_1S.eq(model.config.image_token_id)  # type: ignore[union-attr, arg-type]
        state_1SD = _embed(model, ids_1S, sequence.media, processor)
        gap = width - len(sequence.ids)
        states.append(nn.functional.pad(state_1SD, (0, 0, 0, gap)))
        weights.append(nn.functional.pad(torch.where(is_image_1S, image_weight, 1.0), (0, gap)))
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
    for number, sequence in enumerate(calibration.sequences):
        placeholder = model.config.image_token_id if sequence.media else None  # type: ignore[union-attr]
        if wrong := [one for one in sequence.ids if not 0 <= one < vocab and one != placeholder]:
            raise DataError(
                file=calibration.name,
                record=f"sequence {number}",
                field="ids",
                value=wrong[0],
                expected=f"token ids below {vocab}",
                hint="calibrate with the model's own tokenizer",
            )


def _device(model: nn.Module) -> torch.device:
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    return device


class _Catcher(nn.Module):
    """Replaces a decoder block and records its keyword arguments."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Return the hidden states unchanged."""
        self.caught = kwargs
        return hidden_states


@torch.no_grad()
def block_arguments(model: nn.Module, length: int, dtype: torch.dtype, device: torch.device) -> list[BlockArguments]:
    """Return the arguments that the decoder passes to each block for sequences of `length` tokens, without a cache.

    Position ids, rotary embeddings and masks have batch size 1 and broadcast over all sequences.
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
    """Arguments of a module's call; `rerun` repeats it with other hidden states."""

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def rerun(self, states_NSD: Tensor) -> Tensor:
        """Return the module's output; the first one if it has several."""
        if self.args:
            out = self.module(states_NSD, *self.args[1:], **(self.kwargs or {}))
        else:
            out = self.module(**{**(self.kwargs or {}), "hidden_states": states_NSD})
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first


@contextmanager
def recorded_calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, ModuleCall]]:
    """Record the last call of each module by name."""
    calls: dict[str, ModuleCall] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = ModuleCall(module, args, kwargs)

        return hook

    hooks = [one.register_forward_pre_hook(record(name), with_kwargs=True) for name, one in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def search_block(
    name: str,
    block: nn.Module,
    groups: Sequence[ScaleGroup],
    states_NSD: Tensor,
    weights_NS: Tensor | None,
    arguments: BlockArguments,
    config: QuantConfig,
) -> tuple[AwqSearch, Tensor]:
    """Search one block: the scales of all its groups on the original weights, then folding, then clip limits.

    states_NSD: input of the block, in the dtype and on the device of the search.
    Returns the result, with full names, and the full-precision output of the block [N, S, D].
    Raises LayoutError naming the block if its activations are not finite.
    """
    work = working_copy(block, states_NSD)
    batch = config.batch_sequences(states_NSD.shape[1])
    output, inputs, calls = run_block(work, groups, states_NSD, arguments, batch)
    if not torch.isfinite(output).all():
        raise LayoutError(f"its activations are not finite in {states_NSD.dtype}", field=name, hint="search in float32")
    scales = []
    chosen = {}
    for group in groups:
        if can_scale(group, work):
            chosen[group] = _search_group(work, group, inputs[group.linears[0]], weights_NS, calls, config, batch)
    samples = {group: _sample(inputs.pop(group.linears[0]), weights_NS) for group in groups}
    clips = []
    for group, choice in chosen.items():
        scale_I = choice.best.scale_I
        fold_scale(work.get_submodule(group.fold), [work.get_submodule(one) for one in group.linears], scale_I)
        samples[group] = (samples[group][0] / scale_I, samples[group][1])
        linears = tuple(f"{name}.{one}" for one in group.linears)
        metadata = {"ratio": choice.best.ratio, "duo": choice.best.duo, "losses": list(choice.losses)}
        scales.append(ChannelScale(f"{name}.{group.fold}", linears, scale_I.float(), metadata))
    for group in groups:
        inputs_TI, weights_T = samples.pop(group)
        if any(is_linear_clipped(linear, config.clipping) for linear in group.linears):
            moments_GKK = second_moments(inputs_TI, config.group_size, weights_T)
            for linear in (one for one in group.linears if is_linear_clipped(one, config.clipping)):
                limit = search_limits(work.get_submodule(linear).weight, moments_GKK, config.symmetric)  # type: ignore[arg-type]
                clips.append(WeightClip(f"{name}.{linear}", limit.float()))
    return AwqSearch(tuple(scales), tuple(clips)), output


def working_copy(block: nn.Module, like: Tensor) -> nn.Module:
    """Return a copy of the block with dtype and device of `like`; it shares no memory with the model."""
    with torch.no_grad():
        work = copy.deepcopy(block).to(device=like.device, dtype=like.dtype).eval()
    for parameter in work.parameters():
        parameter.requires_grad_(False)
    return work


@torch.no_grad()
def run_block(
    work: nn.Module, groups: Sequence[ScaleGroup], states_NSD: Tensor, arguments: BlockArguments, batch: int
) -> tuple[Tensor, dict[str, Tensor], dict[str, ModuleCall]]:
    """Run the block on all sequences, `batch` at a time.

    Returns its output, the input [N, S, I] of each group's first Linear by name, and the last call of each inspected
    module by name.
    """
    observed = {group.linears[0]: work.get_submodule(group.linears[0]) for group in groups}
    inspected = {group.inspect: work.get_submodule(group.inspect) for group in groups if group.inspect}
    output = torch.empty_like(states_NSD)
    inputs: dict[str, Tensor] = {}
    start = 0
    with recorded_calls({**observed, **inspected}) as calls:
        for some in states_NSD.split(batch):
            here = slice(start, start := start + len(some))
            output[here] = ModuleCall(work, (some,), arguments).rerun(some)
            for name in observed:
                piece = calls[name].args[0]
                if name not in inputs:
                    inputs[name] = piece.new_empty((len(states_NSD), *piece.shape[1:]))
                inputs[name][here] = piece
    return output, inputs, {name: calls[name] for name in inspected}


def _search_group(
    work: nn.Module,
    group: ScaleGroup,
    inputs_NSI: Tensor,
    weights_NS: Tensor | None,
    calls: dict[str, ModuleCall],
    config: QuantConfig,
    batch: int,
) -> ScaleChoice:
    linears: list[Any] = [work.get_submodule(name) for name in group.linears]
    relative_I = None
    if config.scaling != "activation":
        relative_I = weight_magnitude([linear.weight for linear in linears], config.group_size)
    tried = candidates(mean_magnitude(inputs_NSI, weights_NS), relative_I, config.scaling)
    rounding = (config.group_size, config.symmetric)
    if group.inspect:
        loss = module_loss(linears, calls[group.inspect].rerun, inputs_NSI, weights_NS, *rounding, batch)
    else:
        loss = linear_loss(linears[0], inputs_NSI, weights_NS, *rounding)
    return search_scale(tried, loss)


def _sample(inputs_NSI: Tensor, weights_NS: Tensor | None) -> tuple[Tensor, Tensor | None]:
    inputs_TI, weights_T = sample_tokens(
        inputs_NSI.flatten(0, 1), None if weights_NS is None else weights_NS.flatten().to(inputs_NSI.device)
    )
    return inputs_TI.clone(), weights_T


@torch.no_grad()
def search_model(
    model: nn.Module,
    calibration: Calibration,
    config: QuantConfig,
    *,
    processor: Any = None,
    resume_dir: Path | None = None,
    events: Events = SILENT,
) -> AwqSearch:
    """Run the AWQ search over all decoder blocks of a visual language model or an LLM, which is not changed.

    processor:  of the model; required if the calibration has images.
    resume_dir: directory for the results of finished blocks. After an interruption the same call resumes, with the same
                result to the last bit.
    Raises the errors of `check_layers`, `check_weights` and `check_ids`; CheckpointError if `resume_dir` belongs to
    another search.
    """
    check_layers(model, config.group_size)
    check_weights(model)
    check_ids(model, calibration)
    if not calibration.sequences:
        raise DataError("contains no calibration sequences", file=calibration.name, hint="add text or conversations")
    family, blocks = family_of(model), decoder_blocks(model)
    parameter = next(blocks[0].parameters())
    dtype, device = config.dtype or parameter.dtype, config.device or parameter.device
    states_NSD, weights_NS = embed_sequences(model, calibration, processor, config.image_weight)
    states_NSD = states_NSD.to(device=device, dtype=dtype)
    weights_NS = None if weights_NS is None else weights_NS.to(device)
    arguments = block_arguments(model, states_NSD.shape[1], dtype, device)
    settings = {
        "version": VERSION,
        "family": family.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "blocks": len(blocks),
        "calibration": calibration.metadata(),
        **config.search_settings(),
    }
    state = BlockResumeState(resume_dir, settings, states_NSD, read_search_block, write_search_block)
    parts = []
    with task(events, "search", len(blocks), "blocks"):
        for index, (block, block_args) in enumerate(zip(blocks, arguments, strict=True)):
            found = state.enter(index, block)
            if found is None:
                found, states_NSD = search_block(
                    block_name(index), block, family.scale_groups, states_NSD, weights_NS, block_args, config
                )
                state.save(index, found)
            else:
                # The block was searched before: its output is the same to the last bit.
                work, batch = working_copy(block, states_NSD), config.batch_sequences(states_NSD.shape[1])
                states_NSD = run_block(work, (), states_NSD, block_args, batch)[0]
            parts.append(found)
            events.advanced("search", 1, **_displayed(found))
    return join_searches(parts, settings)


def _displayed(found: AwqSearch) -> dict[str, float | str]:
    """Return the block's output error after scaling, relative to that of plain rounding."""
    losses = [scale.metadata["losses"] for scale in found.scales]
    relative = [min(one) / max(one[0], 1e-30) for one in losses]
    return {"error_left": sum(relative) / len(relative)} if relative else {}
