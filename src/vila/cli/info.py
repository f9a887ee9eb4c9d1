"""`vila info`: print layout, architecture and memory needs of a checkpoint, without reading its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from vila.cli import options
from vila.cli.options import CheckpointOptions, with_option_groups
from vila.model.inspect import ELEMENT_BYTES, MEMORY_NOTE

_NO_TEMPLATE = "unknown: give --template"
_SHAPE = {
    "layers": "layers",
    "width": "width",
    "heads": "heads",
    "kv_heads": "key-value heads",
    "mlp_width": "MLP width",
    "vocabulary": "vocabulary",
    "patch_size": "patch",
    "image_size": "image",
}
_KEPT = {
    "weights": "weights",
    "kv_cache_per_1000_tokens": "KV cache, 1,000 tokens",
    "kv_cache_full_context": "KV cache, full context",
}


@with_option_groups
def info(
    model: options.Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, sizes in bytes.")] = False,
    checkpoint_options: CheckpointOptions = options.CHECKPOINT,
) -> None:
    """Print layout, architecture, parameters and memory needs of [bold]MODEL[/bold]; reads no weights."""
    import sys

    from vila.model.inspect import inspect

    found = inspect(model, **checkpoint_options.overrides, revision=checkpoint_options.revision or None)
    facts = {"model": model, **found}
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
    elif sys.stdout.isatty():
        _show(facts)
    else:
        for name, value in _rows(facts):
            typer.echo(f"{name:<24}{value}")


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and text of each printed line."""
    storage = facts["storage"]
    yield "model", facts["model"]
    yield "layout", facts["layout"]
    yield "storage", f"{storage['format']}, {_files(storage['files'])}, {human_bytes(storage['bytes'])}"
    yield "parameters", f"{facts['parameters']:,}, mostly {facts['dtype']}"
    if int4 := facts["int4"]:
        yield (
            "INT4",
            (
                f"{int4['linears']} Linears in groups of {int4['group_size']} ({int4['packing']}), "
                f"{int4['parameters']:,} parameters, {human_bytes(int4['bytes'])}"
            ),
        )
    yield "template", facts["template"] or _NO_TEMPLATE
    yield (
        "image",
        (
            f"{facts['image_size']} x {facts['image_size']} pixels, mode {facts['image_mode']}, "
            f"{facts['tokens_per_image']} tokens"
        ),
    )
    yield "video", f"{facts['frames_per_video']} frames, {facts['frames_per_video'] * facts['tokens_per_image']} tokens"
    yield "context", f"{facts['context_length']:,} tokens"
    for name, part in facts["parts"].items():
        amount = f"{part['parameters']:,} parameters, {human_bytes(part['bytes'])}, {part['dtype'] or 'no weights'}"
        yield name, f"{part['type']}: {_shape(part)}; {amount}"
    for key, label in _KEPT.items():
        sizes = (f"{human_bytes(facts['memory'][kind][key])} in {kind}" for kind in ELEMENT_BYTES)
        yield label, ", ".join(sizes)
    yield "memory", MEMORY_NOTE


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(name, Text(value, style="yellow" if value == _NO_TEMPLATE else ""))
    Console(highlight=False).print(table)


def _shape(part: dict[str, Any]) -> str:
    if "width_in" in part:
        return f"width {part['width_in']} to {part['width_out']}"
    return ", ".join(f"{label} {part[key]:,}" for key, label in _SHAPE.items() if key in part)


def _files(count: int) -> str:
    return f"{count} file" if count == 1 else f"{count} files"


def human_bytes(size: int) -> str:
    """Return a size in binary units with three significant digits."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1000 or unit == "TiB":
            break
        value /= 1024
    return f"{int(value)} B" if unit == "B" else f"{value:.3g} {unit}"
