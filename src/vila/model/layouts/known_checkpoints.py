"""Conversation templates of published checkpoints, whose files do not name them."""

from __future__ import annotations

from pathlib import Path

_CHECKPOINTS = {
    "vicuna_v1": (
        *("vila-2.7b", "vila-7b", "vila-13b", "vila1.5-3b", "vila1.5-3b-s2", "vila1.5-13b"),
        *("llava-v1.5-7b", "llava-v1.5-13b", "llava-v1.5-7b-lora", "llava-v1.5-13b-lora"),
        *("llava-1.5-7b-hf", "llava-1.5-13b-hf"),
    ),
    "llama_3": ("llama-3-vila1.5-8b",),
    "hermes-2": ("vila1.5-40b",),
}
"""Names of published checkpoints (case-insensitive) by template.

Only exact names of directories and hub repositories match, because a model with a wrong template still answers, but
worse.
"""


def known_template(folder: Path) -> str:
    """Return the template of a published checkpoint by its directory or hub name; empty for other names."""
    # The hub's cache: models--OWNER--NAME/snapshots/COMMIT.
    name = folder.parent.parent.name.rpartition("--")[2] if folder.parent.name == "snapshots" else folder.name
    return next((template for template, names in _CHECKPOINTS.items() if name.lower() in names), "")
