"""Input and output of exports: weights read in chunks of rows with an AWQ search applied, and a safetensors writer.

At most one chunk is in memory. AWQ scales and clipping limits are applied with the arithmetic of `quant.apply`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.core.progress import SILENT, Events
from vila.families import Family, find_family
from vila.kernels.int4 import SYMMETRIC_ZERO, Int4Weight, dequantize, quantize
from vila.model.int4_weights import PackedWeight, read_packed
from vila.model.layouts.base import Checkpoint
from vila.model.loading import open_checkpoint
from vila.model.save_weights import SafetensorsWriter, TensorSpecs
from vila.model.weights import ReadTensor, TensorRef, TorchFile
from vila.quant.awq_cache import AwqSearch, read_search

# O output channels  I input channels  G groups of a row


@dataclass(frozen=True)
class Fold:
    """One change of one weight by an AWQ search.

    inputs:  multiply columns by `values` [I].
    outputs: divide the last n rows by `values` [n].
    limit:   clamp groups to plus and minus `values` [O, G].
    """

    kind: Literal["inputs", "outputs", "limit"]
    values: Tensor

    def __call__(self, part: Tensor, start: int, total: int) -> Tensor:
        """Return the changed rows in the same dtype. part: rows from `start` of `total`."""
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


def search_folds(search: AwqSearch, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Fold]]:
    """Return the changes of every weight of an LLM, in order.

    shapes: of the LLM's weights, by the names of the search: `model.layers.0.input_layernorm.weight`.
    Raises LayoutError with what does not fit the model.
    """
    problems = list(_problems(search, shapes))
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        problem = f"the AWQ search does not fit this model: {'; '.join(problems[:5])}{more}"
        raise LayoutError(problem, hint="search again for this model")
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
            yield f"{scale.fold} is not a norm or Linear of the model"
        elif fold[0] < width:
            yield f"{scale.fold} has {fold[0]} outputs, the scale has {width} channels"
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
            yield f"a limit of {clip.linear} is negative"


LLM = "language_model."
CHUNK_BYTES = 8 << 20
_ROWS = 64  # no INT4 packing combines more than 64 adjacent rows


@dataclass(frozen=True)
class ExportSource(Checkpoint):
    """The model to export.

    search: AWQ search that is applied to the weights when they are read, None for none.
    events: receives the number of bytes read, as the task `export`.
    """

    search: AwqSearch | None = None
    events: Events = SILENT
    _held: dict[Path, ReadTensor] = field(default_factory=dict, repr=False)

    @property
    def family(self) -> Family:
        """Family of the LLM. Raises UnknownNameError for an unknown one."""
        return find_family(self.config.text_config.model_type)

    @property
    def names(self) -> list[str]:
        """Names of all weights, INT4 ones included."""
        return [*self.tensors, *(f"{name}.weight" for name in self.int4)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        packed = self._packed(name)
        return self.tensors[name].shape if packed is None else packed.shape

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of a weight in its file; for INT4, that of its scales."""
        packed = self._packed(name)
        return self.tensors[name].dtype.torch if packed is None else packed.scale_dtype

    @cached_property
    def has_zeros(self) -> bool:
        """Whether the INT4 weights have zero points, judged by the first one."""
        for _, weight in read_packed(dict(list(self.int4.items())[:1])):
            return not bool((weight.zeros == SYMMETRIC_ZERO).all())
        return False

    def _packed(self, name: str) -> PackedWeight | None:
        return self.int4.get(name.removesuffix(".weight"))

    def block_linears(self) -> list[str]:
        """Return the names of the decoder Linears that INT4 quantizes, without `.weight`, in order."""
        linears = [name for group in self.family.scale_groups for name in group.linears]
        blocks = range(self.config.text_config.num_hidden_layers)
        return [f"{LLM}model.layers.{index}.{linear}" for index in blocks for linear in linears]

    @property
    def is_tied(self) -> bool:
        """Whether LM head and embeddings are the same weight."""
        return bool(self.config.text_config.tie_word_embeddings)

    def rows(self, name: str, dtype: torch.dtype | None = None, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """Yield the rows of a weight in chunks of about `chunk_bytes`; a vector is one chunk.

        dtype: of the result; None for that of the file. INT4 weights are dequantized.
        """
        if self._packed(name) is not None:
            for weight in self._int4_chunks(name, chunk_bytes):
                yield dequantize(weight, self.dtype_of(name) if dtype is None else dtype)
            return
        ref = self.tensors[name]
        folds = self._folds.get(name, ())
        with self._opened(ref) as get:
            whole = get(ref.name)
            whole = whole if ref.transform is None else ref.transform(whole)
            for start, end in _chunks(whole, chunk_bytes):
                part = whole[start:end] if whole.dim() else whole
                for fold in folds:
                    part = fold(part, start, whole.shape[0])
                self.events.advanced("export", part.nbytes)
                yield part if dtype is None else _cast(name, part, dtype)

    def copied(self, name: str, target: str, dtype: torch.dtype) -> StreamedTensors:
        """Return a weight under another name, converted to a dtype."""
        rows = partial(self.rows, name, dtype)
        return StreamedTensors({target: (self.shape(name), dtype)}, lambda: ({target: part} for part in rows()))

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a whole weight as a copy, for small weights."""
        chunks = [chunk.clone() for chunk in self.rows(name, dtype)]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def int4_rows(
        self, name: str, group_size: int, *, symmetric: bool, scale_dtype: torch.dtype
    ) -> Iterator[Int4Weight]:
        """Yield a weight quantized to INT4, in chunks whose number of rows is a multiple of 64, except the last.

        An INT4 weight keeps its codes; `group_size` and `symmetric` are ignored then.
        """
        if self._packed(name) is not None:
            for weight in self._int4_chunks(name, CHUNK_BYTES):
                yield replace(weight, scales=weight.scales.to(scale_dtype))
            return
        # Quantization makes several float32 copies of its input.
        for chunk in self.rows(name, torch.float32, CHUNK_BYTES // 4):
            yield quantize(chunk, group_size, symmetric=symmetric, dtype=scale_dtype)

    def _int4_chunks(self, name: str, chunk_bytes: int) -> Iterator[Int4Weight]:
        linear = name.removesuffix(".weight")
        for _, weight in read_packed({linear: self.int4[linear]}):
            step = max(_ROWS, chunk_bytes // (2 * weight.num_inputs) // _ROWS * _ROWS)
            for start in range(0, weight.num_outputs, step):
                part = weight.rows(start, min(start + step, weight.num_outputs))
                self.events.advanced("export", part.num_bytes)
                yield part

    @property
    def half_dtype(self) -> torch.dtype:
        """16-bit dtype of exports: bfloat16 for a bfloat16 model, else float16."""
        return torch.bfloat16 if self.main_dtype == torch.bfloat16 else torch.float16

    @property
    def min_llm_bytes(self) -> int:
        """Lower bound of the LLM's size in any format: half a byte for each value."""
        values = sum(one.bytes // one.dtype.itemsize for name, one in self.tensors.items() if name.startswith(LLM))
        return (values + sum(one.bytes for one in self.int4.values())) // 2

    @property
    def num_bytes(self) -> int:
        """Size of all weights in bytes."""
        return sum(one.bytes for one in self.tensors.values()) + sum(one.bytes for one in self.int4.values())

    @cached_property
    def _folds(self) -> Mapping[str, Sequence[Fold]]:
        if self.search is None:
            return {}
        shapes = {name.removeprefix(LLM): piece.shape for name, piece in self.tensors.items() if name.startswith(LLM)}
        return {LLM + name: folds for name, folds in search_folds(self.search, shapes).items()}

    @contextmanager
    def _opened(self, ref: TensorRef) -> Iterator[ReadTensor]:
        if isinstance(ref.file, TorchFile) and not ref.file.is_mapped:
            # A file from before PyTorch 1.6 can only be read completely, so it is cached.
            if ref.file.path not in self._held:
                with ref.file.open() as get:
                    self._held[ref.file.path] = get
            yield self._held[ref.file.path]
            return
        # Opened again for every weight, so that the memory of the previous one is released.
        with ref.file.open() as get:
            yield get


def open_source(
    path: str | Path,
    *,
    template: str | None = None,
    base: str | Path | None = None,
    revision: str | None = None,
    search: Path | None = None,
    events: Events = SILENT,
) -> ExportSource:
    """Open a model to export, without reading its weights; arguments as for `open_checkpoint`.

    search: file of an AWQ search. Raises LayoutError for unexpected weights, and for a search that does not fit the
    model, or for an INT4 model.
    """
    checkpoint = open_checkpoint(path, template=template, base=base, revision=revision)
    if checkpoint.unexpected:
        problem = f"{len(checkpoint.unexpected)} unexpected weights ({', '.join(checkpoint.unexpected)})"
        raise LayoutError(problem, file=checkpoint.folder, hint="refusing a partial export")
    if search is not None and checkpoint.int4:
        raise LayoutError(
            "the weights are INT4, so an AWQ search cannot be applied",
            file=checkpoint.folder,
            field="--load-awq",
            hint="omit --load-awq, or export the original model",
        )
    model = {one.name: getattr(checkpoint, one.name) for one in fields(checkpoint)}
    source = ExportSource(**model, search=None if search is None else read_search(search), events=events)
    _ = source._folds
    return source


def _cast(name: str, part: Tensor, dtype: torch.dtype) -> Tensor:
    out = part.to(dtype) if part.is_floating_point() else part
    if dtype == torch.float16 and part.dtype != dtype and not bool(out.isfinite().all()):
        raise LayoutError("has values that are not finite in float16", field=name)
    return out


def _chunks(whole: Tensor, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    if whole.dim() < 2:
        yield 0, max(1, whole.numel())
        return
    row = whole[0].nbytes
    step = max(_ROWS, chunk_bytes // max(1, row) // _ROWS * _ROWS)
    for start in range(0, whole.shape[0], step):
        yield start, min(start + step, whole.shape[0])


@dataclass(frozen=True)
class StreamedTensors:
    """Tensors of a safetensors file that are made of one weight.

    specs:  shape and dtype of each tensor, by name.
    chunks: returns an iterator over the next rows of the tensors, by name.
    """

    specs: TensorSpecs
    chunks: Callable[[], Iterable[Mapping[str, Tensor]]]


def write_tensors(folder: Path, streams: Iterable[StreamedTensors]) -> None:
    """Write model.safetensors, or shards with an index, holding one chunk of rows in memory."""
    streams = list(streams)
    declared = {name: spec for stream in streams for name, spec in stream.specs.items()}
    with SafetensorsWriter(folder, declared) as writer:
        for stream in streams:
            for chunk in stream.chunks():
                for name, rows in chunk.items():
                    writer.append(name, rows)
