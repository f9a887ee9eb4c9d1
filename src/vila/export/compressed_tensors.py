"""INT4 in compressed-tensors' `pack-quantized` form inside a LLaVA directory: what vLLM reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vila.export.base import ExportOptions, Guide
from vila.export.llava_folder import HubTensor, copy_tensor, hub_tensors, module_name
from vila.export.source import SafetensorsWriter, Source
from vila.kernels.int4 import pack_nibbles
from vila.kernels.packings import CODES_PER_WORD, as_words, pack_compressed

IGNORE = ("lm_head", "re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*")
"""Modules that stay as they are, under the names of old and new transformers and of vLLM."""


_PRECISIONS = {
    "int4": "codes with scales and zero points of groups (W4A16_ASYM)",
    "int4-symmetric": "codes with scales of groups (W4A16)",
}


class CompressedTensorsTarget:
    """Linears of the decoder's blocks in 4 bits, everything else in 16."""

    name = "compressed-tensors"
    summary = "INT4 weights in a LLaVA directory for vLLM (pack-quantized)"
    precisions = _PRECISIONS
    takes = frozenset({"load_awq", "group_size"})
    holds_llm = True
    verified = (
        "bit by bit with an independent reader; loaded on a CPU by transformers 5.23 with compressed-tensors 0.20; "
        "vLLM was not run"
    )

    def refusals(self, source: Source, options: ExportOptions) -> list[str]:
        """What stock LLaVA cannot express, and groups that do not fit."""
        from vila.export.base import int4_refusals
        from vila.export.llava_folder import hub_refusals

        symmetric = is_symmetric(options)
        return [
            *hub_refusals(source),
            *int4_refusals(source, options, symmetric=symmetric, outputs=1 if symmetric else 8),
        ]

    def write(self, source: Source, part: Path, options: ExportOptions) -> None:
        """The weights one by one, then the small files."""
        from vila.export.base import group_of
        from vila.export.llava_folder import write_hub_files

        group, symmetric = group_of(source, options), is_symmetric(options)
        write_compressed(source, part, group, symmetric)
        write_hub_files(source, part, source.half, {"quantization_config": quantization_config(group, symmetric)})

    def guide(self, source: Source, options: ExportOptions) -> Guide:
        """vLLM serves it; transformers needs a word for asymmetric files."""
        symmetric = is_symmetric(options)
        config = "" if symmetric else ", quantization_config=CompressedTensorsConfig(dequantize=True)"
        names = "AutoModelForImageTextToText" + ("" if symmetric else ", CompressedTensorsConfig")
        return Guide(
            commands=(
                ("Serve it with vLLM", "vllm serve {out}"),
                (
                    "Load it in transformers (`pip install compressed-tensors`)",
                    f'python -c "from transformers import {names}; '
                    f"AutoModelForImageTextToText.from_pretrained('{{out}}'{config})\"",
                ),
            ),
            versions=(
                "transformers 5.23 with compressed-tensors 0.20: run on a CPU",
                "vLLM with compressed-tensors support: made for it, not run",
            ),
            defects=() if symmetric else tuple(_defects(source)),
        )


def _defects(source: Source) -> Iterator[str]:
    yield (
        "transformers 5.23 with compressed-tensors up to 0.20 refuses packed zero points unless the model is loaded "
        "with `CompressedTensorsConfig(dequantize=True)`, which makes 16-bit weights of it."
    )
    if source.config.vision_config.model_type == "dinov2":
        yield (
            "transformers 5.23 cannot load a model with a DINOv2 tower that way (its renaming of `mlp.weights_in` "
            "stops with a ValueError): for transformers export it with `--precision int4-symmetric`, which loads as is."
        )


def is_symmetric(options: ExportOptions) -> bool:
    """Whether codes have no zero points."""
    return options.precision == "int4-symmetric"


def quantization_config(group_size: int, symmetric: bool) -> dict[str, Any]:
    """What config.json says of the weights."""
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


TARGET = CompressedTensorsTarget()


# --- compressed_weights
# The tensors of a compressed-tensors directory, declared and then written row by row.


# N outputs  K inputs  G inputs of a group

Entry = tuple[tuple[int, ...], torch.dtype]


def write_compressed(source: Source, part: Path, group_size: int, symmetric: bool) -> None:
    """Linears of the decoder's blocks in 4 bits, each in three or four tensors; all others in 16 bits."""
    linears = {f"{name}.weight" for name in source.block_linears()}
    tensors = hub_tensors(source)
    declared: dict[str, Entry] = {}
    for name, one in tensors.items():
        if one.ours in linears:
            declared |= _declared(module_name(name), one, source.half, group_size, symmetric)
        else:
            declared[name] = (one.shape, source.half)
    with SafetensorsWriter(part, declared) as writer:
        for name, one in tensors.items():
            if one.ours in linears:
                _write_linear(writer, module_name(name), one, source, group_size, symmetric)
            else:
                copy_tensor(writer, name, one, source.half)


def _declared(stem: str, one: HubTensor, dtype: torch.dtype, group_size: int, symmetric: bool) -> dict[str, Entry]:
    outputs, inputs = one.shape
    entries: dict[str, Entry] = {
        f"{stem}.weight_packed": ((outputs, inputs // CODES_PER_WORD), torch.int32),
        f"{stem}.weight_scale": ((outputs, inputs // group_size), dtype),
        f"{stem}.weight_shape": ((2,), torch.int64),
    }
    if not symmetric:
        entries[f"{stem}.weight_zero_point"] = ((outputs // CODES_PER_WORD, inputs // group_size), torch.int32)
    return entries


def _write_linear(
    writer: SafetensorsWriter, stem: str, one: HubTensor, source: Source, group_size: int, symmetric: bool
) -> None:
    writer.append(f"{stem}.weight_shape", torch.tensor(one.shape))
    for weight in source.int4_rows(one.ours, group_size, symmetric=symmetric, scale_dtype=source.half):
        packed = pack_compressed(weight)
        writer.append(f"{stem}.weight_packed", packed["weight_packed"])
        writer.append(f"{stem}.weight_scale", packed["weight_scale"])
        if not symmetric:
            # Left out by the packer where all zeros of these rows happen to be 8; the file has them for every row.
            writer.append(f"{stem}.weight_zero_point", as_words(pack_nibbles(weight.zeros.T)).T.contiguous())
