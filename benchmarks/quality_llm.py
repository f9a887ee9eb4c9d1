"""Measure the quality loss of 4-bit weights for the starter's LLM alone, before training on images.

    python benchmarks/quality_llm.py LLM_DIR OUT [rtn-feedback,...]

LLM_DIR is the converted component `~/.cache/vila/parts/smollm2-135m-instruct`. Variants: full, rtn, awq with 1,024
calibration tokens, best with 8,192; rtn-feedback is GPTQ error feedback without the AWQ search.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vila.bench.quality import Way, markdown_table, measure_quality, quality_task, write_quality_report
from vila.core.system import system_info
from vila.quant.calibration import packaged_documents, text_calibration
from vila.quant.quant_config import BEST, QuantConfig

GROUP = 64


def main(folder: Path, out: Path, names: list[str]) -> None:
    """Measure and print the table."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def load() -> tuple[Any, Any]:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), None

    few, many = (text_calibration(packaged_documents(), tokenizer, max_sequences=rows) for rows in (2, 16))
    ways = {
        "full": Way("full"),
        "rtn": Way("rtn", QuantConfig("rtn", group_size=GROUP)),
        "awq": Way("awq", QuantConfig(group_size=GROUP), few),
        "rtn-feedback": Way("rtn-feedback", QuantConfig("rtn", rounding="gptq", group_size=GROUP), many),
        "best": Way("best", replace(BEST, group_size=GROUP), many),
    }
    result = measure_quality(load, [ways[name] for name in names], quality_task(tokenizer), out)
    write_quality_report(result, {"model": str(folder), **system_info()}, out / "quality.html")
    sys.stdout.write(markdown_table(result["ways"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), (sys.argv[3] if len(sys.argv) > 3 else "full,rtn,awq,best").split(","))
