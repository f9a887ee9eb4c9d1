"""Checkpoints of one process: tensors in safetensors, everything else in JSON; whole or absent."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vila.core.errors import CheckpointError, DataError
from vila.core.files import atomic_path, read_json, remove_partials, write_json
from vila.data.pack import LaneState


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. `tokens` and `samples` count what was seen, padding left out."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    supervised: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a run needs to go on: optimizer tensors, progress, lanes, the resolved recipe and the versions."""

    tensors: dict[str, Tensor]
    progress: Progress
    lanes: list[LaneState]
    recipe: dict[str, Any]
    versions: dict[str, str]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `folder/step-N` atomically, then delete the ones before it. A kill leaves the previous one whole."""
    target = folder / f"step-{checkpoint.progress.step:08d}"
    with atomic_path(target) as part:
        part.mkdir()
        save_file({name: value.contiguous() for name, value in checkpoint.tensors.items()}, part / "state.safetensors")
        state = {
            "progress": asdict(checkpoint.progress),
            "lanes": [[lane.next_position, list(lane.waiting)] for lane in checkpoint.lanes],
            "recipe": checkpoint.recipe,
            "versions": checkpoint.versions,
        }
        write_json(part / "state.json", state)
    for old in folder.glob("step-*"):
        if old != target:
            shutil.rmtree(old)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder`, or None when there is none.

    Raises CheckpointError naming the file that cannot be read and the remedy.
    """
    remove_partials(folder)
    found = sorted(folder.glob("step-*")) if folder.is_dir() else []
    if not found:
        return None
    newest = found[-1]
    try:
        state = read_json(newest / "state.json")
        tensors = load_file(newest / "state.safetensors")
        lanes = [LaneState(position, tuple(waiting)) for position, waiting in state["lanes"]]
        return Checkpoint(tensors, Progress(**state["progress"]), lanes, state["recipe"], state["versions"])
    except (OSError, SafetensorError, DataError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{newest}: cannot resume from it ({error}); delete that directory to start over"
        ) from error


def clear_checkpoints(folder: Path) -> None:
    """Delete all checkpoints of a finished run."""
    shutil.rmtree(folder, ignore_errors=True)


def versions() -> dict[str, str]:
    """Versions that a resumed run is compared with in its log."""
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
    }
