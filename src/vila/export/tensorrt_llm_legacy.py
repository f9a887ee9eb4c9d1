"""The LLM as a checkpoint of TensorRT-LLM's `trtllm-build`, a file for each process of tensor parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vila.export.target import ExportOptions, Guide

if TYPE_CHECKING:
    from vila.export.source import Source

GROUPS = (64, 128)
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_PRECISIONS = {
    "int4": "symmetric 4-bit weights in groups (W4A16_AWQ), float16 elsewhere",
    "float16": "float16 throughout",
}


class TensorRtLlmLegacyTarget:
    """config.json and rank0.safetensors, rank1.safetensors ..."""

    name = "tensorrt-llm-legacy"
    summary = "The LLM for TensorRT-LLM's trtllm-build, as VILA's own demo used it, a file per rank"
    precisions = _PRECISIONS
    takes = frozenset({"search", "group_size", "ranks"})
    holds_llm = True
    verified = "bit by bit with an independent reader that joins the ranks; TensorRT-LLM was not run"

    def refusals(self, source: Source, options: ExportOptions) -> list[str]:
        """Families, positions and sizes that the checkpoint cannot express, with those that would."""
        from vila.export.int4_choice import int4_refusals, no_group_refusals
        from vila.export.legacy_ranks import rank_refusals

        out = list(_family_reasons(source))
        if options.precision != "int4":
            out += no_group_refusals(options)
        elif not out:
            out += int4_refusals(source, options, symmetric=True, outputs=2, groups=GROUPS)
        return out or rank_refusals(source, options)

    def write(self, source: Source, part: Path, options: ExportOptions) -> None:
        """config.json, then every weight once, cut for all ranks."""
        from vila.export.int4_choice import group_of
        from vila.export.legacy_config import write_config
        from vila.export.legacy_ranks import write_ranks

        group_size = group_of(source, options) if options.precision == "int4" else None
        write_config(source, part, ARCHITECTURES[source.config.text_config.model_type], group_size, options.ranks)
        write_ranks(source, part, group_size, options.ranks)

    def guide(self, source: Source, options: ExportOptions) -> Guide:
        """The engines that have to be built, and how the multimodal example runs them."""
        tokens, ranks = source.processor.spec.tokens_per_image, options.ranks
        mpi = "" if ranks == 1 else f"mpirun -n {ranks} "
        build = (
            "trtllm-build --checkpoint_dir {out} --output_dir engines/llm \\\n"
            "    --gemm_plugin float16 --max_batch_size 1 --max_input_len 2048 --max_seq_len 2560 \\\n"
            f"    --max_multimodal_len {tokens}{'' if ranks == 1 else f' --workers {ranks}'}"
        )
        vision = (
            '# MODEL-vila: `vila convert MODEL MODEL-vila --layout vila-v15`; its name has to contain "vila".\n'
            "python examples/multimodal/build_multimodal_engine.py --model_type vila \\\n"
            "    --model_path MODEL-vila --vila_path VILA --output_dir engines/vision"
        )
        ask = (
            f"{mpi}python examples/multimodal/run.py --max_new_tokens 100 --hf_model_dir MODEL-vila \\\n"
            "    --visual_engine_dir engines/vision --llm_engine_dir engines/llm \\\n"
            '    --image_path a.jpg,b.jpg --input_text "<image>\\n<image>\\n What differs?"'
        )
        return Guide(
            commands=(
                ("Build the engine of the LLM", build),
                ("Build the engine of the tower and the projector (VILA is a checkout of the original code)", vision),
                ("Ask it", ask),
            ),
            versions=("TensorRT-LLM 0.9 to 0.2x with trtllm-build: made for it, not run",),
            defects=(
                "INT4 engines cannot be built with `--use_fused_mlp=enable`.",
                'The multimodal example knows VILA by its directory\'s name, which has to contain "vila" or "VILA".',
            ),
            notes=(
                f"--max_multimodal_len is the batch times {tokens} tokens a picture; raise it for several pictures.",
                "Tower and projector are not in these files.",
            ),
        )


def _family_reasons(source: Source) -> list[str]:
    llm, out = source.config.text_config, []
    if llm.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        out.append(f"an LLM of the family {llm.model_type}: written are {known}; --format tensorrt-llm takes it")
    rope = getattr(llm, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "linear"):
        out.append(
            f"rotary positions of type {rope['rope_type']}: written are default and linear; --format tensorrt-llm "
            "takes others"
        )
    window = getattr(llm, "sliding_window", None)
    if window and window < llm.max_position_embeddings:
        out.append(f"a sliding window of {window} tokens, which the checkpoint has no word for; --format tensorrt-llm")
    return out


TARGET = TensorRtLlmLegacyTarget()
