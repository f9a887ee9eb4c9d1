"""Export `safetensors`: a LLaVA directory in full precision, AWQ scales folded in, for other quantizers."""

from __future__ import annotations

from pathlib import Path

import torch

from vila.export.base import ExportOptions, ExportTarget, Readme, full_precision_problems
from vila.export.llava_folder import llava_problems, llava_tensors, write_llava_files
from vila.export.source import ExportSource, write_tensors


def _problems(source: ExportSource, options: ExportOptions) -> list[str]:
    return [*full_precision_problems(source), *llava_problems(source)]


def _write(source: ExportSource, part: Path, options: ExportOptions) -> None:
    dtype = None if options.precision == "as-is" else getattr(torch, options.precision)
    write_tensors(part, (one.copied(name, dtype or one.dtype) for name, one in llava_tensors(source).items()))
    write_llava_files(source, part, dtype or source.main_dtype, {})


def _readme(source: ExportSource, options: ExportOptions) -> Readme:
    notes = [
        "The directory is an ordinary LLaVA model. Its outputs equal those of the original model up to the "
        "rounding of folded weights to their dtype."
    ]
    if source.search is None:
        notes.append("No AWQ search was given (`--load-awq FILE`), so no scales are folded in.")
    elif source.search.clips:
        notes.append("AWQ clipping limits are applied: weights are clamped to them, as AWQ expects.")
    return Readme(
        commands=(
            (
                "Load it in transformers",
                'python -c "from transformers import AutoModelForImageTextToText; '
                "print(AutoModelForImageTextToText.from_pretrained('{out}'))\"",
            ),
            ("Serve it unquantized with vLLM (not tested)", "vllm serve {out}"),
        ),
        versions=("transformers 5.23: tested",),
        notes=notes,
    )


TARGET = ExportTarget(
    "safetensors",
    "Full-precision weights, AWQ scales folded in, for other quantizers (llm-compressor, GPTQModel, ModelOpt)",
    precisions={
        "as-is": "every weight in the dtype of the model's files",
        "float16": "converted to float16",
        "bfloat16": "converted to bfloat16",
        "float32": "converted to float32",
    },
    verification="bit-exact in an independent reader; logits compared in transformers on a CPU",
    problems=_problems,
    write=_write,
    readme=_readme,
    options=frozenset({"load_awq"}),
)
