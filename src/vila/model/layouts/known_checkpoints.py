"""Conversation templates of published checkpoints, whose files do not name them."""

from __future__ import annotations

from pathlib import Path

_TEMPLATES = {
    "vila-2.7b": "vicuna_v1",
    "vila-7b": "vicuna_v1",
    "vila-13b": "vicuna_v1",
    "vila1.5-3b": "vicuna_v1",
    "vila1.5-3b-s2": "vicuna_v1",
    "llama-3-vila1.5-8b": "llama_3",
    "vila1.5-13b": "vicuna_v1",
    "vila1.5-40b": "hermes-2",
    "llava-v1.5-7b": "vicuna_v1",
    "llava-v1.5-13b": "vicuna_v1",
    "llava-v1.5-7b-lora": "vicuna_v1",
    "llava-v1.5-13b-lora": "vicuna_v1",
    "llava-1.5-7b-hf": "vicuna_v1",
    "llava-1.5-13b-hf": "vicuna_v1",
}
"""Template by name of the published checkpoint (case-insensitive).

Only exact names of directories and hub repositories match, because a model with a wrong template still answers, but
worse.
"""


def known_template(folder: Path) -> str:
    """Return the template of a published checkpoint by its directory or hub name; empty for other names."""
    # The hub's cache: models--OWNER--NAME/snapshots/COMMIT.
    name = folder.parent.parent.name.rpartition("--")[2] if folder.parent.name == "snapshots" else folder.name
    return _TEMPLATES.get(name.lower(), "")
