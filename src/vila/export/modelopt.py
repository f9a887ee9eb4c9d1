"""INT4 as NVIDIA's ModelOpt writes it into a Hugging Face directory: the tensors of a Linear, and the two configs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vila import __version__
from vila.export.source import Source
from vila.export.stream import SafetensorsWriter
from vila.kernels.int4_targets import pack_modelopt
from vila.model.safetensors_file import Declared

# N outputs  K inputs  G inputs of a group

QUANT_CONFIG = "hf_quant_config.json"
_PRODUCER = {"name": "modelopt", "version": f"vila {__version__}"}
"""Loaders know the form of the files by this name."""


def quant_config(group_size: int, ignore: Sequence[str]) -> dict[str, Any]:
    """hf_quant_config.json."""
    quantization = {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": None,
        "group_size": group_size,
        "has_zero_point": False,
        "pre_quant_scale": True,
        "exclude_modules": list(ignore),
    }
    return {"producer": _PRODUCER, "quantization": quantization}


def hub_quantization(group_size: int, ignore: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    return {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_AWQ",
        "group_size": group_size,
        "ignore": list(ignore),
        "producer": _PRODUCER,
    }


def declare_linear(
    stem: str, shape: tuple[int, ...], group_size: int, dtype: torch.dtype, with_scale: bool
) -> Declared:
    """Shapes and types of a Linear's tensors.

    weight uint8 [N/2, K], weight_scale [N, K/G] and, `with_scale`, pre_quant_scale [K] for the activation.
    """
    outputs, inputs = shape
    out = {
        f"{stem}.weight": ((outputs // 2, inputs), torch.uint8),
        f"{stem}.weight_scale": ((outputs, inputs // group_size), dtype),
    }
    return out | {f"{stem}.pre_quant_scale": ((inputs,), dtype)} if with_scale else out


def write_linear(
    writer: SafetensorsWriter, stem: str, source: Source, name: str, group_size: int, with_scale: bool
) -> None:
    """Round the weight `name` and write it. Its AWQ scale is folded already, so that of the activation is 1."""
    for weight in source.int4_rows(name, group_size, symmetric=True, scale_dtype=source.half):
        packed = pack_modelopt(weight)
        writer.append(f"{stem}.weight", packed["weight"])
        writer.append(f"{stem}.weight_scale", packed["weight_scale"])
    if with_scale:
        writer.append(f"{stem}.pre_quant_scale", torch.ones(source.shape(name)[1], dtype=source.half))
