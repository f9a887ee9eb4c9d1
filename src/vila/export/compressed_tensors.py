"""Export `compressed-tensors`: INT4 (`pack-quantized`) in a transformers LLaVA directory, for vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila.export.base import ExportOptions, ExportTarget, Readme, choose_group_size, int4_problems
from vila.export.llava_folder import LlavaTensor, llava_problems, llava_tensors, write_llava_files
from vila.export.source import ExportSource, StreamedTensors, write_tensors
from vila.kernels.group_size import CODES_PER_WORD
from vila.kernels.packings import pack_compressed

IGNORE = ("lm_head", "re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*")
"""Modules that are not quantized, under the names of old and new transformers and of vLLM."""


def _problems(source: ExportSource, options: ExportOptions) -> list[str]:
    symmetric = is_symmetric(options)
    return [
        *llava_problems(source),
        *int4_problems(source, options, symmetric=symmetric, outputs=1 if symmetric else 8),
    ]


def _write(source: ExportSource, part: Path, options: ExportOptions) -> None:
    group, symmetric = choose_group_size(source, options), is_symmetric(options)
    linears = {f"{name}.weight" for name in source.block_linears()}
    write_tensors(
        part,
        (
            _int4(name.removesuffix(".weight"), one, source, group, symmetric)
            if one.source_name in linears
            else one.copied(name, source.half_dtype)
            for name, one in llava_tensors(source).items()
        ),
    )
    config = {"quantization_config": quantization_config(group, symmetric)}
    write_llava_files(source, part, source.half_dtype, config)


def _readme(source: ExportSource, options: ExportOptions) -> Readme:
    symmetric = is_symmetric(options)
    config = "" if symmetric else ", quantization_config=CompressedTensorsConfig(dequantize=True)"
    names = "AutoModelForImageTextToText" + ("" if symmetric else ", CompressedTensorsConfig")
    return Readme(
        commands=(
            ("Serve it with vLLM", "vllm serve {out}"),
            (
                "Load it in transformers (`pip install compressed-tensors`)",
                f'python -c "from transformers import {names}; '
                f"AutoModelForImageTextToText.from_pretrained('{{out}}'{config})\"",
            ),
        ),
        versions=(
            "transformers 5.23 with compressed-tensors 0.20: tested on a CPU",
            "vLLM with compressed-tensors support: not tested",
        ),
        defects=() if symmetric else tuple(_defects(source)),
    )


def _defects(source: ExportSource) -> Iterator[str]:
    yield (
        "transformers 5.23 with compressed-tensors up to 0.20 loads packed zero points only with "
        "`CompressedTensorsConfig(dequantize=True)`, which converts the weights to 16 bits."
    )
    if source.config.vision_config.model_type == "dinov2":
        yield (
            "transformers 5.23 cannot load a model with a DINOv2 tower this way (ValueError when it renames "
            "`mlp.weights_in`). For transformers, export with `--precision int4-symmetric`, which needs no option."
        )


def is_symmetric(options: ExportOptions) -> bool:
    """Return whether the quantization has no zero points."""
    return options.precision == "int4-symmetric"


def quantization_config(group_size: int, symmetric: bool) -> dict[str, Any]:
    """Return `quantization_config` of config.json."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
        "observer": "minmax",
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(IGNORE),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


TARGET = ExportTarget(
    "compressed-tensors",
    "INT4 weights in a LLaVA directory for vLLM (pack-quantized)",
    precisions={
        "int4": "4 bits with a scale and a zero point per group (W4A16_ASYM)",
        "int4-symmetric": "4 bits with a scale per group (W4A16)",
    },
    verification=(
        "bit-exact in an independent reader; loaded on a CPU by transformers 5.23 with compressed-tensors 0.20; "
        "not tested in vLLM"
    ),
    problems=_problems,
    write=_write,
    readme=_readme,
    options=frozenset({"load_awq", "group_size"}),
)


# N outputs  K inputs  G inputs of a group


def _int4(stem: str, one: LlavaTensor, source: ExportSource, group_size: int, symmetric: bool) -> StreamedTensors:
    outputs, inputs = one.shape
    dtype = source.half_dtype
    specs = {
        f"{stem}.weight_packed": ((outputs, inputs // CODES_PER_WORD), torch.int32),
        f"{stem}.weight_scale": ((outputs, inputs // group_size), dtype),
        f"{stem}.weight_shape": ((2,), torch.int64),
    }
    if not symmetric:
        specs[f"{stem}.weight_zero_point"] = ((outputs // CODES_PER_WORD, inputs // group_size), torch.int32)

    def chunks() -> Iterator[dict[str, Tensor]]:
        yield {f"{stem}.weight_shape": torch.tensor(one.shape)}
        for weight in source.int4_rows(one.source_name, group_size, symmetric=symmetric, scale_dtype=dtype):
            yield {f"{stem}.{leaf}": rows for leaf, rows in pack_compressed(weight, symmetric=symmetric).items()}

    return StreamedTensors(specs, chunks)
