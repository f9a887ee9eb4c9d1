"""Full-precision weights with AWQ's scales folded in, as transformers' LLaVA directory: for another quantizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vila.export.base import ExportOptions, Guide

if TYPE_CHECKING:
    from vila.export.source import Source


_PRECISIONS = {
    "as-is": "every weight in the number type that it has in the model's files",
    "float16": "rounded to float16",
    "bfloat16": "rounded to bfloat16",
    "float32": "widened to float32",
}


class FoldedTarget:
    """model.safetensors and the small files of a LLaVA directory; nothing is rounded unless another type is asked."""

    name = "safetensors"
    summary = "Full-precision weights, AWQ scales folded in, for other quantizers (llm-compressor, GPTQModel, ModelOpt)"
    precisions = _PRECISIONS
    takes = frozenset({"load_awq"})
    holds_llm = True
    verified = "bit by bit with an independent reader, and by its logits in stock transformers on a CPU"

    def refusals(self, source: Source, options: ExportOptions) -> list[str]:
        """What stock LLaVA cannot express."""
        from vila.export.base import int4_source_refusals
        from vila.export.llava_folder import hub_refusals

        return [*int4_source_refusals(source), *hub_refusals(source)]

    def write(self, source: Source, part: Path, options: ExportOptions) -> None:
        """The weights one by one, then the small files."""
        import torch

        from vila.export.llava_folder import copy_tensor, hub_tensors, write_hub_files
        from vila.export.source import SafetensorsWriter

        wanted = None if options.precision == "as-is" else getattr(torch, options.precision)
        tensors = hub_tensors(source)
        declared = {name: (one.shape, wanted or one.dtype) for name, one in tensors.items()}
        with SafetensorsWriter(part, declared) as writer:
            for name, one in tensors.items():
                copy_tensor(writer, name, one, declared[name][1])
        write_hub_files(source, part, wanted or source.dtype, {})

    def guide(self, source: Source, options: ExportOptions) -> Guide:
        """transformers reads it as it is; quantizers take it by its path."""
        notes = [
            "The directory is an ordinary LLaVA model: its outputs are those of the model it was made from, up to the "
            "rounding of folded weights to their own number type."
        ]
        if source.search is None:
            notes.append("No search was given (`--load-awq FILE`), so no scales are folded in.")
        elif source.search.clips:
            notes.append("AWQ's limits are applied too: values past them are clamped, as its quantization expects.")
        return Guide(
            commands=(
                (
                    "Load it in transformers",
                    'python -c "from transformers import AutoModelForImageTextToText; '
                    "print(AutoModelForImageTextToText.from_pretrained('{out}'))\"",
                ),
                ("Serve it unquantized with vLLM (not run here)", "vllm serve {out}"),
            ),
            versions=("transformers 5.23: run",),
            notes=notes,
        )


TARGET = FoldedTarget()
