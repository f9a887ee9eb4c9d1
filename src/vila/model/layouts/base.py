"""`CheckpointFiles`, `Checkpoint`, the `ModelLayout` protocol, and what layouts share.

Layouts share the mapping of weight names and the storage of weights.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vila.core.errors import LayoutError
from vila.core.files import atomic_path
from vila.core.reading import Fields
from vila.model.int4_weights import PackedWeight, int4_layers
from vila.model.settings import ModelSettings
from vila.model.weights import TensorRef, published_state_dict

if TYPE_CHECKING:
    import torch

    from vila.kernels.int4 import Int4Weight
    from vila.model.config import VilaConfig
    from vila.model.dtypes import DType
    from vila.model.processor import VilaProcessor
    from vila.model.save_weights import Writable


@dataclass(frozen=True)
class Sources:
    """JSON objects that a checkpoint's config was read from, for error messages.

    model, text, vision: of the whole model, its LLM and its vision tower.
    names:               keys of `model` by our field names, where they differ.
    """

    model: Fields
    text: Fields
    vision: Fields
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ProcessorFiles:
    """Files and settings of a model's processor.

    folder:         directory of the tokenizer.
    vision_spec:    a VisionSpec as a dict.
    load_tokenizer: reads the tokenizer with transformers, and returns it with the image placeholder id.
    """

    folder: Path
    vision_spec: dict[str, Any]
    template: str
    load_tokenizer: Callable[[], tuple[Any, int]]

    def load(self) -> VilaProcessor:
        """Read the tokenizer and build the processor. Raises LayoutError as `read_tokenizer`."""
        from vila.model.processor import VilaProcessor

        tokenizer, image_token_id = self.load_tokenizer()
        return VilaProcessor(tokenizer, self.vision_spec, self.template, image_token_id)


def no_fields() -> Sources:
    """Return empty sources."""
    return Sources(*[Fields({}, "config.json", error=LayoutError)] * 3)


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint; configs are plain values, so that no library that takes seconds to import is needed.

    The other fields are those of `Checkpoint`.
    """

    folder: Path
    settings: ModelSettings
    processor: ProcessorFiles
    tensors: Mapping[str, TensorRef]
    sources: Sources = field(default_factory=no_fields)
    unexpected: Sequence[str] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    int4: Mapping[str, PackedWeight] = field(default_factory=dict)

    def load(self) -> Checkpoint:
        """Build config and processor. Raises LayoutError for values and files that transformers rejects."""
        from vila.model.config import build_vila_config

        processor = self.processor.load()
        placeholder = self.settings.image_token_id
        config = build_vila_config(self.settings, processor.image_token_id if placeholder is None else placeholder)
        values = {name: value for name, value in vars(self).items() if name not in ("settings", "processor")}
        return Checkpoint(config=config, processor=processor, **values)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose configs have been read and whose weights have not.

    tensors:    location of each weight, by our names.
    unexpected: tensors in its files with unknown names; loading fails on them.
    generation: content of generation_config.json.
    int4:       4-bit weights by Linear name; they are not among `tensors`.
    """

    folder: Path
    config: VilaConfig
    processor: VilaProcessor
    tensors: Mapping[str, TensorRef]
    sources: Sources = field(default_factory=no_fields)
    unexpected: Sequence[str] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    int4: Mapping[str, PackedWeight] = field(default_factory=dict)

    @cached_property
    def main_dtype(self) -> torch.dtype:
        """Floating-point dtype of most weights that are not INT4, by bytes."""
        sizes: Counter[DType] = Counter()
        for ref in self.tensors.values():
            if ref.dtype.is_floating_point:
                sizes[ref.dtype] += ref.bytes
        return sizes.most_common(1)[0][0].torch


class ReadLayout(Protocol):
    """A directory format that can be detected and opened."""

    name: str

    def matches(self, folder: Path) -> bool:
        """Return whether the directory has this layout; reads only file names and configs."""

    def open(self, folder: Path, base: Path | None = None) -> CheckpointFiles:
        """Read configs and weight locations. `base` is the directory of the base LLM, for layouts that need one.

        Raises LayoutError for missing, unknown or contradictory values and files.
        """


class ModelLayout(ReadLayout, Protocol):
    """A layout that can also be written."""

    def check(self, model: Any, processor: VilaProcessor) -> None:
        """Raise LayoutError if the layout cannot represent the model, whose weights may be on the meta device."""

    def write(self, model: Any, processor: VilaProcessor, folder: Path) -> None:
        """Write a directory atomically, replacing an existing one. Raises LayoutError as `check`."""


Prefixes = Sequence[tuple[str, str]]
"""Pairs (layout's prefix, our prefix). The first match wins, so longer prefixes come first."""

# Buffers that old versions of transformers saved; modules compute them.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "embeddings.position_ids")


def to_layout_name(name: str, prefixes: Prefixes) -> str:
    """Return a layout's name of our weight. Raises LayoutError if the layout has none."""
    for prefix, ours in sorted(prefixes, key=lambda pair: -len(pair[1])):
        if name.startswith(ours):
            return prefix + name[len(ours) :]
    raise LayoutError("this layout cannot store the weight", field=name)


def map_names(
    refs: Mapping[str, TensorRef], prefixes: Prefixes, ignore: Sequence[str] = ()
) -> tuple[dict[str, TensorRef], list[str]]:
    """Return tensors by our names, and the names that no prefix matches. `ignore`: prefixes of tensors to skip.

    Raises LayoutError if two tensors map to one name.
    """
    mapped: dict[str, TensorRef] = {}
    unmatched = []
    for name, ref in refs.items():
        if name.endswith(_IGNORED_SUFFIXES) or name.startswith(tuple(ignore)):
            continue
        target = next((ours + name[len(prefix) :] for prefix, ours in prefixes if name.startswith(prefix)), None)
        if target is None:
            unmatched.append(name)
        elif target in mapped:
            raise LayoutError(f"the same weight as {mapped[target].name}", file=ref.file.path, field=name)
        else:
            mapped[target] = ref
    return mapped, unmatched


def keep_rows(ref: TensorRef, rows: int) -> TensorRef:
    """Return the first `rows` rows of a weight. Raises LayoutError if it has fewer."""
    if not ref.shape or ref.shape[0] < rows:
        raise _shape_error(ref, f"at least {rows} rows")
    return ref.then(lambda tensor: tensor[:rows], (rows, *ref.shape[1:]))


def split_qkv(ref: TensorRef, index: int) -> TensorRef:
    """Return query (0), key (1) or value (2) of a fused weight [3 * rows, ...].

    Raises LayoutError if the number of rows is not a multiple of three.
    """
    if not ref.shape or ref.shape[0] % 3:
        raise _shape_error(ref, "a multiple of three rows")
    rows = ref.shape[0] // 3
    return ref.then(lambda tensor: tensor[index * rows : (index + 1) * rows], (rows, *ref.shape[1:]))


def _shape_error(ref: TensorRef, expected: str) -> LayoutError:
    return LayoutError("", file=ref.file.path, field=ref.name, value=list(ref.shape), expected=expected)


Pack = Callable[["Int4Weight"], Mapping[str, "Writable"]]


def _write_weights(tensors: Mapping[str, Writable], folder: Path) -> None:
    from vila.model.save_weights import write_weights

    write_weights(tensors, folder)


@dataclass(frozen=True)
class WeightStorage:
    """How a layout stores weights: in full precision, or decoder blocks in 4 bits and all other weights in float16.

    pack:                packed tensors of a 4-bit Linear by name suffix; None stores full precision.
    quantization_config: entry of config.json; empty for none.
    save:                writes the LLM's weights into a directory.
    """

    pack: Pack | None = None
    quantization_config: Mapping[str, Any] = field(default_factory=dict)
    save: Callable[[Mapping[str, Writable], Path], None] = _write_weights

    def check(self, model: Any) -> None:
        """Raise LayoutError for a 4-bit model that is to be stored in full precision."""
        layers = dict(int4_layers(model))
        if self.pack is None and layers:
            raise LayoutError(
                f"the layout has no 4-bit weights, but {len(layers)} Linears of the model are in 4 bits",
                hint="use awq-hf or tinychat, or dequantize the model with vila convert --dequantize",
            )

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return the weights of a model, or of its LLM, by published name, before `cast`.

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
        """Cast tensors to the dtype of the file: float16 alongside 4-bit weights, else unchanged."""
        from vila.model.save_weights import as_float16

        return dict(tensors) if self.pack is None else as_float16(tensors)

    def config(self, model: Any) -> Any:
        """Return a copy of the model's config with the dtype of the file."""
        config = copy.deepcopy(model.config)
        # The dtype of a model that was not loaded from files is unset.
        config.dtype = config.dtype or model.dtype
        if self.pack is not None:
            import torch

            for part in (config, config.text_config, config.vision_config):
                part.dtype = torch.float16
        return config


FULL_PRECISION = WeightStorage()
"""Every weight in its own dtype."""


class FullPrecisionLayout:
    """Skeleton of a layout with full-precision weights, whose files a 4-bit layout may write with its own storage."""

    def check_writable(self, config: Any, processor: VilaProcessor) -> None:
        """Raise LayoutError for a config that programs which read the layout do not support."""

    def write_files(self, model: Any, processor: VilaProcessor, part: Path, storage: WeightStorage) -> None:
        """Write all files into the empty directory `part`."""
        raise NotImplementedError

    def supports(self, config: Any, processor: VilaProcessor) -> bool:
        """Return whether `check_writable` accepts a config."""
        try:
            self.check_writable(config, processor)
        except LayoutError:
            return False
        return True

    def check(self, model: Any, processor: VilaProcessor) -> None:
        """Raise LayoutError as `check_writable`, and for a 4-bit model."""
        self.check_writable(model.config, processor)
        FULL_PRECISION.check(model)

    def write(
        self, model: Any, processor: VilaProcessor, folder: Path, storage: WeightStorage = FULL_PRECISION
    ) -> None:
        """Write a directory atomically, replacing an existing one. Raises LayoutError as `check_writable`."""
        self.check_writable(model.config, processor)
        with atomic_path(folder) as part:
            part.mkdir()
            self.write_files(model, processor, part, storage)


DECODER_BLOCKS = "language_model.model.layers."
_KEY = "quantization_config"


def checkpoint_with_int4(
    checkpoint: CheckpointFiles, refs: Mapping[str, TensorRef], packed: Mapping[str, PackedWeight], folder: Path
) -> CheckpointFiles:
    """Return the checkpoint with the given tensors and 4-bit weights.

    Raises LayoutError if there is no 4-bit weight, or one outside the decoder blocks.
    """
    if not packed:
        hint = f"remove {_KEY} from config.json if the weights are in 16 bits, else download the checkpoint again"
        raise LayoutError("no .qweight tensors in a 4-bit checkpoint", file=folder, hint=hint)
    check_int4_names(packed, folder)
    return replace(checkpoint, folder=folder, tensors=refs, int4=packed)


def check_int4_names(names: Iterable[str], folder: Path) -> None:
    """Raise LayoutError for 4-bit Linears outside the decoder blocks."""
    if wrong := sorted(name for name in names if not name.startswith(DECODER_BLOCKS)):
        problem = "4-bit weights outside the LLM's decoder blocks"
        hint = "quantize the 16-bit model with vila quantize"
        raise LayoutError(problem, file=folder, field=", ".join(wrong[:5]), hint=hint)
