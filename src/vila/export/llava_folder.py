"""The directory of transformers' LLaVA as a stream: its tensors in order, made row by row, and its small files.

The layout `llava-hf` writes the same directory from a model in memory; exports that quantize on the way write it here.
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
from transformers import AddedToken, GenerationConfig

from vila.core.errors import LayoutError
from vila.core.files import write_json
from vila.export.source import LLM, SafetensorsWriter, Source
from vila.model.layouts import llava_hf as files
from vila.model.layouts.base import to_layout_name
from vila.model.layouts.llava_hf import check_writable

_HEAD = f"{LLM}lm_head.weight"
_SUMMED = 512
"""Rows that are widened at once for their sum."""


@dataclass(frozen=True)
class HubTensor:
    """A tensor of the directory in full precision.

    ours:  our name of the weight that it is, empty for one that is made here.
    dtype: the type it has in the source.
    rows:  makes it from its first row to its last in a number type.
    """

    ours: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[torch.dtype], Iterator[Tensor]]


def hub_refusals(source: Source) -> list[str]:
    """Why stock LLaVA cannot hold the model."""
    try:
        check_writable(source.config, source.processor)
    except LayoutError as error:
        return [str(error)]
    return []


def hub_tensors(source: Source) -> dict[str, HubTensor]:
    """Every tensor of the directory by its name there, in the order of the source."""
    rows, linear = _rows(source, _tokenizer(source)[1]), source.config.projector_type == "linear"
    prefixes = files.name_prefixes(source.config)
    out = {}
    for name in source.names:
        if name == _HEAD and source.is_tied:
            continue
        # A linear projector becomes the first of two layers, without an activation between.
        written = name.replace("projector.", "projector.0.") if linear and name.startswith("projector.") else name
        wanted = rows if name in files.VOCABULARY else None
        out[to_layout_name(written, prefixes)] = _one(source, name, wanted)
    if linear:
        out |= {to_layout_name(f"projector.2.{leaf}", prefixes): made for leaf, made in _identity(source).items()}
    return out


def write_hub_files(source: Source, part: Path, dtype: torch.dtype, extra: Mapping[str, Any]) -> None:
    """config.json with the keys of `extra`, processor, tokenizer with `<image>`, chat template, generation config."""
    config = copy.deepcopy(source.config)
    config.dtype = dtype
    tokenizer, image_id = _tokenizer(source)
    facts = files.llava_config(config, source.processor, image_id, _rows(source, image_id))
    write_json(part / "config.json", {**facts, **extra}, indent=2)
    files.write_processor(source.processor, tokenizer, config, part)
    generation = SimpleNamespace(generation_config=GenerationConfig.from_dict(dict(source.checkpoint.generation)))
    files.write_generation(generation, source.processor, image_id, part)


def copy_tensor(writer: SafetensorsWriter, name: str, tensor: HubTensor, dtype: torch.dtype) -> None:
    """Write a tensor in a number type, as it is declared under the same name."""
    for rows in tensor.rows(dtype):
        writer.append(name, rows)


def module_name(name: str) -> str:
    """The Linear that a tensor's name belongs to: without `.weight`."""
    return name.removesuffix(".weight")


def _tokenizer(source: Source) -> tuple[Any, int]:
    tokenizer = copy.deepcopy(source.processor.tokenizer)
    token = AddedToken(files.IMAGE, special=True, normalized=False)
    tokenizer.add_tokens([token], special_tokens=True)
    return tokenizer, int(tokenizer.convert_tokens_to_ids(files.IMAGE))


def _rows(source: Source, image_id: int) -> int:
    return max(source.config.text_config.vocab_size, image_id + 1)


def _one(source: Source, name: str, wanted: int | None) -> HubTensor:
    shape, dtype = source.shape(name), source.dtype_of(name)
    if wanted is None or wanted <= shape[0]:
        return HubTensor(name, shape, dtype, lambda dtype: source.rows(name, dtype))
    return HubTensor(name, (wanted, *shape[1:]), dtype, lambda dtype: _with_mean(source, name, wanted, dtype))


def _with_mean(source: Source, name: str, wanted: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of embeddings or head, and their mean for ids past them, which can never be the likeliest."""
    total, count = torch.zeros(source.shape(name)[1], dtype=torch.float64), 0
    for rows in source.rows(name):
        for few in rows.split(_SUMMED):
            total += few.sum(0, dtype=torch.float64)
        count += len(rows)
        yield rows.to(dtype)
    yield (total / count).to(dtype).expand(wanted - count, -1)


def _identity(source: Source) -> dict[str, HubTensor]:
    width, dtype = source.config.text_config.hidden_size, source.pieces["projector.weight"].dtype
    return {
        "weight": HubTensor("", (width, width), dtype, lambda kind: iter([torch.eye(width, dtype=kind)])),
        "bias": HubTensor("", (width,), dtype, lambda kind: iter([torch.zeros(width, dtype=kind)])),
    }
