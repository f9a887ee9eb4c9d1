"""A checkpoint as exports read it: weight by weight and in runs of rows, so that no more than one is ever in memory.

The scales and limits of a search are applied on the way, with the very arithmetic of `quant.apply`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.core.progress import SILENT, Events
from vila.families import Family, find_family
from vila.kernels.int4 import SYMMETRIC_ZERO, Int4Weight, dequantize, quantize
from vila.model.config import VilaConfig
from vila.model.int4_weights import PackedWeight, read_packed
from vila.model.layouts.base import Checkpoint
from vila.model.loading import open_checkpoint
from vila.model.processor import VilaProcessor
from vila.model.save_weights import SHARD_BYTES, TensorSpecs, num_bytes, plan_file, plan_shards
from vila.model.weights import SINGLE_FILES, ReadTensor, TensorRef, TorchFile
from vila.quant.awq_cache import AwqSearch, read_search

# --- fold
# A search's scales and limits as changes of single weights, row by row: the model is never in memory as a whole.


# O output channels  I input channels  G groups of a row


@dataclass(frozen=True)
class Fold:
    """One change of one weight.

    inputs:  columns are multiplied by `values` [I].
    outputs: the last rows are divided by `values` [n], n of them.
    limit:   groups of a row are clamped to plus and minus `values` [O, G].
    """

    kind: Literal["inputs", "outputs", "limit"]
    values: Tensor

    def __call__(self, part: Tensor, start: int, total: int) -> Tensor:
        """The changed rows, as a new tensor of the same type. `part` begins at row `start` of `total`."""
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        if self.kind == "inputs":
            return (wide * self.values.to(torch.promote_types(self.values.dtype, torch.float32))).to(part.dtype)
        if self.kind == "outputs":
            return self._divided(wide, start, total).to(part.dtype)
        limit = self.values[start : start + len(part)].to(part)[..., None]
        groups = part.unflatten(-1, (self.values.shape[1], -1))
        return torch.maximum(torch.minimum(groups, limit), -limit).flatten(-2)

    def _divided(self, wide: Tensor, start: int, total: int) -> Tensor:
        first = total - self.values.numel()
        out = wide.clone()
        kept = max(0, first - start)
        if kept < len(out):
            divisor = self.values[start + kept - first : start + len(out) - first]
            out[kept:] /= divisor.to(torch.promote_types(divisor.dtype, torch.float32)).view(-1, *[1] * (out.dim() - 1))
        return out


def folds_of(search: AwqSearch, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Fold]]:
    """The changes of every weight of an LLM, in the order in which they are made.

    shapes: of the LLM's weights, by the names that a search uses: `model.layers.0.input_layernorm.weight`.
    Raises LayoutError naming what does not fit the model.
    """
    problems = list(_problems(search, shapes))
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise LayoutError(f"the search does not fit this model: {'; '.join(problems[:5])}{more}; make it again for it")
    out: dict[str, list[Fold]] = {}
    for scale in search.scales:
        for leaf in ("weight", "bias"):
            if f"{scale.fold}.{leaf}" in shapes:
                out.setdefault(f"{scale.fold}.{leaf}", []).append(Fold("outputs", scale.scale_I))
        for name in scale.linears:
            out.setdefault(f"{name}.weight", []).append(Fold("inputs", scale.scale_I))
    for clip in search.clips:
        out.setdefault(f"{clip.linear}.weight", []).append(Fold("limit", clip.limit_OG))
    return out


def _problems(search: AwqSearch, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for scale in search.scales:
        width = scale.scale_I.numel()
        fold = shapes.get(f"{scale.fold}.weight")
        if fold is None:
            yield f"{scale.fold} is no norm or Linear of it"
        elif fold[0] < width:
            yield f"{scale.fold} has {fold[0]} outputs, fewer than the scale's {width} channels"
        for name in scale.linears:
            shape = shapes.get(f"{name}.weight", ())
            if len(shape) != 2 or shape[1] != width:
                yield f"{name} is {'x'.join(map(str, shape)) or 'missing'}, its scale has {width} channels"
        if not (torch.isfinite(scale.scale_I).all() and (scale.scale_I > 0).all()):
            yield f"the scale of {scale.fold} is not finite and positive"
    for clip in search.clips:
        shape = shapes.get(f"{clip.linear}.weight", ())
        outputs, groups = clip.limit_OG.shape[:2]
        if len(shape) != 2 or shape[0] != outputs or shape[1] % max(1, groups):
            yield f"{clip.linear} is {'x'.join(map(str, shape)) or 'missing'}, its limits are {outputs}x{groups}"
        elif not (clip.limit_OG >= 0).all():
            yield f"the limits of {clip.linear} are not all 0 and more"


LLM = "language_model."
RUN_BYTES = 8 << 20
_ROWS = 64  # every packing that joins neighbouring rows joins 64 at most


@dataclass(frozen=True)
class Source:
    """A model that is exported.

    search: scales and limits that every weight read here has already; None leaves weights as they are.
    events: hears of the bytes of weights that were read, as the task `export`.
    """

    checkpoint: Checkpoint
    search: AwqSearch | None = None
    events: Events = SILENT
    _held: dict[Path, ReadTensor] = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> Path:
        """The directory that the model lies in."""
        return self.checkpoint.folder

    @property
    def config(self) -> VilaConfig:
        """The model's configuration."""
        return self.checkpoint.config

    @property
    def processor(self) -> VilaProcessor:
        """Its tokenizer, pixels and template."""
        return self.checkpoint.processor

    @property
    def family(self) -> Family:
        """Family of its LLM. Raises UnknownNameError for an unknown one."""
        return find_family(self.config.text_config.model_type)

    @property
    def pieces(self) -> Mapping[str, TensorRef]:
        """Where every weight lies, by our names."""
        return self.checkpoint.tensors

    @property
    def names(self) -> list[str]:
        """All weights, those that lie in 4 bits included."""
        return [*self.pieces, *(f"{name}.weight" for name in self.checkpoint.int4)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        packed = self._packed(name)
        return self.pieces[name].shape if packed is None else packed.shape

    def dtype_of(self, name: str) -> torch.dtype:
        """Number type of a weight in its file; of one in 4 bits, that of its scales."""
        packed = self._packed(name)
        return self.pieces[name].dtype if packed is None else packed.scale_dtype

    @cached_property
    def has_zeros(self) -> bool:
        """Whether weights that lie in 4 bits have zero points of their own; the first one is read to see it."""
        for _, weight in read_packed(dict(list(self.checkpoint.int4.items())[:1])):
            return not bool((weight.zeros == SYMMETRIC_ZERO).all())
        return False

    def _packed(self, name: str) -> PackedWeight | None:
        return self.checkpoint.int4.get(name.removesuffix(".weight"))

    def block_linears(self) -> list[str]:
        """The Linears of the decoder's blocks that INT4 is for, by our names without `.weight`, in order."""
        parts = [name for group in self.family.scale_groups for name in group.linears]
        blocks = range(self.config.text_config.num_hidden_layers)
        return [f"{LLM}model.layers.{index}.{part}" for index in blocks for part in parts]

    @property
    def is_tied(self) -> bool:
        """Whether the LLM's head is its embeddings."""
        return bool(self.config.text_config.tie_word_embeddings)

    def rows(self, name: str, dtype: torch.dtype | None = None, run_bytes: int = RUN_BYTES) -> Iterator[Tensor]:
        """A weight from its first row to its last, in runs of about `run_bytes`; all of it when it has one dimension.

        dtype: of the tensors that come; None keeps that of the file. A weight in 4 bits comes as its values.
        """
        if self._packed(name) is not None:
            for weight in self._int4_runs(name, run_bytes):
                yield dequantize(weight, self.dtype_of(name) if dtype is None else dtype)
            return
        piece = self.pieces[name]
        folds = self._folds.get(name, ())
        with self._opened(piece) as get:
            whole = get(piece.name)
            whole = whole if piece.transform is None else piece.transform(whole)
            for start, end in _runs(whole, run_bytes):
                part = whole[start:end] if whole.dim() else whole
                for fold in folds:
                    part = fold(part, start, whole.shape[0])
                self.events.advanced("export", part.nbytes)
                yield part if dtype is None else _cast(name, part, dtype)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A whole weight in memory of its own: for small ones."""
        runs = [run.clone() for run in self.rows(name, dtype)]
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    def int4_rows(
        self, name: str, group_size: int, *, symmetric: bool, scale_dtype: torch.dtype
    ) -> Iterator[Int4Weight]:
        """A weight rounded to INT4, in runs of rows whose numbers 64 divides, but for the last.

        One that lies in 4 bits comes with its own codes, whatever `group_size` and `symmetric` say.
        """
        if self._packed(name) is not None:
            for weight in self._int4_runs(name, RUN_BYTES):
                yield replace(weight, scales=weight.scales.to(scale_dtype))
            return
        # Rounding takes several float32 copies of what it rounds.
        for run in self.rows(name, torch.float32, RUN_BYTES // 4):
            yield quantize(run, group_size, symmetric=symmetric, dtype=scale_dtype)

    def _int4_runs(self, name: str, run_bytes: int) -> Iterator[Int4Weight]:
        linear = name.removesuffix(".weight")
        for _, weight in read_packed({linear: self.checkpoint.int4[linear]}):
            step = max(_ROWS, run_bytes // (2 * weight.num_inputs) // _ROWS * _ROWS)
            for start in range(0, weight.num_outputs, step):
                part = weight.rows(start, min(start + step, weight.num_outputs))
                self.events.advanced("export", part.num_bytes)
                yield part

    @cached_property
    def dtype(self) -> torch.dtype:
        """The number type that most of its weights have."""
        sizes: Counter[torch.dtype] = Counter()
        for piece in self.pieces.values():
            if piece.dtype.is_floating_point:
                sizes[piece.dtype] += piece.bytes
        return sizes.most_common(1)[0][0]

    @property
    def half(self) -> torch.dtype:
        """The 16-bit type for a program that wants one: bfloat16 of a bfloat16 model, float16 of any other."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16

    @property
    def least_llm_bytes(self) -> int:
        """Bytes that the LLM takes at least in any format: half a byte for each value."""
        values = sum(one.bytes // one.dtype.itemsize for name, one in self.pieces.items() if name.startswith(LLM))
        return (values + sum(one.bytes for one in self.checkpoint.int4.values())) // 2

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(one.bytes for one in self.pieces.values()) + sum(one.bytes for one in self.checkpoint.int4.values())

    @cached_property
    def _folds(self) -> Mapping[str, Sequence[Fold]]:
        if self.search is None:
            return {}
        shapes = {name.removeprefix(LLM): piece.shape for name, piece in self.pieces.items() if name.startswith(LLM)}
        return {LLM + name: folds for name, folds in folds_of(self.search, shapes).items()}

    @contextmanager
    def _opened(self, piece: TensorRef) -> Iterator[ReadTensor]:
        if isinstance(piece.file, TorchFile) and not piece.file.is_mapped:
            # A file from before PyTorch 1.6 can only be read whole: once, then.
            if piece.file.path not in self._held:
                with piece.file.open() as get:
                    self._held[piece.file.path] = get
            yield self._held[piece.file.path]
            return
        # Opened anew for every weight, so that the pages of the last one are given back.
        with piece.file.open() as get:
            yield get


def open_source(
    path: str | Path,
    *,
    template: str | None = None,
    base: str | Path | None = None,
    revision: str | None = None,
    search: Path | None = None,
    events: Events = SILENT,
) -> Source:
    """A model to export, without reading its weights; arguments as `open_checkpoint`, `search` a search's file.

    Raises LayoutError for weights that nothing claims, and for a search that does not fit the model or comes too late.
    """
    checkpoint = open_checkpoint(path, template=template, base=base, revision=revision)
    if checkpoint.unexpected:
        raise LayoutError(
            f"{len(checkpoint.unexpected)} unexpected weights ({', '.join(checkpoint.unexpected)})",
            file=checkpoint.folder,
            hint="refusing a partial export",
        )
    if search is not None and checkpoint.int4:
        raise LayoutError(
            f"{checkpoint.folder}: its weights are rounded to INT4 already and take no scales; omit --load-awq, or "
            "export the model that was quantized"
        )
    source = Source(checkpoint, None if search is None else read_search(search), events)
    _ = source._folds
    return source


def _cast(name: str, part: Tensor, dtype: torch.dtype) -> Tensor:
    out = part.to(dtype) if part.is_floating_point() else part
    if dtype == torch.float16 and part.dtype != dtype and not bool(out.isfinite().all()):
        raise LayoutError(f"{name}: a value is not finite in float16, or not at all; nothing was written")
    return out


def _runs(whole: Tensor, run_bytes: int) -> Iterator[tuple[int, int]]:
    if whole.dim() < 2:
        yield 0, max(1, whole.numel())
        return
    row = whole[0].nbytes
    step = max(_ROWS, run_bytes // max(1, row) // _ROWS * _ROWS)
    for start in range(0, whole.shape[0], step):
        yield start, min(start + step, whole.shape[0])


# --- stream
# Writing .safetensors files row by row: shapes are declared first, then rows come in any order of tensors.


@dataclass
class _Slot:
    """Where a tensor lies in a file, and how much of it is written."""

    stream: BinaryIO
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    size: int
    done: int = 0


@dataclass
class SafetensorsWriter:
    """Tensors of one file called `single`, or of shards of about `shard_bytes` with their index, in `folder`.

    Used in a `with`; leaving it without an error checks that every declared tensor is whole.
    """

    folder: Path
    declared: TensorSpecs
    single: str = SINGLE_FILES[0]
    shard_bytes: int = SHARD_BYTES
    _slots: dict[str, _Slot] = field(default_factory=dict, init=False)
    _streams: list[BinaryIO] = field(default_factory=list, init=False)

    def __enter__(self) -> SafetensorsWriter:
        files: Mapping[str, Sequence[str]] = {self.single: list(self.declared)}
        if self.single == SINGLE_FILES[0]:
            files = plan_shards(self.declared, self.folder, self.shard_bytes)
        for file, names in files.items():
            self._open(self.folder / file, names)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for stream in self._streams:
            stream.close()
        unfinished = [name for name, slot in self._slots.items() if slot.done != slot.size]
        if kind is None and unfinished:
            raise RuntimeError(f"{self.folder}: {len(unfinished)} tensors are not whole: {', '.join(unfinished[:5])}")

    def append(self, name: str, rows: Tensor) -> None:
        """Write the next rows of a tensor. Raises ValueError for another type, other rows, or more than declared."""
        slot = self._slots[name]
        if rows.dtype != slot.dtype or rows.shape[1:] != slot.shape[1:]:
            raise ValueError(
                f"{name}: rows are {rows.dtype} {list(rows.shape)}, declared is {slot.dtype} {list(slot.shape)}"
            )
        if slot.done + rows.nbytes > slot.size:
            raise ValueError(f"{name}: more rows than the {slot.shape[0] if slot.shape else 1} that were declared")
        flat = rows.detach().cpu().contiguous().flatten().view(torch.uint8)
        slot.stream.seek(slot.start + slot.done)
        slot.stream.write(flat.numpy().data)
        slot.done += rows.nbytes

    def _open(self, path: Path, names: Sequence[str]) -> None:
        layout = plan_file({name: self.declared[name] for name in names}, path)
        # Closed when the writer is left.
        stream = path.open("wb")
        self._streams.append(stream)
        stream.write(layout.header)
        stream.truncate(layout.size)
        for name, start in layout.offsets.items():
            self._slots[name] = _Slot(stream, start, *self.declared[name], num_bytes(*self.declared[name]))
