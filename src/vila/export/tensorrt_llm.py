"""A directory for TensorRT-LLM 1.x's PyTorch backend: VILA's three folders, the LLM in ModelOpt's INT4 or in 16 bits.

Its loader for VILA reads `llm/`, `vision_tower/` and `mm_projector/`; stock LLaVA directories it does not know.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from vila.export.target import ExportOptions, Guide

if TYPE_CHECKING:
    from vila.export.source import Source

GROUPS = (64, 128)
"""Group sizes of its INT4 products."""
TOWERS = ("clip_vision_model", "siglip_vision_model")
_PRECISIONS = {
    "int4": "symmetric 4-bit weights in groups (W4A16_AWQ), 16 bits elsewhere",
    "16-bit": "bfloat16 of a bfloat16 model, float16 of any other",
}


class TensorRtLlmTarget:
    """config.json, hf_quant_config.json and three folders."""

    name = "tensorrt-llm"
    summary = "VILA's three folders for TensorRT-LLM 1.x, INT4 as ModelOpt writes it"
    precisions = _PRECISIONS
    takes = frozenset({"search", "group_size"})
    holds_llm = True
    verified = "bit by bit with an independent reader; TensorRT-LLM was not run"

    def refusals(self, source: Source, options: ExportOptions) -> list[str]:
        """Towers and projectors that its VILA does not have, and groups that do not fit."""
        from vila.export.int4_choice import int4_refusals, no_group_refusals

        config, out = source.config, []
        if config.vision_config.model_type not in TOWERS:
            out.append(
                f"a {config.vision_config.model_type} tower: its VILA has CLIP and SigLIP; "
                "--format tensorrt-llm-legacy takes the LLM alone"
            )
        if not re.fullmatch(r"linear|mlp_downsample|mlp\d+x_gelu", config.projector_type):
            out.append(
                f"the projector {config.projector_type}: its VILA has linear, mlp_downsample and mlpNx_gelu; "
                "--format tensorrt-llm-legacy takes the LLM alone"
            )
        if options.precision == "int4":
            out += int4_refusals(source, options, symmetric=True, outputs=2, groups=GROUPS)
        else:
            out += no_group_refusals(options)
        return out

    def write(self, source: Source, part: Path, options: ExportOptions) -> None:
        """The three folders, weight by weight."""
        from vila.export.int4_choice import group_of
        from vila.export.vila_folders import write_folders

        write_folders(source, part, group_of(source, options) if options.precision == "int4" else None)

    def guide(self, source: Source, options: ExportOptions) -> Guide:
        """How it is served, and what that program does otherwise than VILA."""
        return Guide(
            commands=(
                ("Serve it", "trtllm-serve {out} --backend pytorch"),
                ("Serve the LLM alone", "trtllm-serve {out}/llm --backend pytorch"),
            ),
            versions=("TensorRT-LLM 1.x, PyTorch backend: made for it, not run",),
            defects=(
                "TensorRT-LLM chooses the conversation template by the directory's name (`vila1.5-3b` and the like, "
                "in any case); under other names it uses the tokenizer's chat template, which is the model's own here.",
                "It puts a line feed after every picture, which VILA-1.0 and models trained without one never saw.",
                "Its INT4 loader asks for a `pre_quant_scale` on o_proj and down_proj; all scales are folded, so these "
                "are ones.",
            ),
            notes=(
                "Weights are rounded to symmetric INT4 in a pass of their own: an asymmetric AWQ result cannot be "
                "stored in this form.",
                "Group sizes are 64 or 128.",
            )
            if options.precision == "int4"
            else (),
        )


TARGET = TensorRtLlmTarget()
