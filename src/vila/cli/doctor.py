"""`vila doctor`: print versions, devices and optional dependencies of this installation."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import typer

from vila.core.optional import EXTRAS
from vila.core.system import cpu_name, version

_REQUIRED = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "sentencepiece",
    "pillow",
    "av",
    "pydantic",
    "gguf",
    "onnx",
)
_PURPOSES = {
    "serve": "vila serve, vila bench serve",
    "demo": "vila demo",
    "lora": "stage.lora",
    "eval": "xlsx files of vila submit",
    "onnx": "--backend onnx",
}


def doctor() -> None:
    """Print versions, devices, dtypes and disk space. Exit code 1 if a required package is missing."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="vila doctor", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    missing = [name for name in _REQUIRED if version(name) is None]
    for name, value in _rows(missing):
        table.add_row(name, value)
    Console(highlight=False).print(table)
    if missing:
        typer.echo(f"missing: {', '.join(missing)}; install with: pip install vila-vlm", err=True)
        raise typer.Exit(1)


def _rows(missing: list[str]) -> Iterator[tuple[str, str]]:
    from rich.markup import escape

    from vila import __version__
    from vila.core.files import cache_dir

    yield "vila", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in _REQUIRED:
        yield name, version(name) or "[red]missing[/red]"
    if "torch" not in missing:
        yield from _torch_rows()
    cache = cache_dir()
    for label, folder in (("disk, here", Path.cwd()), ("disk, cache", _existing(cache))):
        usage = shutil.disk_usage(folder)
        yield label, f"{usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.0f}"
    yield "cache", str(cache)
    for extra, packages in EXTRAS.items():
        absent = [name for name in packages if version(name) is None]
        remedy = escape(f"{', '.join(absent)}; pip install 'vila-vlm[{extra}]'")
        state = f"[yellow]not installed[/yellow]: {remedy}" if absent else "installed"
        yield f"{_PURPOSES[extra]} (optional)", state


def _torch_rows() -> Iterator[tuple[str, str]]:
    import torch

    from vila.model.loading import choose_dtype, has_fast_bfloat16

    yield "cpu", f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield "cpu capability", torch.backends.cpu.get_cpu_capability()
    yield "bfloat16 on the cpu", "native" if has_fast_bfloat16() else "emulated; float32 is used instead"
    yield "default dtype", str(choose_dtype("auto")).removeprefix("torch.")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.device_count():
        yield "cuda", "no device"


def _existing(folder: Path) -> Path:
    while not folder.is_dir():
        folder = folder.parent
    return folder
