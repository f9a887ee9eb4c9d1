"""INT4 in compressed-tensors' `pack-quantized` form inside a LLaVA directory: what vLLM reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila.export.target import ExportOptions, Guide

if TYPE_CHECKING:
    from vila.export.source import Source

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
    takes = frozenset({"search", "group_size"})
    holds_llm = True
    verified = (
        "bit by bit with an independent reader; loaded on a CPU by transformers 5.23 with compressed-tensors 0.20; "
        "vLLM was not run"
    )

    def refusals(self, source: Source, options: ExportOptions) -> list[str]:
        """What stock LLaVA cannot express, and groups that do not fit."""
        from vila.export.int4_choice import int4_refusals
        from vila.export.llava_folder import hub_refusals

        symmetric = is_symmetric(options)
        return [
            *hub_refusals(source),
            *int4_refusals(source, options, symmetric=symmetric, outputs=1 if symmetric else 8),
        ]

    def write(self, source: Source, part: Path, options: ExportOptions) -> None:
        """The weights one by one, then the small files."""
        from vila.export.compressed_weights import write_compressed
        from vila.export.int4_choice import group_of
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
