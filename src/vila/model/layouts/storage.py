"""How the writers of layouts store weights: as they are, or the decoder's blocks in 4 bits and all else in float16."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vila.core.errors import LayoutError
from vila.kernels.int4_layout import Int4Weight
from vila.model.int4 import int4_layers
from vila.model.weights import state_of
from vila.model.written import Writable, in_half, write_weights

Pack = Callable[[Int4Weight], Mapping[str, Writable]]


@dataclass(frozen=True)
class Storage:
    """One way to store a model's weights.

    pack:  the tensors of one 4-bit Linear by the endings of their names; None stores full precision.
    facts: `quantization_config` of config.json; empty for none.
    save:  writes the LLM's weights into a directory.
    """

    pack: Pack | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    save: Callable[[Mapping[str, Writable], Path], None] = write_weights

    def check(self, model: Any) -> None:
        """Raise LayoutError for a model in 4 bits that is to be stored in full precision."""
        layers = dict(int4_layers(model))
        if self.pack is None and layers:
            raise LayoutError(
                f"{len(layers)} Linears of the model are in 4 bits, which this layout does not hold; use awq-hf or "
                "tinychat, or turn them into ordinary ones with vila convert --dequantize"
            )

    def state(self, model: Any) -> dict[str, Any]:
        """Return the weights of a model, or of its LLM, by their published names, as stored but for `stored`.

        Raises LayoutError as `check`.
        """
        self.check(model)
        layers = dict(int4_layers(model))
        out: dict[str, Any] = {}
        for name, tensor in state_of(model).items():
            path, _, leaf = name.rpartition(".")
            if path not in layers or leaf == "bias":
                out[name] = tensor
            elif leaf == "codes" and self.pack is not None:
                out |= {f"{path}.{ending}": part for ending, part in self.pack(layers[path].weight).items()}
        return out

    def stored(self, tensors: Mapping[str, Writable]) -> dict[str, Writable]:
        """Tensors in the type that the file has: float16 beside 4-bit ones, which their readers compute in."""
        return dict(tensors) if self.pack is None else in_half(tensors)

    def config(self, model: Any) -> Any:
        """The model's config, which says the type of the file; the model's own stays as it is."""
        config = copy.deepcopy(model.config)
        # A model that was never loaded says nothing of its type.
        config.dtype = config.dtype or model.dtype
        if self.pack is not None:
            for part in (config, config.text_config, config.vision_config):
                part.dtype = torch.float16
        return config


FULL = Storage()
"""Every weight in its own type."""
