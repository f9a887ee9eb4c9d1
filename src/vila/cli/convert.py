"""`vila convert`: write a model in another checkpoint layout."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from vila.cli import options
from vila.cli.options import CheckpointOptions, with_option_groups


class Layout(StrEnum):
    """Layouts that `vila convert` writes."""

    NATIVE = "native"
    LLAVA_HF = "llava-hf"
    LLAVA_V1 = "llava-v1"
    VILA_V15 = "vila-v15"
    AWQ_HF = "awq-hf"
    TINYCHAT = "tinychat"


READERS = {
    Layout.NATIVE: "vila itself, and transformers after `import vila.hf`",
    Layout.LLAVA_HF: "stock transformers, vLLM, SGLang, and llama.cpp's converter",
    Layout.LLAVA_V1: "the original code of LLaVA-1.5 and VILA-1.0",
    Layout.VILA_V15: "the original code of VILA-1.5",
    Layout.AWQ_HF: "vLLM, SGLang, and transformers with gptqmodel",
    Layout.TINYCHAT: "TinyChat of llm-awq",
}
"""Programs that read each layout."""
IN_4_BITS = (Layout.AWQ_HF, Layout.TINYCHAT)


@with_option_groups
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Model directory, or Hugging Face Hub id OWNER/NAME.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Output directory.")],
    layout: Annotated[str, typer.Option(metavar="|".join(Layout), help="Checkpoint layout to write.")],
    dtype: options.StoredDtype = options.Dtype.AUTO,
    checkpoint_options: CheckpointOptions = options.CHECKPOINT,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model in DST.")] = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Convert INT4 weights to float weights with the same values.")
    ] = False,
) -> None:
    """Convert the model [bold]SRC[/bold] to another checkpoint layout in the directory [bold]DST[/bold]."""
    from vila.cli.info import human_bytes
    from vila.core.errors import ConfigError
    from vila.core.files import write_text
    from vila.model.hub import local_folder
    from vila.model.layouts.detect import LAYOUTS
    from vila.model.loading import build_model, empty_model, open_checkpoint, parse_dtype, save_model

    chosen = _layout(layout, source)
    if dequantize and chosen in IN_4_BITS:
        raise ConfigError(f"--dequantize: {layout} holds models in 4 bits; leave it out, or choose another layout")
    target = target.expanduser()
    check_target(target, "DST", overwrite)
    stop_cleanly()
    folder = local_folder(source, checkpoint_options.revision or None)
    check_apart(folder, target)
    kind = parse_dtype(dtype.value)
    checkpoint = open_checkpoint(folder, **checkpoint_options.overrides)
    shapes, processor = empty_model(checkpoint, int4=not dequantize), checkpoint.processor
    LAYOUTS[chosen.value].check(shapes, processor)
    # Parameters that may be shared or in 4 bits count half a byte: the least that the files take.
    least = sum(parameter.numel() for parameter in shapes.parameters()) // 2
    check_target(target, "DST", overwrite, num_bytes=least)
    model = build_model(checkpoint, kind, int4=not dequantize)
    save_model(model, processor, target, layout=chosen.value)
    if text := layout_readme(chosen.value, model, processor):
        write_text(target / README, text)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    typer.echo(f"{target}: layout {chosen.value}, {_numbers(model)}")
    for path in files:
        typer.echo(f"  {path.relative_to(target).as_posix():<40} {human_bytes(path.stat().st_size):>9}")
    total = sum(path.stat().st_size for path in files)
    typer.echo(f"{len(files)} files, {human_bytes(total)}; for {READERS[chosen]}")
    if not processor.template:
        typer.echo("note: no conversation template is known, so none was written; give --template", err=True)


def _layout(name: str, source: str) -> Layout:
    """Return the layout with a name. Raises UnknownNameError, and ConfigError for what `vila export` writes."""
    from vila.core.errors import ConfigError, UnknownNameError
    from vila.export.base import EXPORTS

    if name in [one.value for one in Layout]:
        return Layout(name)
    if name in EXPORTS:
        hint = f"vila export {source} --format {name} --output DIR writes it"
        raise ConfigError("not a layout that models are loaded from", field="--layout", value=name, hint=hint)
    raise UnknownNameError("layout", name, [one.value for one in Layout], field="--layout")


def _numbers(model: Any) -> str:
    from vila.model.int4_weights import group_size_of

    size = group_size_of(model)
    return f"INT4 in groups of {size}, float16" if size else str(model.dtype).removeprefix("torch.")


def stop_cleanly() -> None:
    """Let SIGTERM end the command as Ctrl-C does: what is half-written is removed on the way out."""
    signal.signal(signal.SIGTERM, _stop)


def _stop(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def check_target(target: Path, field: str, overwrite: bool, num_bytes: int = 0) -> None:
    """Raise ConfigError unless a model of `num_bytes` can be written to the directory `target`.

    What is there may be replaced only with `overwrite`, and only if it is a model or an empty directory. What a killed
    writer left is removed, and a directory that it was replacing is put back.
    """
    from vila.core.errors import ConfigError, LayoutError
    from vila.core.files import check_writable, remove_partials
    from vila.model.layouts.detect import detect_layout

    if not os.path.lexists(target):
        check_writable(target, field=field, is_replaced=True, num_bytes=num_bytes)
        remove_partials(target.parent, target.name)
    if os.path.lexists(target):
        if not overwrite:
            raise ConfigError(f"{target}: exists already; give another name, or --overwrite to replace it")
        try:
            is_free = target.is_dir() and not any(target.iterdir())
            _ = is_free or detect_layout(target)
        except LayoutError as error:
            raise ConfigError(
                f"{target}: not a model, so --overwrite does not touch it; remove it yourself, or give another name"
            ) from error
        check_writable(target, field=field, is_replaced=True, num_bytes=num_bytes)


def check_apart(source: Path, target: Path) -> None:
    """Raises ConfigError when writing `target` would replace `source` while it is being read."""
    from vila.core.errors import ConfigError

    here, there = source.resolve(), target.resolve()
    if there == here or there in here.parents:
        raise ConfigError(f"{target}: holds the model that is converted; give another DST")


# --- layout_readme
# The README.md beside a model in a layout of other programs: how each runs it, what was run, what is known wrong.


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
            llava_v1.check_writable(model.config)
        except LayoutError:
            return _tinychat("vila15_demo.py", "VILA-1.5's three folders, the LLM of `llm/` in TinyChat's INT4 (v2).")
        return _tinychat("vila10_demo.py", "A model of VILA-1.0's form in TinyChat's INT4 (v2), whole in one file.")
    if layout == "awq-hf":
        try:
            llava_hf.check_writable(model.config, processor)
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
