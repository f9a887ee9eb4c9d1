"""What a checkpoint layout can do, and the table of those that exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vila.core.errors import LayoutError
from vila.core.registry import Registry
from vila.model.config import VilaConfig
from vila.model.processor import VilaProcessor
from vila.model.weights import Piece


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is understood but not read yet.

    pieces:     where each weight of ours lies, by our names.
    unclaimed:  tensors of its files that mean nothing to us; loading refuses them by name.
    generation: what generation_config.json says, for `model.generate`.
    """

    folder: Path
    config: VilaConfig
    processor: VilaProcessor
    pieces: Mapping[str, Piece]
    unclaimed: Sequence[str] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)


class ReadLayout(Protocol):
    """Recognises a directory and understands it as a checkpoint of ours."""

    name: str

    def recognises(self, folder: Path) -> bool:
        """Whether the directory is in this layout; looks at names and config only."""

    def open(self, folder: Path, base: Path | None = None) -> Checkpoint:
        """Understand the directory without reading tensors. `base` holds the LLM where the directory does not.

        Raises LayoutError naming what is missing, unknown or contradictory.
        """


class ModelLayout(ReadLayout, Protocol):
    """A layout in which any model of ours can also be written."""

    def write(self, model: Any, processor: VilaProcessor, folder: Path) -> None:
        """Write atomically, replacing a directory. Raises LayoutError for what the layout cannot express."""


LAYOUTS: Registry[ModelLayout] = Registry(
    "checkpoint layout",
    {
        "native": "vila.model.layouts.native:LAYOUT",
        "llava-hf": "vila.model.layouts.llava_hf:LAYOUT",
        "vila-v15": "vila.model.layouts.vila_v15:LAYOUT",
        "llava-v1": "vila.model.layouts.llava_v1:LAYOUT",
    },
)

READ_ONLY: Registry[ReadLayout] = Registry("layout of adapters", {"adapter": "vila.model.layouts.adapter:LAYOUT"})
"""Layouts of directories that need another one; training writes them, and what is read from them can be converted."""


def detect_layout(folder: Path) -> ReadLayout:
    """The layout of a directory. Raises LayoutError saying what the path is instead."""
    if not folder.exists():
        raise LayoutError(f"{folder}: no such directory")
    if not folder.is_dir():
        raise LayoutError(f"{folder}: a model is a directory, this is a file")
    # An adapter's directory also has the config of the whole model: it is asked first.
    for table in (READ_ONLY, LAYOUTS):
        for name in table:
            layout: ReadLayout = table[name]
            if layout.recognises(folder):
                return layout
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise LayoutError(f"{folder}: not a model in a layout known here ({', '.join(LAYOUTS)}); it holds {found}")
