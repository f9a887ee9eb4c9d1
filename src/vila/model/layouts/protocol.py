"""What a checkpoint layout can do, and the table of those that exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from vila.core.errors import LayoutError
from vila.core.registry import Registry


class ModelLayout(Protocol):
    """Recognises a directory, reads it into our model, and writes our model in its form."""

    def recognises(self, folder: Path) -> bool:
        """Whether the directory is in this layout; looks at names and config only."""

    def read(self, folder: Path, dtype: Any) -> tuple[Any, Any]:
        """Model and processor. Raises LayoutError listing every weight that is missing or unclaimed."""

    def write(self, model: Any, processor: Any, folder: Path) -> None:
        """Write atomically."""


LAYOUTS: Registry[ModelLayout] = Registry("checkpoint layout", {"native": "vila.model.layouts.native:LAYOUT"})


def detect_layout(folder: Path) -> ModelLayout:
    """The layout of a directory. Raises LayoutError saying what the path is instead."""
    if not folder.exists():
        raise LayoutError(f"{folder}: no such directory")
    if not folder.is_dir():
        raise LayoutError(f"{folder}: a model is a directory, this is a file")
    for name in LAYOUTS:
        layout = LAYOUTS[name]
        if layout.recognises(folder):
            return layout
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise LayoutError(f"{folder}: not a model in a layout known here ({', '.join(LAYOUTS)}); it holds {found}")
