"""Registry of the checkpoint layouts, and detection of the layout of a directory."""

from __future__ import annotations

from pathlib import Path

from vila.core.errors import LayoutError
from vila.core.registry import Registry
from vila.model.layouts.base import Checkpoint, ModelLayout, ReadLayout
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
"""Layouts of models in 4 bits. A directory may be in the first and have what the second is known by."""

ADAPTER_LAYOUTS: Registry[ReadLayout] = Registry(
    "layout of adapters", {"adapter": "vila.model.layouts.lora_adapter:LAYOUT"}
)
"""Layouts of directories that need another one; training writes them, and what is read from them can be converted."""


TORCH_SUFFIX = ".pt"
"""Suffix of the one kind of file that is a model's weights by itself; what else belongs to it lies around it."""


def detect_layout(folder: Path) -> ReadLayout:
    """The layout of a directory, or of a `.pt` file. Raises LayoutError saying what the path is instead."""
    if not folder.exists():
        raise LayoutError("no such directory", file=folder)
    if folder.is_file() and folder.suffix != TORCH_SUFFIX:
        raise LayoutError("a model is a directory, this is a file", file=folder)
    # The directory of an adapter also has the config of the whole model, and that of a 4-bit model looks like another
    # one but for what it holds: they are asked first.
    for name in ADAPTER_LAYOUTS:
        if ADAPTER_LAYOUTS[name].matches(folder):
            return ADAPTER_LAYOUTS[name]
    for name in (*QUANTIZED_LAYOUTS, *(name for name in LAYOUTS if name not in QUANTIZED_LAYOUTS)):
        if LAYOUTS[name].matches(folder):
            return LAYOUTS[name]
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise LayoutError(
        f"not a model in a layout known here ({', '.join(LAYOUTS)}); it holds {found}",
        file=folder,
        hint=_model_below(folder),
    )


def _model_below(folder: Path) -> str | None:
    """Return a hint with the models of training runs in or below a directory, the last stage first."""
    found = [path.parent for path in folder.glob("model/config.json")]
    found += sorted((path.parent for path in folder.glob("*/model/config.json")), reverse=True)
    return f"did you mean {' or '.join(map(str, found[:3]))}?" if found else None


def open_folder(folder: Path, base: Path | None = None) -> Checkpoint:
    """Read the configs of a directory in any layout, and compare their sizes with the shapes of its weights.

    Raises LayoutError as the layout does, and for sizes that differ.
    """
    checkpoint = detect_layout(folder).open(folder, base)
    check_checkpoint_sizes(checkpoint)
    return checkpoint


def check_checkpoint_sizes(checkpoint: Checkpoint) -> None:
    """Compare the sizes of a config with the shapes of the weights, before any module is built.

    Raises LayoutError with file, field and both sizes.
    """
    sources = checkpoint.sources
    check_sizes(checkpoint.config, checkpoint.tensors, checkpoint.int4, text=sources.text, vision=sources.vision)


def detect_full_precision(folder: Path) -> ReadLayout | None:
    """The layout that a directory would have if its weights were in full precision; None when it has none."""
    for name in LAYOUTS:
        if name not in QUANTIZED_LAYOUTS and LAYOUTS[name].matches(folder):
            return LAYOUTS[name]
    return None
