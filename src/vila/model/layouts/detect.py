"""Registry of checkpoint layouts, and detection of a directory's layout."""

from __future__ import annotations

from pathlib import Path

from vila.core.errors import LayoutError
from vila.core.registry import Registry
from vila.model.layouts.base import CheckpointFiles, ModelLayout, ReadLayout
from vila.model.layouts.config_file import check_sizes

LAYOUTS: Registry[ModelLayout] = Registry(
    "checkpoint layout",
    {
        "native": "vila.model.layouts.native:LAYOUT",
        "llava-hf": "vila.model.layouts.llava_hf:LAYOUT",
        "vila-v15": "vila.model.layouts.vila_v15:LAYOUT",
        "llava-v1": "vila.model.layouts.llava_v1:LAYOUT",
        "awq-hf": "vila.model.layouts.awq:LAYOUT",
        "tinychat": "vila.model.layouts.tinychat:LAYOUT",
    },
)

QUANTIZED_LAYOUTS = ("tinychat", "awq-hf")
"""Layouts of 4-bit models, tested in this order: a tinychat directory may also match awq-hf."""

ADAPTER_LAYOUTS: Registry[ReadLayout] = Registry(
    "adapter layout", {"adapter": "vila.model.layouts.lora_adapter:LAYOUT"}
)
"""Layouts of directories that need a base model: they can be read and converted, and training writes them."""


TORCH_SUFFIX = ".pt"
"""Suffix of weight files that can be opened without a directory; config and tokenizer are next to them."""


def detect_layout(folder: Path) -> ReadLayout:
    """Return the layout of a directory or `.pt` file. Raises LayoutError with the content of an unknown directory."""
    if not folder.exists():
        raise LayoutError("no such directory", file=folder)
    if folder.is_file() and folder.suffix != TORCH_SUFFIX:
        raise LayoutError("a file, not a model directory", file=folder)
    # Adapters and 4-bit models also match the layout of the full-precision model, so they are tested first.
    for name in ADAPTER_LAYOUTS:
        if ADAPTER_LAYOUTS[name].matches(folder):
            return ADAPTER_LAYOUTS[name]
    for name in (*QUANTIZED_LAYOUTS, *(name for name in LAYOUTS if name not in QUANTIZED_LAYOUTS)):
        if LAYOUTS[name].matches(folder):
            return LAYOUTS[name]
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    problem = f"no known checkpoint layout; the directory contains {found}"
    raise LayoutError(problem, file=folder, expected=", ".join(LAYOUTS), hint=_model_below(folder))


def _model_below(folder: Path) -> str | None:
    """Return a hint with the models of training runs in or below a directory, the last stage first."""
    found = [path.parent for path in folder.glob("model/config.json")]
    found += sorted((path.parent for path in folder.glob("*/model/config.json")), reverse=True)
    return f"did you mean {' or '.join(map(str, found[:3]))}?" if found else None


def open_folder(folder: Path, base: Path | None = None) -> CheckpointFiles:
    """Detect and open a directory, and compare its config with the shapes of its weights.

    Raises LayoutError as the layout does, and for sizes that differ.
    """
    checkpoint = detect_layout(folder).open(folder, base)
    check_checkpoint_sizes(checkpoint)
    return checkpoint


def check_checkpoint_sizes(checkpoint: CheckpointFiles) -> None:
    """Compare the sizes of a config with the shapes of the weights, before any module is built.

    Raises LayoutError with file, field and both sizes.
    """
    sources = checkpoint.sources
    check_sizes(checkpoint.settings, checkpoint.tensors, checkpoint.int4, text=sources.text, vision=sources.vision)


def detect_full_precision(folder: Path) -> ReadLayout | None:
    """Return the layout that a directory would have with full-precision weights; None if there is none."""
    for name in LAYOUTS:
        if name not in QUANTIZED_LAYOUTS and LAYOUTS[name].matches(folder):
            return LAYOUTS[name]
    return None
