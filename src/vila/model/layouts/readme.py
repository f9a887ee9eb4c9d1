"""README.md of models in layouts of other programs: how to run them there, tested versions, known defects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vila.model.layouts import llava_hf, llava_v1

README = "README.md"


@dataclass(frozen=True)
class _Guide:
    """How to use a layout in other programs. commands: (heading, shell lines), run in the model directory."""

    summary: str
    commands: tuple[tuple[str, str], ...]
    versions: tuple[str, ...]
    defects: tuple[str, ...] = ()


_LOAD = "python -c \"from transformers import {0}; {0}.from_pretrained('.')\""
_HUB = _Guide(
    "A LLaVA model in the format of stock transformers.",
    (
        ("Load with transformers", _LOAD.format("AutoModelForImageTextToText")),
        ("Serve with vLLM", "vllm serve ."),
        ("Serve with SGLang", "python -m sglang.launch_server --model-path ."),
    ),
    ("transformers 5.23: tested on a CPU", "vLLM, SGLang: not tested"),
    ("With torchvision installed, transformers resizes images slightly differently; `backend='pil'` matches VILA.",),
)
_AWQ = _Guide(
    "An INT4 model in AutoAWQ's gemm packing.",
    (
        ("Generate an answer", 'vila run . --image photo.jpg --prompt "What is in the image?"'),
        ("Serve with vLLM", "vllm serve ."),
        ("Load with transformers (requires gptqmodel and accelerate)", _LOAD.format("AutoModelForImageTextToText")),
    ),
    ("vila: tested", "transformers 5.23 with gptqmodel: tested where it is installed", "vLLM, SGLang: not tested"),
    ("transformers runs this packing on CPU, CUDA and ROCm; the gemv and TinyChat packings on CUDA and ROCm only.",),
)
_OWN_NAMES = _Guide(
    "An INT4 model in AutoAWQ's gemm packing with VILA's weight names, because stock LLaVA does not support it.",
    (("Generate an answer", 'vila run . --image photo.jpg --prompt "What is in the image?"'),),
    ("vila: tested",),
    ("vLLM, SGLang and stock transformers do not support this model.",),
)
_TINYCHAT_VERSIONS = ("TinyChat of llm-awq since February 2024: not tested",)
_TINYCHAT_DEFECTS = ("TinyChat requires a CUDA device and the directory of the 16-bit model.",)


def layout_readme(layout: str, model: Any, processor: Any, version: str) -> str:
    """Return the README text of `llava-hf`, `awq-hf` and `tinychat`; empty for other layouts. version: of vila."""
    guide = _guide(layout, model, processor)
    return "" if guide is None else "\n".join(_lines(guide, model, version)) + "\n"


def _guide(layout: str, model: Any, processor: Any) -> _Guide | None:
    if layout == "tinychat":
        if llava_v1.LAYOUT.supports(model.config, processor):
            return _tinychat("vila10_demo.py", "A VILA-1.0 model in TinyChat's INT4 packing (v2), in one file.")
        return _tinychat("vila15_demo.py", "VILA-1.5 directories, the LLM in `llm/` in TinyChat's INT4 packing (v2).")
    if layout == "awq-hf":
        return _AWQ if llava_hf.LAYOUT.supports(model.config, processor) else _OWN_NAMES
    return _HUB if layout == "llava-hf" else None


def _tinychat(demo: str, summary: str) -> _Guide:
    where = "llm/*-v2.pt" if demo == "vila15_demo.py" else "*-v2.pt"
    command = (
        f"python LLM_AWQ/tinychat/{demo} --model-path MODEL_16_BIT --quant-path {where} \\\n"
        "    --precision W4A16 --image-file a.jpg"
    )
    heading = "Generate an answer (LLM_AWQ: llm-awq with built kernels, MODEL_16_BIT: the model before quantization)"
    return _Guide(summary, ((heading, command),), _TINYCHAT_VERSIONS, _TINYCHAT_DEFECTS)


def _lines(guide: _Guide, model: Any, version: str) -> Iterator[str]:
    config = model.config
    yield from ("# How to run this model", "", guide.summary, "")
    yield (
        f"- {config.text_config.model_type} with {config.text_config.num_hidden_layers} layers of "
        f"{config.text_config.hidden_size}, a {config.vision_config.model_type} tower, the projector "
        f"{config.projector_type}"
    )
    yield f"- Conversation template: {f'`{config.template}`' if config.template else 'unknown'}"
    yield from (f"- Written by vila {version}", "", "In this directory:")
    for heading, lines in guide.commands:
        yield from ("", f"{heading}:", "", "```sh", *lines.splitlines(), "```")
    for title, items in (("Versions", guide.versions), ("Known defects", guide.defects)):
        yield from ("", f"## {title}", "", *(f"- {item}" for item in items))
