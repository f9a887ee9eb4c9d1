"""Train to the end, and compare two runs by every loss and every weight in float32."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.train.tiny_run import tiny_recipe
from vila.core.errors import Interrupted
from vila.train.build import Run, build
from vila.train.checkpoint_files import MANIFEST, digest_files, write_manifest
from vila.train.metrics import read_metrics
from vila.train.train_state import gather_full_tensors
from vila.train.trainer import TrainerCallback

FACTS = ("step", "tokens_seen", "loss", "loss_by_data_set", "lr", "grad_norm", "supervised", "images")


def finish(folder: Path, out: str, overrides: Sequence[str], change: Callable[[Run], None] | None = None) -> Any:
    """Start or resume a run and train to its end; return the metrics of all steps and the weights, None on other ranks.

    change: what is done to the run before it trains.
    """
    run = build(tiny_recipe(folder, out, *overrides))
    if change:
        change(run)
    run.trainer.run()
    run.trainer.checkpointer.writer.wait()
    weights = gather_full_tensors(run.model, torch.float32, run.world)
    run.world.all_gather_object(None)
    if weights is None:
        return None
    rows = [{name: row[name] for name in FACTS} for row in read_metrics(run.folder / "metrics.jsonl")]
    return rows, {name: value.numpy() for name, value in weights.items()}


def assert_identical(ours: Any, theirs: Any) -> None:
    """Assert that all metrics and all weights are bit-identical."""
    assert ours[0] == theirs[0]
    assert len(ours[0]) > 5
    assert ours[1].keys() == theirs[1].keys()
    assert all((value == theirs[1][name]).all() for name, value in ours[1].items())


def sign(folder: Path) -> None:
    """Rewrite the manifest of a checkpoint after a deliberate change to its files."""
    write_manifest(folder, digest_files(folder, [file.name for file in folder.iterdir() if file.name != MANIFEST]))


class on_step(TrainerCallback):
    """A callback that calls a function after every step."""

    def __init__(self, function: Callable[[Any, dict[str, Any]], None]) -> None:
        self.on_step_end = function  # type: ignore[method-assign, assignment]


def stop_after(step: int, number: int = signal.SIGINT, rank: int = 0) -> TrainerCallback:
    """A callback that sends a signal to its own process after a step."""

    def listen(trainer: Any, facts: dict[str, Any]) -> None:
        if facts["step"] == step and trainer.world.process.rank == rank:
            os.kill(os.getpid(), number)

    return on_step(listen)


def stopped(folder: Path, out: str, overrides: Sequence[str], step: int, number: int, rank: int = 0) -> tuple[int, Any]:
    """Train until a signal stops the run; return the exit code and the last step of the error."""
    try:
        build(tiny_recipe(folder, out, *overrides), callbacks=[stop_after(step, number, rank)]).train()
    except Interrupted as error:
        return error.exit_code, error.record
    return -1, None
