"""What a checkpoint layout can do, and the table of those that exist."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from vila.core.errors import LayoutError
from vila.core.reading import Fields
from vila.kernels.int4 import Int4Weight
from vila.model.config import VilaConfig
from vila.model.int4_weights import PackedWeight, int4_layers
from vila.model.processor import VilaProcessor
from vila.model.save_weights import Writable, as_float16, write_weights
from vila.model.weights import TensorRef, published_state_dict


@dataclass(frozen=True)
class Sources:
    """Objects of config files that the config of a checkpoint was read from, for errors.

    model, text, vision: of the whole model, of its LLM and of its vision tower.
    names:               keys of `model` by our names of fields, where they differ.
    """

    model: Fields
    text: Fields
    vision: Fields
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose configs are read and whose weights are not.

    pieces:     location of each weight, by our names.
    unclaimed:  tensors of its files with unknown names; loading refuses them.
    generation: content of generation_config.json, for `model.generate`.
    int4:       weights of Linears that are in 4 bits, by our names of the Linears; they are not among the pieces.
    """

    folder: Path
    config: VilaConfig
    processor: VilaProcessor
    tensors: Mapping[str, TensorRef]
    sources: Sources = field(default_factory=lambda: Sources(*[Fields({}, "config.json", error=LayoutError)] * 3))
    unexpected: Sequence[str] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    int4: Mapping[str, PackedWeight] = field(default_factory=dict)


class ReadLayout(Protocol):
    """Recognises a directory and understands it as a checkpoint of ours."""

    name: str

    def matches(self, folder: Path) -> bool:
        """Whether the directory is in this layout; looks at names and config only."""

    def open(self, folder: Path, base: Path | None = None) -> Checkpoint:
        """Understand the directory without reading tensors. `base` holds the LLM where the directory does not.

        Raises LayoutError naming what is missing, unknown or contradictory.
        """


class ModelLayout(ReadLayout, Protocol):
    """A layout in which models of ours can also be written."""

    def check(self, model: Any, processor: VilaProcessor) -> None:
        """Raise LayoutError for what the layout cannot express; the weights may be on the meta device."""

    def write(self, model: Any, processor: VilaProcessor, folder: Path) -> None:
        """Write atomically, replacing a directory. Raises LayoutError as `check`."""


# --- names
# Foreign names of weights and ours, as pairs of prefixes that work in both directions.


Prefixes = Sequence[tuple[str, str]]
"""Pairs (foreign, ours). The first that fits is taken, so longer ones come first."""

# Buffers that old versions of transformers saved; every module computes them itself.
_HARMLESS = ("rotary_emb.inv_freq", "embeddings.position_ids")


def to_native_name(name: str, prefixes: Prefixes) -> str | None:
    """Our name of a foreign weight, None when no prefix fits."""
    return next((ours + name[len(theirs) :] for theirs, ours in prefixes if name.startswith(theirs)), None)


def to_layout_name(name: str, prefixes: Prefixes) -> str:
    """The foreign name of a weight of ours. Raises LayoutError when the layout has no place for it."""
    for theirs, ours in sorted(prefixes, key=lambda pair: -len(pair[1])):
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise LayoutError(f"this layout has no place for the weight {name}")


def map_names(
    pieces: Mapping[str, TensorRef], prefixes: Prefixes, ignore: Iterable[str] = ()
) -> tuple[dict[str, TensorRef], list[str]]:
    """Pieces by our names, and the foreign names that nothing claims. `ignore`: prefixes that are known and not needed.

    Raises LayoutError when two foreign weights map_names one of ours.
    """
    ours: dict[str, TensorRef] = {}
    unclaimed = []
    skipped = tuple(ignore)
    for name, piece in pieces.items():
        if name.endswith(_HARMLESS) or (skipped and name.startswith(skipped)):
            continue
        target = to_native_name(name, prefixes)
        if target is None:
            unclaimed.append(name)
        elif target in ours:
            raise LayoutError(f"{piece.file.path}: both {ours[target].name} and {name} stand for {target}")
        else:
            ours[target] = piece
    return ours, unclaimed


def keep_rows(piece: TensorRef, rows: int) -> TensorRef:
    """Return the first `rows` rows of a weight. Raises LayoutError if it has fewer."""
    if not piece.shape or piece.shape[0] < rows:
        raise _shape_error(piece, f"at least {rows} rows")
    return replace(
        piece, shape=(rows, *piece.shape[1:]), transform=_then(piece.transform, lambda tensor: tensor[:rows])
    )


def split_qkv(piece: TensorRef, number: int) -> TensorRef:
    """Return query, key or value from a weight that holds all three, one below the other.

    Raises LayoutError unless its rows can be divided by three.
    """
    if not piece.shape or piece.shape[0] % 3:
        raise _shape_error(piece, "rows of query, key and value")
    rows = piece.shape[0] // 3
    start = number * rows

    def cut(tensor):
        return tensor[start : start + rows]

    return replace(piece, shape=(rows, *piece.shape[1:]), transform=_then(piece.transform, cut))


def _shape_error(piece: TensorRef, expected: str) -> LayoutError:
    return LayoutError("", file=piece.file.path, field=piece.name, value=list(piece.shape), expected=expected)


def _then(first: Callable | None, second: Callable) -> Callable:
    return second if first is None else lambda tensor: second(first(tensor))


# --- storage
# How the writers of layouts store weights: as they are, or the decoder's blocks in 4 bits and all else in float16.


Pack = Callable[[Int4Weight], Mapping[str, Writable]]


@dataclass(frozen=True)
class WeightStorage:
    """One way to store a model's weights.

    pack:  the tensors of one 4-bit Linear by the endings of their names; None stores full precision.
    facts: `quantization_config` of config.json; empty for none.
    save:  writes the LLM's weights into a directory.
    """

    pack: Pack | None = None
    quantization_config: Mapping[str, Any] = field(default_factory=dict)
    save: Callable[[Mapping[str, Writable], Path], None] = write_weights

    def check(self, model: Any) -> None:
        """Raise LayoutError for a model in 4 bits that is to be stored in full precision."""
        layers = dict(int4_layers(model))
        if self.pack is None and layers:
            raise LayoutError(
                f"{len(layers)} Linears of the model are in 4 bits, which this layout does not hold; use awq-hf or "
                "tinychat, or turn them into ordinary ones with vila convert --dequantize"
            )

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return the weights of a model, or of its LLM, by their published names, as stored but for `stored`.

        Raises LayoutError as `check`.
        """
        self.check(model)
        layers = dict(int4_layers(model))
        out: dict[str, Any] = {}
        for name, tensor in published_state_dict(model).items():
            path, _, leaf = name.rpartition(".")
            if path not in layers or leaf == "bias":
                out[name] = tensor
            elif leaf == "codes" and self.pack is not None:
                out |= {f"{path}.{ending}": part for ending, part in self.pack(layers[path].weight).items()}
        return out

    def cast(self, tensors: Mapping[str, Writable]) -> dict[str, Writable]:
        """Tensors in the type that the file has: float16 beside 4-bit ones, which their readers compute in."""
        return dict(tensors) if self.pack is None else as_float16(tensors)

    def config(self, model: Any) -> Any:
        """The model's config, which says the type of the file; the model's own stays as it is."""
        config = copy.deepcopy(model.config)
        # A model that was never loaded says nothing of its type.
        config.dtype = config.dtype or model.dtype
        if self.pack is not None:
            for part in (config, config.text_config, config.vision_config):
                part.dtype = torch.float16
        return config


FULL_PRECISION = WeightStorage()
"""Every weight in its own type."""


# --- int4_pieces
# From a checkpoint that was understood as one of full precision to one whose decoder blocks are in 4 bits.


DECODER_BLOCKS = "language_model.model.layers."
_KEY = "quantization_config"


def checkpoint_with_int4(
    checkpoint: Checkpoint, pieces: Mapping[str, TensorRef], packed: Mapping[str, PackedWeight], folder: Path
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
    check_int4_names(packed, folder)
    for config in (checkpoint.config, checkpoint.config.text_config):
        if hasattr(config, _KEY):
            delattr(config, _KEY)
    return replace(checkpoint, folder=folder, tensors=pieces, int4=packed)


def check_int4_names(names: Iterable[str], folder: Path) -> None:
    """Raises LayoutError for Linears in 4 bits that are not in the decoder's blocks."""
    if wrong := sorted(name for name in names if not name.startswith(DECODER_BLOCKS)):
        raise LayoutError(
            "in 4 bits",
            file=folder,
            field=", ".join(wrong[:5]),
            expected="4 bits in Linears of the LLM's blocks alone",
            hint="quantize the 16-bit model with vila quantize",
        )
