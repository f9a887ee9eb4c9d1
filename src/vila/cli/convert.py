"""`vila convert`: write a model in another checkpoint layout."""

from __future__ import annotations

import os
import signal
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
INT4_LAYOUTS = (Layout.AWQ_HF, Layout.TINYCHAT)


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
    from vila import __version__
    from vila.cli.info import human_bytes
    from vila.core.errors import ConfigError
    from vila.core.files import write_text
    from vila.model.hub import local_folder
    from vila.model.layouts.detect import LAYOUTS
    from vila.model.layouts.readme import README, layout_readme
    from vila.model.loading import build_model, empty_model, open_checkpoint, parse_dtype, save_model

    chosen = _layout(layout, source)
    if dequantize and chosen in INT4_LAYOUTS:
        raise ConfigError(f"layout {layout} stores INT4 weights", field="--dequantize", hint="choose another layout")
    target = target.expanduser()
    check_target(target, "DST", overwrite)
    stop_cleanly()
    folder = local_folder(source, checkpoint_options.revision or None)
    check_apart(folder, target)
    kind = parse_dtype(dtype.value)
    checkpoint = open_checkpoint(folder, **checkpoint_options.overrides)
    shapes, processor = empty_model(checkpoint, int4=not dequantize), checkpoint.processor
    LAYOUTS[chosen.value].check(shapes, processor)
    # Lower bound of the file sizes: half a byte per parameter, as parameters may be shared or INT4.
    least = sum(parameter.numel() for parameter in shapes.parameters()) // 2
    check_target(target, "DST", overwrite, num_bytes=least)
    model = build_model(checkpoint, kind, int4=not dequantize)
    save_model(model, processor, target, layout=chosen.value)
    if text := layout_readme(chosen.value, model, processor, __version__):
        write_text(target / README, text)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    typer.echo(f"{target}: layout {chosen.value}, {_number_format(model)}")
    for path in files:
        typer.echo(f"  {path.relative_to(target).as_posix():<40} {human_bytes(path.stat().st_size):>9}")
    total = sum(path.stat().st_size for path in files)
    typer.echo(f"{len(files)} files, {human_bytes(total)}; for {READERS[chosen]}")
    if not processor.template:
        typer.echo("note: the conversation template is unknown and not written; give --template", err=True)


def _layout(name: str, source: str) -> Layout:
    """Return the layout with a name. Raises UnknownNameError, and ConfigError for formats of `vila export`."""
    from vila.core.errors import ConfigError, UnknownNameError
    from vila.export.base import EXPORTS

    if name in [one.value for one in Layout]:
        return Layout(name)
    if name in EXPORTS:
        hint = f"vila export {source} --format {name} --output DIR writes it"
        raise ConfigError("an export format, not a checkpoint layout", field="--layout", value=name, hint=hint)
    raise UnknownNameError("layout", name, [one.value for one in Layout], field="--layout")


def _number_format(model: Any) -> str:
    from vila.model.int4_weights import group_size_of

    size = group_size_of(model)
    return f"INT4 in groups of {size}, float16" if size else str(model.dtype).removeprefix("torch.")


def stop_cleanly() -> None:
    """Handle SIGTERM like Ctrl-C, so that partial output is removed."""
    signal.signal(signal.SIGTERM, _stop)


def _stop(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def check_target(target: Path, field: str, overwrite: bool, num_bytes: int = 0) -> None:
    """Raise ConfigError unless a model of `num_bytes` can be written to the directory `target`.

    With `overwrite`, an existing model or empty directory may be replaced; other directories never. Partial output of
    a killed process is removed, and a directory that it was replacing is restored.
    """
    from vila.core.errors import ConfigError, LayoutError
    from vila.core.files import check_writable, remove_partials
    from vila.model.layouts.detect import detect_layout

    if not os.path.lexists(target):
        check_writable(target, field=field, is_replaced=True, num_bytes=num_bytes)
        remove_partials(target.parent, target.name)
    if os.path.lexists(target):
        if not overwrite:
            raise ConfigError("already exists", file=target, hint="give another name, or --overwrite to replace it")
        try:
            is_free = target.is_dir() and not any(target.iterdir())
            _ = is_free or detect_layout(target)
        except LayoutError as error:
            hint = "remove it, or give another name"
            raise ConfigError("not a model; --overwrite replaces models only", file=target, hint=hint) from error
        check_writable(target, field=field, is_replaced=True, num_bytes=num_bytes)


def check_apart(source: Path, target: Path) -> None:
    """Raise ConfigError if writing `target` would replace `source` while it is read."""
    from vila.core.errors import ConfigError

    here, there = source.resolve(), target.resolve()
    if there == here or there in here.parents:
        raise ConfigError("contains the source model", file=target, hint="give another directory")
