"""The README.md beside a model in a layout of other programs: how each runs it, what was run, what is known wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

README = "README.md"


@dataclass(frozen=True)
class _Guide:
    """commands: pairs of a heading and shell lines, run in the directory itself."""

    summary: str
    commands: tuple[tuple[str, str], ...]
    versions: tuple[str, ...]
    defects: tuple[str, ...] = ()


_LOAD = "python -c \"from transformers import {0}; {0}.from_pretrained('.')\""
_HUB = _Guide(
    "A LLaVA model as stock transformers has it.",
    (
        ("Load it in transformers", _LOAD.format("AutoModelForImageTextToText")),
        ("Serve it with vLLM", "vllm serve ."),
        ("Serve it with SGLang", "python -m sglang.launch_server --model-path ."),
    ),
    ("transformers 5.23: run on a CPU", "vLLM, SGLang: made for them, not run"),
    ("With torchvision installed transformers resizes a little otherwise; `backend='pil'` does as VILA.",),
)
_AWQ = _Guide(
    "A model in 4 bits as AutoAWQ stores it (gemm).",
    (
        ("Ask it", 'vila run . --image photo.jpg --prompt "What is in the picture?"'),
        ("Serve it with vLLM", "vllm serve ."),
        ("Load it in transformers (needs gptqmodel and accelerate)", _LOAD.format("AutoModelForImageTextToText")),
    ),
    (
        "vila: run",
        "transformers 5.23 with gptqmodel: run where it is installed",
        "vLLM, SGLang: made for them, not run",
    ),
    ("transformers reads this packing on a CPU too, gemv and TinyChat's on CUDA and ROCm alone.",),
)
_OWN_NAMES = _Guide(
    "A model in 4 bits, in AutoAWQ's packing (gemm) under VILA's own names, which stock LLaVA cannot express.",
    (("Ask it", 'vila run . --image photo.jpg --prompt "What is in the picture?"'),),
    ("vila: run",),
    ("vLLM, SGLang and stock transformers do not know this model.",),
)
_TINYCHAT_VERSIONS = ("TinyChat of llm-awq since February 2024: made for it, not run",)
_TINYCHAT_DEFECTS = ("TinyChat needs a CUDA device, and the 16-bit model's directory beside this file.",)


def layout_readme(layout: str, model: Any, processor: Any) -> str:
    """The text for `llava-hf`, `awq-hf` and `tinychat`; empty for layouts that need none."""
    guide = _guide(layout, model, processor)
    return "" if guide is None else "\n".join(_lines(guide, model)) + "\n"


def _guide(layout: str, model: Any, processor: Any) -> _Guide | None:
    from vila.core.errors import LayoutError
    from vila.model.layouts import llava_hf, llava_v1

    if layout == "tinychat":
        try:
            llava_v1.refuse_to_write(model.config)
        except LayoutError:
            return _tinychat("vila15_demo.py", "VILA-1.5's three folders, the LLM of `llm/` in TinyChat's INT4 (v2).")
        return _tinychat("vila10_demo.py", "A model of VILA-1.0's form in TinyChat's INT4 (v2), whole in one file.")
    if layout == "awq-hf":
        try:
            llava_hf.refuse_to_write(model.config, processor)
        except LayoutError:
            return _OWN_NAMES
        return _AWQ
    return _HUB if layout == "llava-hf" else None


def _tinychat(demo: str, summary: str) -> _Guide:
    where = "llm/*-v2.pt" if demo == "vila15_demo.py" else "*-v2.pt"
    command = (
        f"python LLM_AWQ/tinychat/{demo} --model-path MODEL_16_BIT --quant-path {where} \\\n"
        "    --precision W4A16 --image-file a.jpg"
    )
    heading = "Ask it (LLM_AWQ is a checkout of llm-awq with its kernels built, MODEL_16_BIT the model before INT4)"
    return _Guide(summary, ((heading, command),), _TINYCHAT_VERSIONS, _TINYCHAT_DEFECTS)


def _lines(guide: _Guide, model: Any) -> Iterator[str]:
    from vila import __version__

    config = model.config
    yield from ("# How to run this model", "", guide.summary, "")
    yield (
        f"- {config.text_config.model_type} with {config.text_config.num_hidden_layers} layers of "
        f"{config.text_config.hidden_size}, a {config.vision_config.model_type} tower, the projector "
        f"{config.projector_type}"
    )
    yield f"- Conversation template: {f'`{config.template}`' if config.template else 'not known'}"
    yield from (f"- Written by vila {__version__}", "", "In this directory:")
    for heading, lines in guide.commands:
        yield from ("", f"{heading}:", "", "```sh", *lines.splitlines(), "```")
    for title, items in (("Versions", guide.versions), ("Known defects", guide.defects)):
        yield from ("", f"## {title}", "", *(f"- {item}" for item in items))
