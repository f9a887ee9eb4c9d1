"""Evaluation during training: trainer callbacks that answer fixed prompts and run a benchmark every few steps.

They do not affect training: modes and random number generators are restored, and losses stay bit-identical.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vila.config.schema import Prompt
from vila.core.errors import VilaError
from vila.core.files import portable_path, write_json
from vila.core.progress import SILENT, Events, task
from vila.core.types import Image, Message
from vila.engine.engine import Engine
from vila.eval.benchmark import Benchmark
from vila.eval.runner import BenchmarkRun, run_benchmark
from vila.model.processor import VilaProcessor
from vila.train.metrics import MetricsLog, read_metrics
from vila.train.random_state import random_state, set_random_state
from vila.train.trainer import Trainer, TrainerCallback


class PromptCallback(TrainerCallback):
    """Answers fixed prompts every few steps and at the end of training; appends to `answers.jsonl`."""

    def __init__(
        self, prompts: tuple[Prompt, ...], every: int, folder: Path, processor: VilaProcessor, events: Events
    ) -> None:
        """every: steps between answers; 0: only at the end."""
        self.prompts, self.every, self.processor, self.events = prompts, every, processor, events
        self.folder = folder
        self._log = _Log(folder / "answers.jsonl")

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Answer the prompts every `every` steps."""
        self._log.open(trainer, metrics["step"] - 1)
        if self.every and metrics["step"] % self.every == 0:
            self._answer(trainer, metrics["step"])

    def on_train_end(self, trainer: Trainer) -> None:
        """Answer the prompts, unless the last step did."""
        self._log.open(trainer, trainer.progress.step)
        if trainer.progress.step not in self._log.steps:
            self._answer(trainer, trainer.progress.step)

    def _answer(self, trainer: Trainer, step: int) -> None:
        with task(self.events, f"prompts after step {step:,}", len(self.prompts), "answers"), inference_mode(trainer):
            engine = Engine(trainer.state.model, self.processor)
            for prompt in self.prompts:
                row: dict[str, Any] = {"prompt": prompt.text, "image": portable_path(prompt.image, self.folder)}
                parts: list[Image | str] = [*([Image(prompt.image)] if prompt.image else []), prompt.text]
                try:
                    row["answer"] = engine.generate([Message.of("user", *parts)])
                except VilaError as error:
                    # A prompt that exceeds the context must not stop the run.
                    row |= {"answer": "", "error": str(error)}
                    self.events.log(f"prompt {prompt.text!r} has no answer: {error}")
                self._log.write(trainer, step, row)
                self.events.advanced(f"prompts after step {step:,}")


class EvaluationCallback(TrainerCallback):
    """Runs a benchmark every few steps and at the end of training.

    Appends to `evaluations.jsonl`, writes the best score to `best.json` and predictions below `evaluations/`.
    """

    def __init__(
        self, benchmark: Benchmark, every: int, folder: Path, processor: VilaProcessor, events: Events
    ) -> None:
        self.benchmark, self.every, self.folder, self.processor, self.events = (
            benchmark, every, folder, processor, events,
        )  # fmt: skip
        self._log = _Log(folder / "evaluations.jsonl")

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Evaluate every `every` steps."""
        if self._log.open(trainer, metrics["step"] - 1):
            self._write_best(trainer)
        if metrics["step"] % self.every == 0:
            self._evaluate(trainer, metrics["step"])

    def on_train_end(self, trainer: Trainer) -> None:
        """Evaluate the trained model, unless the last step did."""
        self._log.open(trainer, trainer.progress.step)
        if trainer.progress.step not in self._log.steps:
            self._evaluate(trainer, trainer.progress.step)

    def _evaluate(self, trainer: Trainer, step: int) -> None:
        began = time.monotonic()
        with inference_mode(trainer), self._output_dir(trainer, step) as out:
            result = run_benchmark(
                Engine(trainer.state.model, self.processor),
                self.benchmark,
                out,
                model_id=f"{trainer.name} after step {step}",
                events=self.events if trainer.world.is_main else SILENT,
            )
        assert result  # every rank answers every question: sharded weights need all ranks at every token
        self._log.write(trainer, step, _record(result, time.monotonic() - began))
        self._write_best(trainer)

    @contextmanager
    def _output_dir(self, trainer: Trainer, step: int) -> Iterator[Path]:
        """Provide an empty output directory; existing predictions would make ranks skip different questions."""
        if trainer.world.is_main:
            out = self.folder / "evaluations" / f"step-{step:08d}"
            shutil.rmtree(out, ignore_errors=True)
            yield out
        else:
            with tempfile.TemporaryDirectory() as temporary:
                yield Path(temporary)

    def _write_best(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            return
        path = self.folder / "best.json"
        scored = [row for row in self._log.read() if row.get("score") is not None]
        if scored:
            # The first of equals, whose checkpoint has been kept since.
            best = max(scored, key=lambda row: (row["score"], -row["step"]))
            write_json(path, {key: best[key] for key in ("step", "benchmark", "score")})
        else:
            path.unlink(missing_ok=True)


@contextmanager
def inference_mode(trainer: Trainer) -> Iterator[None]:
    """Unshard the model and set eval mode on every rank; afterwards restore all modes and random number generators."""
    modes = {module: module.training for module in trainer.state.model.modules()}
    state = random_state()
    try:
        with trainer.state.unsharded_model():
            trainer.state.model.eval()
            yield
    finally:
        for module, training in modes.items():
            # Not `train()`, which also changes submodules.
            module.training = training
        set_random_state(state)


class _Log:
    """A log with records of some steps. It is opened at the first callback, when the resumed step is known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: set[int] = set()
        self._file: MetricsLog | None = None
        self._is_open = False

    def open(self, trainer: Trainer, step: int) -> bool:
        """Drop the records after `step` at the first call; return whether this was the first call."""
        if self._is_open:
            return False
        self._is_open = True
        # Every rank reads the same file and must get the same result.
        self.steps = {row["step"] for row in read_metrics(self.path) if row["step"] <= step}
        if trainer.world.is_main:
            self._file = MetricsLog(self.path, step)
        return True

    def write(self, trainer: Trainer, step: int, row: dict[str, Any]) -> None:
        self.steps.add(step)
        if self._file:
            self._file.write(step=step, **row)

    def read(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)


def _record(run: BenchmarkRun, seconds: float) -> dict[str, Any]:
    result = run.result
    return {
        "benchmark": run.benchmark,
        "score": result.score if result else None,
        "unit": result.unit if result else "",
        "items": len(run.predictions) + len(run.failed),
        "seconds": round(seconds, 2),
        **({"problem": run.problem} if run.problem else {}),
    }
