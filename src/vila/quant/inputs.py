"""What a block is searched on: the calibration rows as hidden states, and the rest of what blocks are called with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vila.core.errors import DataError
from vila.quant.blocks import decoder_of
from vila.quant.calibrate import Calibration

# N rows  S sequence  D model width  I input channels

Arguments = Mapping[str, Any]


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
def block_arguments(model: nn.Module, length: int, dtype: torch.dtype, device: torch.device) -> list[Arguments]:
    """What the decoder hands to each block beside the hidden states, for rows of `length` tokens without a cache.

    Positions, their rotations and masks of one row, which stand for all rows.
    """
    decoder = decoder_of(model)
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
class Call:
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
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Call]]:
    """While it lasts, the last call of each module is kept under its name."""
    calls: dict[str, Call] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = Call(module, args, kwargs)

        return hook

    hooks = [one.register_forward_pre_hook(keep(name), with_kwargs=True) for name, one in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
