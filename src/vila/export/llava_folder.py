"""Streaming writer of a transformers LLaVA directory, tensor by tensor and row by row, for exports.

The layout `llava_hf` writes the same directory from a model in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from vila.core.errors import LayoutError
from vila.core.files import write_json
from vila.export.source import LLM, ExportSource, StreamedTensors
from vila.model.layouts import llava_hf as files
from vila.model.layouts.base import to_layout_name

_HEAD = f"{LLM}lm_head.weight"
_SUMMED = 512
"""Number of rows that are summed in float64 at once."""


@dataclass(frozen=True)
class LlavaTensor:
    """A full-precision tensor of the directory.

    source_name: name of the weight in the source, "" for a generated tensor.
    dtype:       dtype in the source.
    rows:        returns its rows in chunks, converted to a dtype.
    """

    source_name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[torch.dtype], Iterator[Tensor]]

    def copied(self, name: str, dtype: torch.dtype) -> StreamedTensors:
        """Return the tensor under its name in the directory, converted to a dtype."""
        return StreamedTensors({name: (self.shape, dtype)}, lambda: ({name: rows} for rows in self.rows(dtype)))


def llava_problems(source: ExportSource) -> list[str]:
    """Return why transformers' LLaVA does not support the model."""
    try:
        files.LAYOUT.check_writable(source.config, source.processor)
    except LayoutError as error:
        return [str(error)]
    return []


def llava_tensors(source: ExportSource) -> dict[str, LlavaTensor]:
    """Return every tensor of the directory by its name there, in the order of the source."""
    rows, linear = _rows(source, files.with_image_token(source.processor)[1]), source.config.projector_type == "linear"
    prefixes = files.name_prefixes(source.config)
    out = {}
    for name in source.names:
        if name == _HEAD and source.is_tied:
            continue
        # LLaVA has two projector layers; a linear projector becomes the first, and the second is the identity.
        written = name.replace("projector.", "projector.0.") if linear and name.startswith("projector.") else name
        num_rows = rows if name in files.VOCABULARY else None
        out[to_layout_name(written, prefixes)] = _one(source, name, num_rows)
    if linear:
        out |= {to_layout_name(f"projector.2.{leaf}", prefixes): made for leaf, made in _identity(source).items()}
    return out


def write_llava_files(source: ExportSource, part: Path, dtype: torch.dtype, extra: Mapping[str, Any]) -> None:
    """Write config.json with the keys of `extra`, processor, tokenizer with `<image>`, and generation config."""
    config = copy.deepcopy(source.config)
    config.dtype = dtype
    tokenizer, image_id = files.with_image_token(source.processor)
    facts = files.llava_config(config, source.processor, image_id, _rows(source, image_id))
    write_json(part / "config.json", {**facts, **extra}, indent=2)
    files.write_processor(source.processor, tokenizer, config, part)
    generation = SimpleNamespace(generation_config=GenerationConfig.from_dict(dict(source.generation)))
    files.write_generation(generation, source.processor, image_id, part)


def _rows(source: ExportSource, image_id: int) -> int:
    return max(source.config.text_config.vocab_size, image_id + 1)


def _one(source: ExportSource, name: str, num_rows: int | None) -> LlavaTensor:
    shape, dtype = source.shape(name), source.dtype_of(name)
    if num_rows is None or num_rows <= shape[0]:
        return LlavaTensor(name, shape, dtype, lambda dtype: source.rows(name, dtype))
    return LlavaTensor(name, (num_rows, *shape[1:]), dtype, lambda dtype: _with_mean(source, name, num_rows, dtype))


def _with_mean(source: ExportSource, name: str, num_rows: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the rows of embeddings or head, then their mean for additional ids, which are never the most likely."""
    total, count = torch.zeros(source.shape(name)[1], dtype=torch.float64), 0
    for rows in source.rows(name):
        for chunk in rows.split(_SUMMED):
            total += chunk.sum(0, dtype=torch.float64)
        count += len(rows)
        yield rows.to(dtype)
    yield (total / count).to(dtype).expand(num_rows - count, -1)


def _identity(source: ExportSource) -> dict[str, LlavaTensor]:
    width, dtype = source.config.text_config.hidden_size, source.dtype_of("projector.weight")
    return {
        "weight": LlavaTensor("", (width, width), dtype, lambda kind: iter([torch.eye(width, dtype=kind)])),
        "bias": LlavaTensor("", (width,), dtype, lambda kind: iter([torch.zeros(width, dtype=kind)])),
    }
