"""Experiment trackers: send the metrics of a run to TensorBoard, Weights & Biases or Trackio.

A resumed run continues the same run of the tracker: its id is stored in `trackers/` in the run's directory, and no step
is sent twice. Each package is imported only if the recipe names it.
"""

from __future__ import annotations

import atexit
import json
import math
import uuid
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from vila.config.schema import Recipe
from vila.core.errors import ConfigError
from vila.core.optional import require_all
from vila.core.reading import Fields
from vila.core.system import current_process
from vila.train.checkpoint import checkpoint_folders
from vila.train.report_data import LogReader
from vila.train.trainer import Trainer, TrainerCallback


class Service(Protocol):
    """An open run of a tracker.

    rewinds: the service accepts steps again that an earlier session sent, and discards the old values.
    """

    rewinds: bool

    def send(self, values: dict[str, float], step: int) -> None:
        """Send the values of a step, by name."""

    def close(self) -> None:
        """Send buffered values and end the run."""


def open_trackers(recipe: Recipe, folder: Path) -> list[TrainerCallback]:
    """Open `monitor.trackers` and return their callbacks; none on ranks other than 0.

    folder: directory of the run. In the trainer's list these follow callbacks that write `evaluations.jsonl`, so that
    scores are sent with their step.
    Raises MissingExtraError for absent packages and ConfigError for a tracker that cannot be opened.
    """
    require_trackers(recipe)
    if not current_process().is_main:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    return [Tracker(name, recipe, folder) for name in recipe.monitor.trackers]


def require_trackers(recipe: Recipe) -> None:
    """Import the packages of `monitor.trackers`. Raises one MissingExtraError that names all absent packages."""
    require_all({name: _MODULES[name] for name in recipe.monitor.trackers}, "monitor.trackers")


class Tracker(TrainerCallback):
    """Sends each step to one service, and each evaluation with its step."""

    def __init__(self, name: str, recipe: Recipe, folder: Path) -> None:
        self._state = folder / "trackers" / f"{name}.json"
        self._scores = LogReader(folder / "evaluations.jsonl")
        # A run without a checkpoint starts over; so does its run of the tracker.
        is_resumed = self._state.is_file() and bool(checkpoint_folders(folder / "checkpoint"))
        before = Fields.of_file(self._state) if is_resumed else Fields({}, self._state)
        self._is_closed = False
        self._id = before.text("id", "") or uuid.uuid4().hex[:8]
        self._sent = before.integer("step", 0, maximum=2**62)
        try:
            self._service = _SERVICES[name](recipe, folder, self._id)
        except Exception as error:
            raise ConfigError(
                f"cannot be opened ({type(error).__name__}: {error})",
                field="monitor.trackers",
                value=name,
                hint="remove it from the list, or check its own setup",
            ) from error
        if self._service.rewinds:
            self._sent = 0
        # A stopped run ends with an exception; buffered values are sent at exit.
        atexit.register(self.close)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Send a step, unless an earlier session sent it before it was killed."""
        step = metrics["step"]
        values = {f"train/{name}": value for name, value in flatten_metrics(metrics).items()} | self._new_scores(step)
        if step > self._sent:
            self._send(step, values)

    def on_train_end(self, trainer: Trainer) -> None:
        """Send the scores of the final evaluation, and close."""
        step = trainer.progress.step
        if (scores := self._new_scores(step)) and step >= self._sent:
            self._send(step, scores)
        self.close()

    def close(self) -> None:
        """End the run of the service. Further calls do nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._service.close()
            atexit.unregister(self.close)

    def _send(self, step: int, values: dict[str, float]) -> None:
        if self._is_closed:
            return
        self._service.send(values, step)
        self._sent = step
        self._state.parent.mkdir(parents=True, exist_ok=True)
        part = self._state.with_suffix(".part")
        # No fsync: at every step it would take longer than sending.
        part.write_text(json.dumps({"id": self._id, "step": step}), encoding="utf-8")
        part.replace(self._state)

    def _new_scores(self, step: int) -> dict[str, float]:
        """Return the scores of this step that were written since the last call."""
        if self._scores.was_cut():
            self._scores = LogReader(self._scores.path)
        records = [record for record in self._scores if record["step"] == step]
        return {f"eval/{one['benchmark']}": one["score"] for one in records if one.get("score") is not None}


def flatten_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers in a step's metrics by name, without `step`; `loss_by_data_set` becomes `loss/NAME`."""
    out: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            short = name.removesuffix("_by_data_set")
            out |= {f"{short}/{key}": number for key, number in flatten_metrics(value).items()}
        elif name != "step" and isinstance(value, int | float) and math.isfinite(value):
            out[name] = value
    return out


class _TensorBoard:
    """Event files in `tensorboard/`. `purge_step` discards what an earlier session wrote after the resumed step."""

    rewinds = True

    def __init__(self, recipe: Recipe, folder: Path, run_id: str) -> None:
        self._writer: Any = None
        self._folder = folder / "tensorboard"

    def send(self, values: dict[str, float], step: int) -> None:
        if self._writer is None:
            module = import_module("torch.utils.tensorboard")
            self._writer = module.SummaryWriter(str(self._folder), purge_step=step, flush_secs=30)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Run:
    """A run of wandb or Trackio, which have the same interface."""

    rewinds = False

    def __init__(self, run: Any) -> None:
        self._run = run

    def send(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb(recipe: Recipe, folder: Path, run_id: str) -> Service:
    return _Run(
        import_module("wandb").init(
            project=recipe.monitor.project,
            name=recipe.name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=recipe.model_dump(mode="json"),
        )
    )


def _trackio(recipe: Recipe, folder: Path, run_id: str) -> Service:
    # Trackio identifies runs by name.
    name = f"{recipe.name}-{run_id}".replace("/", "-")
    config = recipe.model_dump(mode="json")
    return _Run(import_module("trackio").init(recipe.monitor.project, name=name, config=config, resume="allow"))


_SERVICES: dict[str, Callable[[Recipe, Path, str], Service]] = {
    "tensorboard": _TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
