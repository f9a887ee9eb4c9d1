"""Sending the metrics of a run to TensorBoard, Weights & Biases or Trackio, each a package that is imported when named.

A run that goes on is the same run there: its id lies in `trackers/` in the run's folder, and no step is sent twice.
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
from vila.core.distributed import current_process
from vila.core.errors import ConfigError
from vila.core.optional import require_all
from vila.core.reading import Fields
from vila.train.checkpoint import checkpoint_folders
from vila.train.report_data import LogReader
from vila.train.trainer import Trainer, TrainerCallback


class Service(Protocol):
    """One open run of a tracker. rewinds: it takes steps again that an earlier session sent, and forgets those."""

    rewinds: bool

    def send(self, values: dict[str, float], step: int) -> None:
        """Values by name, of a step."""

    def close(self) -> None:
        """Send what waits, and end the run."""


def open_trackers(recipe: Recipe, folder: Path) -> list[TrainerCallback]:
    """A listener for each of `monitor.trackers`, opened now; none in processes that write no files.

    folder: of the run. Listeners that write `evaluations.jsonl` come before these in the list, so that scores go along.
    Raises MissingExtraError for absent packages and ConfigError when a tracker cannot be opened.
    """
    require_trackers(recipe)
    if not current_process().is_main:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    return [Tracker(name, recipe, folder) for name in recipe.monitor.trackers]


def require_trackers(recipe: Recipe) -> None:
    """Import the packages of `monitor.trackers`. Raises one MissingExtraError that names all absent ones."""
    require_all({name: _MODULES[name] for name in recipe.monitor.trackers}, "monitor.trackers")


class Tracker:
    """Sends each step to one service, and each evaluation with the step after which it was made."""

    def __init__(self, name: str, recipe: Recipe, folder: Path) -> None:
        self._state = folder / "trackers" / f"{name}.json"
        self._scores = LogReader(folder / "evaluations.jsonl")
        # Without a checkpoint a run begins anew, there too.
        goes_on = self._state.is_file() and bool(checkpoint_folders(folder / "checkpoint"))
        before = Fields.of_file(self._state) if goes_on else Fields({}, self._state)
        self._id = before.text("id", "") or uuid.uuid4().hex[:8]
        self._sent = before.integer("step", 0, maximum=2**62)
        try:
            self._service = _SERVICES[name](recipe, folder, self._id)
        except Exception as error:
            raise ConfigError(
                f"monitor.trackers: {name} cannot be opened ({type(error).__name__}: {error}); "
                "take it out of the list, or make it work by itself first"
            ) from error
        if self._service.rewinds:
            self._sent = 0
        # A run that is stopped ends by an exception; what the service still holds is sent then.
        atexit.register(self.close)

    def __call__(self, trainer: Trainer, facts: dict[str, Any]) -> None:
        """Send a step, unless an earlier session sent it before it was killed."""
        step = facts["step"]
        values = {f"train/{name}": value for name, value in flat(facts).items()} | self._new_scores(step)
        if step > self._sent:
            self._send(step, values)

    def finish(self, trainer: Trainer) -> None:
        """Send the scores of an evaluation at the end, and close."""
        step = trainer.progress.step
        if (scores := self._new_scores(step)) and step >= self._sent:
            self._send(step, scores)
        self.close()

    def close(self) -> None:
        """End the run in the service; a second call does nothing."""
        service, self._service = self._service, _Closed()
        service.close()
        atexit.unregister(self.close)

    def _send(self, step: int, values: dict[str, float]) -> None:
        self._service.send(values, step)
        self._sent = step
        self._state.parent.mkdir(parents=True, exist_ok=True)
        part = self._state.with_suffix(".part")
        # Not brought onto the disk at every step, which would take longer than the sending.
        part.write_text(json.dumps({"id": self._id, "step": step}), encoding="utf-8")
        part.replace(self._state)

    def _new_scores(self, step: int) -> dict[str, float]:
        """Scores of this step that were written since the step before."""
        if self._scores.was_cut():
            self._scores = LogReader(self._scores.path)
        rows = [row for row in self._scores if row["step"] == step]
        return {f"eval/{row['benchmark']}": row["score"] for row in rows if row.get("score") is not None}


def flat(facts: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the facts of a step by name; `loss_by_data_set` becomes `loss/NAME`, those not finite are out.

    `step` is left out: services count steps themselves.
    """
    out: dict[str, float] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            short = name.removesuffix("_by_data_set")
            out |= {f"{short}/{key}": number for key, number in flat(value).items()}
        elif name != "step" and isinstance(value, int | float) and math.isfinite(value):
            out[name] = value
    return out


class _TensorBoard:
    """Event files in `tensorboard/`. It forgets itself what an earlier session wrote past the step that comes next."""

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
    """A run of wandb or Trackio, which share their calls."""

    rewinds = False

    def __init__(self, run: Any) -> None:
        self._run = run

    def send(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _Closed:
    """What a tracker holds after its end."""

    rewinds = False

    def send(self, values: dict[str, float], step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


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
    # Trackio knows runs by their names.
    name = f"{recipe.name}-{run_id}".replace("/", "-")
    config = recipe.model_dump(mode="json")
    return _Run(import_module("trackio").init(recipe.monitor.project, name=name, config=config, resume="allow"))


_SERVICES: dict[str, Callable[[Recipe, Path, str], Service]] = {
    "tensorboard": _TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
