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

import torch
from torch import Tensor

from vila.core.errors import LayoutError
from vila.core.events import SILENT, Events
from vila.export.fold import Fold, folds_of
from vila.families.card import FamilyCard, find_family
from vila.kernels.int4_layout import SYMMETRIC_ZERO, Int4Weight, dequantize, quantize
from vila.model.config import VilaConfig
from vila.model.layouts.protocol import Checkpoint
from vila.model.load import open_checkpoint
from vila.model.packed import PackedWeight, read_packed
from vila.model.processor import VilaProcessor
from vila.model.weights import Get, Piece, TorchFile
from vila.quant.awq_cache import read_search
from vila.quant.result import Search

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
    search: Search | None = None
    events: Events = SILENT
    _held: dict[Path, Get] = field(default_factory=dict, repr=False)

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
    def card(self) -> FamilyCard:
        """The card of its LLM. Raises UnknownNameError for a family without one."""
        return find_family(self.config.text_config.model_type)

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """Where every weight lies, by our names."""
        return self.checkpoint.pieces

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
        parts = [name for group in self.card.scale_groups for name in group.linears]
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
            whole = whole if piece.change is None else piece.change(whole)
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
    def _opened(self, piece: Piece) -> Iterator[Get]:
        if isinstance(piece.file, TorchFile) and not piece.file.is_mapped:
            # A file from before PyTorch 1.6 can only be read whole: once, then.
            if piece.file.path not in self._held:
                with piece.file.mapped() as get:
                    self._held[piece.file.path] = get
            yield self._held[piece.file.path]
            return
        # Opened anew for every weight, so that the pages of the last one are given back.
        with piece.file.mapped() as get:
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
    if checkpoint.unclaimed:
        raise LayoutError(
            f"{checkpoint.folder}: {len(checkpoint.unclaimed)} weights unclaimed ({', '.join(checkpoint.unclaimed)}); "
            "refusing a partial export"
        )
    if search is not None and checkpoint.int4:
        raise LayoutError(
            f"{checkpoint.folder}: its weights are rounded to INT4 already and take no scales; leave --search out, or "
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
